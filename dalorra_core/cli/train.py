"""``dalorra train``."""

from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.cli.console import errors_as_exit, note
from dalorra_core.training.processes import is_first_process
from dalorra_core.training.run import run_training
from dalorra_core.training.settings import load_config

__all__ = ["train_command"]


def train_command(  # noqa: PLR0913, PLR0917  options of a command line
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML, TOML or JSON file with the run's settings."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Override one setting, such as `-s optim.steps=200`, `-s method=mle`. Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Artifact directory to write [default: adapters/NAME]."
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Checkpoints and logs [default: runs/NAME]. Kept after the run."),
    ] = None,
    resume: Annotated[  # noqa: FBT002  a command-line flag
        bool,
        typer.Option("--resume", help="Continue from the newest checkpoint in the run directory."),
    ] = False,
    overwrite: Annotated[  # noqa: FBT002
        bool, typer.Option("--overwrite", help="Replace an existing artifact at the output.")
    ] = False,
    from_adapter: Annotated[
        Path | None,
        typer.Option(
            help="Artifact to start from instead of training, for a method that is fitted "
            "afterwards (`laplace`, `tfb`); it must be what this run would train."
        ),
    ] = None,
) -> None:
    """Train an adapter and write it as an artifact.

    Reads labelled rows, checks every one, trains by the negative ELBO of the chosen method,
    evaluates on the validation split, chooses the default decision policy there, and writes
    `OUTPUT/manifest.json` and `OUTPUT/adapter.safetensors` in one step.

    **Data.** `data.source` is a directory with `train.jsonl` and `validation.jsonl`, a single
    `.jsonl` file, `hub:NAME` (with the extra `hub` and a network), or `task:NAME`, a data set of
    the published protocol under `data.root`. A row is either
    `{"id", "text", "label"}` or `{"id", "question", "context", "choices", "answer"}`. A bad row
    stops the run before the first step with its file, line and field.

    **Interruptions.** A checkpoint is written every `run.checkpoint_every` steps. After a crash,
    a kill or a power cut run the same command with `--resume`: on a CPU the result equals the
    uninterrupted run's, bit for bit.

    **Fits.** `laplace` and `tfb` train an adapter as another method (`method.trained_as`), then fit
    what they add to it. With `--from-adapter` they start from an artifact instead; it must be
    what this run would have trained, on the same base model, labels, prompt and modules.

    **Settings.** All of them, with defaults and meaning: `docs/training.md`. The ones most worth
    knowing: `method` (such as `dalorra`, `mle`, `ensemble`, `blob`, `laplace`; `docs/method.md`
    has all), `method.tau`, `method.prior_prob`, `adapter.r`, `adapter.target_modules`, `optim.lr`,
    `optim.steps`, `optim.batch_size`, `run.precision`.

    **Examples**

    `dalorra train -c configs/clinc150.yaml -s data.source=data/clinc150`

    `dalorra train -s name=spam -s data.source=data/sms_spam -s data.validation_split=null
    -s optim.steps=300`

    Exit status: 0 done, 1 a setting, the data or the base model cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        settings = load_config(config, assignments or [])
        target = output if output is not None else Path("adapters") / settings.name
        runs = run_dir if run_dir is not None else Path("runs") / settings.name
        run_training(
            settings,
            target,
            runs,
            resume=resume,
            overwrite=overwrite,
            from_adapter=from_adapter,
            report=note,
        )
        if is_first_process():
            note(f"wrote {target}; try: dalorra inspect {target}")
