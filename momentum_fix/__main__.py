"""The command line: a thin layer over the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
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


if __name__ == "__main__":
    sys.exit(main())
