"""The shell command: `python -m momentum_fix` or `momentum-fix`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import momentum_fix
from momentum_fix import plots
from momentum_fix._tables import presentable, show

_INSTALL = "in a clone of momentum_fix, pip install -c constraints.txt '.[plots]'"
try:
    import click
except ImportError:
    sys.exit(f"Error: needs click: {_INSTALL}")

_TORCH = next((found.version for found in metadata.distributions(name="torch")), "missing")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(momentum_fix.__version__, message=f"%(prog)s %(version)s, torch {_TORCH}")
def commands() -> None:
    """BatchNorm's running statistics as if activation checkpointing did not exist.

    \b
    Examples:
      momentum-fix demo                        see what happens, in ten seconds
      momentum-fix value 0.1 --passes 2        for a layer that is updated twice per batch
      momentum-fix plot decay --passes 4 -o decay.png
      momentum-fix audit runs/ --steps 9000
    """


_momentum = click.argument("momentum", type=float)
_passes = click.option("--passes", type=int, default=2, show_default=True, help="Updates per batch.")


@commands.command()
@_momentum
@_passes
def value(momentum: float, passes: int) -> None:
    """Print the corrected momentum.

    MOMENTUM is PyTorch's, the weight of the new value: 0 to 1.
    """
    click.echo(momentum_fix.corrected_momentum(momentum, passes))


@commands.command()
@_momentum
@_passes
def effective(momentum: float, passes: int) -> None:
    """Print the momentum that several updates act as.

    This is the inverse of `value`. MOMENTUM is PyTorch's, the weight of the new value: 0 to 1.
    """
    click.echo(momentum_fix.effective_momentum(momentum, passes))


@commands.command()
def demo() -> None:
    """Show the harm and its repair on a tiny network."""
    from momentum_fix.demo import demonstrate

    click.echo(demonstrate())


@commands.command()
def prove() -> None:
    """Check every step of every theorem by computer algebra.

    The status is 1 if a theorem fails.
    """
    from momentum_fix import symbolic

    failed, theorems = 0, symbolic.theorems()
    click.echo(symbolic.letters.__doc__)
    for number, theorem in enumerate(theorems, start=1):
        click.echo(f"{number}. {theorem}")
        try:
            for step in theorem.steps:
                step.prove()
                click.echo(f"   ✓ {step}\n       {step.reason}")
            theorem.prove()  # the steps may hold and not lead to what is claimed
        except symbolic.ProofError as error:
            failed += 1
            click.echo(f"   ✗ FAILS: {error}")
    claims, steps = (sum(len(getattr(theorem, part)) for theorem in theorems) for part in ("claims", "steps"))
    click.echo(
        f"{len(theorems)} theorems, {claims} claims, {steps} steps: {f'{failed} FAILED' if failed else 'all hold'}"
    )
    sys.exit(1 if failed else 0)


@commands.command()
@click.argument("name", required=False, type=click.Choice(list(plots.PLOTS)))
@click.option("--momentum", type=float, default=0.1, show_default=True, help="The configured momentum.")
@click.option(
    "--passes", type=int, multiple=True, help="Passes per batch of the plot NAME; may be given several times."
)
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False, writable=True, path_type=Path))
def plot(name: str | None, momentum: float, passes: tuple[int, ...], output: Path) -> None:
    """Draw all the curves, or one plot.

    The name of the output ends in .png, .svg or .pdf.
    """
    if not output.exists() and not os.access(output.parent, os.W_OK):  # click looks at files that are there
        raise click.BadParameter(f"Folder {str(output.parent)!r} cannot be written to.", param_hint="--output")
    if passes and name in (None, "shares"):
        raise click.UsageError("--passes needs the NAME of a plot, and not `shares`, which is of two passes.")
    given = {"momentum": momentum} | ({"passes": passes} if passes else {})
    plots.save(output, plots.PLOTS[name](**given).figure if name else plots.figure(momentum))


@commands.command()
@click.argument("paths", nargs=-1, required=True, metavar="FILE...", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", type=int, help="Batches trained on.  [default: the lowest count of any layer]")
@click.option("--momentum", type=float, default=0.1, show_default=True, help="The model's momentum.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program to read.")
def audit(paths: tuple[Path, ...], steps: int | None, momentum: float, as_json: bool) -> None:
    """Find layers that were updated more than once per step.

    FILE is a checkpoint, a sharded index, or a directory of them. The status is 1 if there are such layers, 2 if a
    file is unreadable.
    """
    from momentum_fix.files.verdict import audit_files

    hidden = len(paths) < 2 or not sys.stderr or not sys.stderr.isatty()
    with click.progressbar(paths, label="auditing", hidden=hidden, file=sys.stderr) as shown:
        found = audit_files(shown, steps, momentum)
    if as_json:
        for part in json.JSONEncoder(indent=2).iterencode(found.as_json()):  # as one text it can take hundreds of MB
            print(part, end="")
    else:
        click.echo(found.verdict, nl=False)
        for above, cells in found.tables():
            click.echo(f"\n\n{above}")
            show(cells)
    click.echo()
    for sentence in found.errors.values():
        click.echo(sentence, err=True)
    sys.exit(2 if found.errors else 1 if found.repeated else 0)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: status 0 if all is well, 1 for a finding, 2 for an error, 141 for a closed pipe."""
    stdout = sys.stdout
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a tick must not break a terminal that cannot show it
    try:
        commands.main(argv, prog_name="momentum-fix")
    except SystemExit as end:  # of a closed pipe click makes a 1, which would be a finding, and another stdout
        sys.exit(end.code if sys.stdout is stdout else 141)  # as shells do: 128 + SIGPIPE
    except (ImportError, OSError, TypeError, ValueError) as error:
        reason = f"needs {error.name}: {_INSTALL}" if isinstance(error, ModuleNotFoundError) else str(error)
        with suppress(OSError):
            click.echo(f"Error: {presentable(reason)}", err=True)
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:  # drop what cannot be written, or Python would try again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(2)


if __name__ == "__main__":
    main()
