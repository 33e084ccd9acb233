"""The shell command: `python -m momentum_fix` or `momentum-fix`."""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` can meet Ctrl-C: no traceback from the imports below

import argparse
import errno
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, TextIO

import momentum_fix
from momentum_fix._tables import can_draw, presentable, show, show_lines

EXAMPLES = """\
examples:
  python -m momentum_fix value 0.1 --passes 2     the momentum to give a layer that is updated twice per batch
  python -m momentum_fix prove                    check every step of every theorem by computer algebra
  python -m momentum_fix plot -o curves.png       draw the curves (png, svg or pdf, by the name)
  python -m momentum_fix audit runs/ --steps 9000 find layers that were updated more than once per step
"""
_EXTRAS = {"matplotlib": "plots"}  # without rich, tables are printed in another way


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        _tell(f"{self.prog}: {presentable(message)}")  # one line, without the usage
        sys.exit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse's own hides that it could not


def value(arguments: argparse.Namespace) -> int:
    """Print the corrected momentum."""
    print(momentum_fix.corrected_momentum(arguments.momentum, arguments.passes))
    return 0


def prove(arguments: argparse.Namespace) -> int:
    """Print every theorem, its claims and its steps, each step with a tick, or a cross where it fails."""
    from momentum_fix import symbolic
    from momentum_fix.symbolic import letters

    failed, theorems = 0, symbolic.theorems()
    print(letters.__doc__)
    for number, theorem in enumerate(theorems, start=1):
        print(f"{number}. {theorem}")
        failed_before = failed
        for step in theorem.steps:
            try:
                step.prove()
                mark = "✓"
            except symbolic.ProofError:
                failed, mark = failed + 1, "✗ FAILS:"
            print(f"   {mark} {step}\n       {step.reason}", flush=True)
        try:  # the steps may hold and not lead to what is claimed
            theorem.prove()
        except symbolic.ProofError as error:
            if failed == failed_before:
                failed += 1
                print(f"   ✗ FAILS: {error}", flush=True)
    claims, steps = (sum(len(getattr(theorem, part)) for theorem in theorems) for part in ("claims", "steps"))
    print(f"{len(theorems)} theorems, {claims} claims, {steps} steps: {f'{failed} FAILED' if failed else 'all hold'}")
    return 1 if failed else 0


def plot(arguments: argparse.Namespace) -> int:
    """Write the curves to a file."""
    _refuse_unwritable(arguments.output)
    from momentum_fix import plots

    plots.save(arguments.output)
    return 0


def _refuse_unwritable(path: Path) -> None:
    """Raise before the work, not after it, where a file cannot be written."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def audit(arguments: argparse.Namespace) -> int:
    """Tell from saved files which layers were updated more than once per step."""
    from momentum_fix.files import reading, verdict

    files: list[Path] = []
    errors: dict[str, str] = {}
    for path in arguments.file:
        try:
            files += reading.checkpoint_files(path)
        except reading.UnreadableError as error:
            errors[str(path)] = str(error)
    read = verdict.audit_files(_with_progress(files), arguments.steps, arguments.momentum)
    found = verdict.Audit(read.rows, errors | read.errors)
    if arguments.json:
        parts = json.JSONEncoder(indent=2).iterencode(found.as_json())
        while some := "".join(islice(parts, 100_000)):  # as one text it can take hundreds of MB
            print(some, end="")
        print()
    else:
        show_lines(found.verdict)
        for above, cells in found.tables():
            show_lines(f"\n{above}")
            show(cells)
    for sentence in found.errors.values():
        _tell(sentence)
    return 2 if found.errors else 1 if found.repeated else 0


def _with_progress(files: Sequence[Path]) -> Iterable[Path]:
    """Show a bar where there is a terminal to show it on, several files, and a library to draw it."""
    if len(files) < 2 or not sys.stderr.isatty() or not can_draw():
        return files
    from rich.console import Console
    from rich.progress import track

    return track(files, "auditing", console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="momentum-fix",
        description="BatchNorm's running statistics as if activation checkpointing did not exist.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {momentum_fix.__version__}")
    commands = parser.add_subparsers(metavar="command", dest="command")

    command = commands.add_parser("value", help="print the corrected momentum")
    command.add_argument("momentum", type=float, help="PyTorch's momentum, the weight of the new value (0 to 1)")
    command.add_argument("--passes", type=int, default=2, help="updates per batch (default: %(default)s)")
    command.set_defaults(run=value)

    command = commands.add_parser("prove", help="check every step of every theorem (status 1 if one fails)")
    command.set_defaults(run=prove)

    command = commands.add_parser("plot", help="draw the curves")
    command.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="file to write: .png, .svg or .pdf"
    )
    command.set_defaults(run=plot)

    command = commands.add_parser(
        "audit",
        help="find layers in saved files that were updated more than once per step "
        "(status 1 if there are any, 2 if a file is unreadable)",
    )
    command.add_argument("file", nargs="+", type=Path, help="a checkpoint, a sharded index, or a directory of them")
    command.add_argument("--steps", type=int, help="batches trained on (default: the lowest count of any layer)")
    command.add_argument("--momentum", type=float, default=0.1, help="the model's momentum (default: %(default)s)")
    command.add_argument("--json", action="store_true", help="print JSON, for a program to read")
    command.set_defaults(run=audit)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 a finding (a failed proof, say), 2 an error."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a tick must not break a terminal that cannot show it
    parser = _parser()
    name = parser.prog
    try:
        if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as it was before the imports
        with _flushed(sys.stdout):  # here, where a closed pipe or a full disk can be met
            arguments = parser.parse_args(argv)
            if arguments.command is None:
                parser.print_help()
                return 0
            name = f"{parser.prog} {arguments.command}"
            status: int = arguments.run(arguments)
            return status
    except BrokenPipeError:
        return 128 + 13  # as if ended by SIGPIPE
    except KeyboardInterrupt:
        _tell(f"{parser.prog}: interrupted")
        return 128 + 2
    except (ImportError, OSError, TypeError, ValueError) as error:
        _tell(f"{name}: {presentable(_reason(error))}")
        return 2


def _open_closed_streams() -> None:
    """Give output that was closed from outside, which is None then, a place to vanish in."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115


@contextmanager
def _flushed(stream: TextIO) -> Iterator[None]:
    """Flush at the end. What cannot be written is dropped, or Python would meet it again when it ends."""
    try:
        yield
    finally:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise


def _tell(message: str) -> None:
    """Print a line to stderr; where it cannot be written, there is nobody to tell."""
    with suppress(OSError), _flushed(sys.stderr):
        print(message, file=sys.stderr)


def _reason(error: Exception) -> str:
    """Give the error's text, or for a missing library what to install."""
    if not isinstance(error, ModuleNotFoundError):
        return str(error)
    name = (error.name or "").partition(".")[0]
    extra = f"[{_EXTRAS[name]}]" if name in _EXTRAS else ""
    return f"needs {name}: in a clone of momentum_fix, pip install -c constraints.txt '.{extra}'"


if __name__ == "__main__":
    sys.exit(main())
