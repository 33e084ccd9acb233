"""Importing the package costs nothing that the caller does not use."""

import subprocess
import sys

import pytest

import momentum_fix

HEAVY = ("torch", "sympy", "matplotlib", "numpy", "z3")


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


def test_the_package_can_be_imported_anew():
    code = "import sys, momentum_fix.once\nfor name in [name for name in sys.modules if 'momentum' in name]:\n"
    code += "    del sys.modules[name]\n"
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
        assert name in momentum_fix.__doc__ or name in ("Report", "Handle", "Audit", "Diagnosis", "UnreadableError")
    assert not any(name.startswith("_") for name in dir(momentum_fix))
