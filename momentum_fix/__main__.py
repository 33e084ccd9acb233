"""The command line: a thin layer over the library."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import momentum_fix


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 fine, 1 a finding, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="momentum-fix", description="BatchNorm running statistics as if activation checkpointing did not exist."
    )
    parser.add_argument("--version", action="version", version=f"momentum_fix {momentum_fix.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train a real checkpointed 3-D network beside its uncheckpointed twin")
    demo.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("momentum_fix_demo.png"), help="the picture (%(default)s)"
    )
    demo.set_defaults(run=_demo)

    audit = commands.add_parser("audit", help="tell from saved files which layers were updated more than once per step")
    audit.add_argument("file", nargs="+", type=Path, help="a checkpoint, a sharded index, or a directory of them")
    audit.add_argument("--steps", type=int, help="batches trained on (default: what the layer that counted least says)")
    audit.add_argument("--momentum", type=float, default=0.1, help="the model's momentum (default: %(default)s)")
    audit.add_argument("--json", action="store_true", help="print JSON for a program to read")
    audit.set_defaults(run=_audit)

    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, TypeError, OSError) as error:
        print(f"momentum-fix: {error}", file=sys.stderr)
        return 2


def _demo(arguments: argparse.Namespace) -> int:
    try:
        from momentum_fix import demo
    except ModuleNotFoundError as error:
        print(f"momentum-fix: the demonstration needs {error.name}: pip install 'momentum-fix[demo]'", file=sys.stderr)
        return 2
    outcome = demo.train(arguments.steps)
    print(demo.table(outcome))
    demo.picture(outcome, arguments.output)
    print(f"Picture: {arguments.output}")
    return 0 if outcome.same_path else 1


def _audit(arguments: argparse.Namespace) -> int:
    from momentum_fix.saved import Audit, LayerAudit, UnreadableError, audit, checkpoint_files

    files: list[Path] = []
    rows: list[LayerAudit] = []
    errors: dict[str, str] = {}
    for path in arguments.file:
        try:
            files += checkpoint_files(path) if path.is_dir() else [path]
        except UnreadableError as error:
            errors[str(path)] = str(error)
    for file in _with_progress(files):
        try:
            rows += audit(file, arguments.steps, arguments.momentum).rows
        except UnreadableError as error:
            errors[str(file)] = str(error)
    found = Audit(tuple(rows), errors)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found)
    return 2 if found.errors else 1 if found.recomputed else 0


def _with_progress(files: Sequence[Path]) -> Iterable[Path]:
    """Show a bar where there is a terminal to show it on, several files, and a library to draw it."""
    if len(files) < 2 or not sys.stderr.isatty() or find_spec("tqdm") is None:
        return files
    from tqdm import tqdm

    bar: Iterable[Path] = tqdm(files, desc="auditing", unit="file")
    return bar


if __name__ == "__main__":
    sys.exit(main())
