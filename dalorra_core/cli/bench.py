"""``dalorra bench``: a grid of methods, tasks and seeds."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dalorra_core.bench.campaign import Campaign, State
from dalorra_core.bench.grid import cells, read_grid
from dalorra_core.bench.workers import devices_of
from dalorra_core.cli.console import errors_as_exit, note

__all__ = ["bench_app"]

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train and compare a grid of methods, tasks and seeds.",
)

_INTERRUPTED = 130


@bench_app.command("run")
def run_command(  # noqa: PLR0913, PLR0917  one parameter per option
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="What to compare.")],
    data_root: Annotated[Path, typer.Option(help="Directory with one folder for each data set.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory of the bench; made if need be.")
    ],
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu, cuda (all of them) or a list such as cuda:0,cuda:1; auto takes all "
            "CUDA devices when there is one."
        ),
    ] = "auto",
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes for each device; 0 does the runs in this process, where a crash ends "
            "the bench.",
        ),
    ] = 1,
    retry_failed: Annotated[  # noqa: FBT002  a command-line flag
        bool, typer.Option("--retry-failed", help="Do failed runs again.")
    ] = False,
    dry_run: Annotated[  # noqa: FBT002
        bool, typer.Option("--dry-run", help="List the runs, what they cost and what is there.")
    ] = False,
) -> None:
    """Train and score every method of a grid on every task with every seed.

    A run that is finished is never done again, however often the command is given; after a crash, a
    kill or a power cut it goes on where the last checkpoint was. Two methods with equal settings
    share one run, and another test set, predictive or temperature is added to a finished run
    without training. A run that fails is recorded and does not stop the others.

    `OUT/results.jsonl` gets one line for each method, task and seed; `dalorra bench report OUT`
    makes tables and figures of it. How to write a grid: `docs/bench.md`.

    **Examples**

    - `dalorra bench run grid.yaml --data-root data -o bench/low-data --dry-run`

    - `dalorra bench run grid.yaml --data-root data -o bench/low-data --device cuda:0,cuda:1`

    Exit status: 0 all runs are done, 1 a run failed or a setting, the data or the base model cannot
    be used, 2 wrong usage, 130 interrupted.
    """
    with errors_as_exit():
        kind, names = devices_of(device)
        checked = read_grid(grid)
        campaign = Campaign(checked, cells(checked, data_root, kind), output)
        if dry_run:
            for line in campaign.listing():
                typer.echo(line)
            return
        places = [name for _ in range(workers) for name in names]
        try:
            campaign.run(places or names[0], retry_failed=retry_failed, console=_console())
        except KeyboardInterrupt:
            note("interrupted; the same command goes on")
            raise typer.Exit(_INTERRUPTED) from None
    failed = campaign.in_state(State.FAILED)
    note(f"wrote {output / 'results.jsonl'}; try: dalorra bench report {output}")
    for job in failed:
        record = campaign.records[job.key]
        note(
            f"failed: {job.cell.label} / {job.cell.task} / seed {job.cell.seed}: {record.error} "
            f"(runs/{job.key}/log.txt)"
        )
    if failed:
        note(f"{len(failed)} of {len(campaign.jobs)} runs failed; --retry-failed does them again")
        raise typer.Exit(1)


@bench_app.command("report")
def report_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory of a bench.")],
) -> None:
    """Write tables and figures of a bench: `OUT/report/tables.md` and PNG files.

    Tables are methods by tasks, one for each metric: mean and standard deviation over seeds. Bold
    and underlined are the best and the second best only where a paired test over the same rows and
    seeds supports it. Reads `OUT/grid.json`, `OUT/results.jsonl` and the scores that it names; the
    figures of gates also read the adapters.

    Exit status: 0 done, 1 the results cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        from dalorra_core.bench.summary import write_report  # noqa: PLC0415  matplotlib is slow

        for path in write_report(out):
            note(f"wrote {path}")


def _console() -> Console:
    return Console(file=sys.stderr)
