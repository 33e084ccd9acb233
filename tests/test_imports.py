"""Importing the package costs nothing that the caller does not use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import momentum_fix

PACKAGE = Path(momentum_fix.__file__).parent
HEAVY = ("torch", "sympy", "matplotlib", "numpy", "z3", "lightning", "pytorch_lightning", "transformers")


def loaded_after(statement):
    """Give the heavy packages that a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import momentum_fix",
        "from momentum_fix import corrected_momentum; corrected_momentum(0.1, passes=2)",
        "import momentum_fix; momentum_fix.effective_momentum(0.1); dir(momentum_fix); momentum_fix.__version__",
    ],
)
def test_the_number_loads_neither_torch_nor_sympy_nor_matplotlib(statement):
    assert loaded_after(statement) == []


def test_the_theorems_load_sympy_and_neither_torch_nor_the_solver_of_the_tests():
    proved = "from momentum_fix import symbolic; [theorem.prove() for theorem in symbolic.theorems()]"
    assert loaded_after(proved) == ["sympy"]


def test_this_check_can_fail():
    assert "torch" in loaded_after("from momentum_fix import calibrate")


def test_a_trainers_library_is_loaded_by_its_own_callback_alone():
    pytest.importorskip("lightning", reason="the core's tests do without it")
    trainers = {"lightning", "pytorch_lightning", "transformers"}
    assert not trainers & {*loaded_after("import momentum_fix.integrations; from momentum_fix import update_once")}
    assert "lightning" in loaded_after("import momentum_fix.integrations.lightning")
    assert "transformers" in loaded_after("import momentum_fix.integrations.transformers")


def imported_by(*files):
    """Give what these files import, at the top or in a function."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_saved_files_are_read_without_torch_and_without_what_is_known_of_models():
    files = sorted((PACKAGE / "files").glob("*.py"))
    known = {"__future__", *sys.stdlib_module_names, *(f"momentum_fix.files.{file.stem}" for file in files)}
    found = {name for name in imported_by(*files) if name not in known and name.partition(".")[0] not in known}
    assert found == {"momentum_fix.formula", "momentum_fix._tables"}
    assert {"momentum_fix.norms.layers", "momentum_fix.norms.momenta"} < imported_by(PACKAGE / "auditing.py")


def test_the_package_can_be_imported_anew():
    code = "import sys, momentum_fix.norms.update_once\n"
    code += "for name in [name for name in sys.modules if 'momentum' in name]:\n    del sys.modules[name]\n"
    assert "torch" in loaded_after(code + "from momentum_fix import update_once, calibrate")


def test_every_public_name_is_there():
    for name in momentum_fix.__all__:
        assert callable(getattr(momentum_fix, name))
        assert name in dir(momentum_fix)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'momentum_fix' has no attribute 'corect'"):
        _ = momentum_fix.corect


def test_what_the_package_says_of_itself_opens_with_what_a_user_wants():
    for name in momentum_fix.__all__:
        assert name in momentum_fix.__doc__ or name in (
            "Report",
            "Handle",
            "Everywhere",
            "Audit",
            "Diagnosis",
            "UnreadableError",
        )
    assert not any(name.startswith("_") for name in dir(momentum_fix))


# The picture in CONTRIBUTING.md.

CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"


def drawn():
    """Give the rooms in the picture, each with its files and with the rooms that it imports from, in their order."""
    picture = CONTRIBUTING.read_text(encoding="utf-8").partition("```text\nformula.py")[2].partition("```")[0]
    rooms, room = {}, ""
    for line in ("formula.py" + picture).splitlines():
        name, _, rest = line.strip().partition(" ")
        if line.startswith(" "):
            rooms[room][0].append(name.removesuffix(".py"))
        else:
            room = name.removesuffix("/").removesuffix(".py")
            uses = rest.partition("<-")[2]
            rooms[room] = ([], [each.strip() for each in uses.split(",")] if uses else [])
    return rooms


def place(module):
    """Give the room of a module, and its file there."""
    names = module.split(".")[1:]
    return (names or ["__init__"])[0], names[1] if len(names) > 1 else ""


def imported():
    """Give what each file of the package imports from the package: (room, file) for each (room, file)."""
    modules = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        names = file.relative_to(PACKAGE.parent).with_suffix("").parts
        modules[".".join(names[:-1] if names[-1] == "__init__" else names)] = file
    found = {}
    for module, file in modules.items():
        uses = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "momentum_fix":
                names = (f"{node.module}.{alias.name}" for alias in node.names)
                uses |= {name if name in modules else node.module for name in names}
            elif isinstance(node, ast.Import):
                uses |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "momentum_fix"}
        found[place(module)] = {place(each) for each in uses}
    return found


def test_the_picture_of_the_rooms_is_what_is_imported():
    rooms, uses = drawn(), imported()
    assert set(rooms) == {room for room, _ in uses}
    for room, (files, others) in rooms.items():
        assert set(files) == {file for each, file in uses if each == room and file}, room
        assert set(others) == {to for (each, _), found in uses.items() if each == room for to, _ in found} - {room}, (
            room
        )


def test_no_import_runs_up():
    rooms, uses = drawn(), imported()
    order = list(rooms)
    for (room, file), found in uses.items():
        for other, its_file in found:
            if other != room:
                assert order.index(other) < order.index(room)
            elif file:
                files = rooms[room][0]
                assert files.index(its_file) < files.index(file), (room, file, its_file)
    assert not {"state"} & {room for (each, _), found in uses.items() if each == "norms" for room, _ in found}
    assert not {"norms"} & {room for (each, _), found in uses.items() if each == "state" for room, _ in found}


def test_an_import_that_runs_up_would_be_seen():
    rooms, uses = drawn(), imported()
    assert ("formula", "") in uses["weights", ""]
    assert list(rooms).index("formula") < list(rooms).index("weights")
