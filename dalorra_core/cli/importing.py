"""``dalorra import``."""

from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.cli.console import errors_as_exit, note
from dalorra_core.training.importing import import_peft, read_label_tokens
from dalorra_core.training.settings import load_config

__all__ = ["import_command"]


def import_command(
    lora: Annotated[
        Path,
        typer.Argument(metavar="PEFT_DIR", help="Directory with adapter_config.json of a LoRA."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="YAML, TOML or JSON file with settings of a run."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Override one setting, such as `-s method=tfb`, `-s base=...`. Repeatable.",
        ),
    ] = None,
    label_tokens: Annotated[
        Path | None,
        typer.Option(
            help="JSON object from label to the token id that the LoRA answers it with [default: "
            "those that training would choose]."
        ),
    ] = None,
    overwrite: Annotated[  # noqa: FBT002  a command-line flag
        bool, typer.Option("--overwrite", help="Replace an existing artifact at the output.")
    ] = False,
) -> None:
    """Make an artifact of a plain PEFT LoRA, as it is or Bayesian without training it again.

    The settings are those of `dalorra train`, and the rows of `data.source` do what they do there:
    they give the labels, the prompt and their tokens, the default policy and the golden probes.
    Rank, scale and modules are the LoRA's own. With `method=mle` the artifact answers as the LoRA
    does. With `method=tfb` noise is added inside the span of its B, as strong as its answers to
    training rows allow; the rows' labels are not used for that. `method=laplace` with
    `method.trained_as=mle` fits a Gaussian posterior. To go on training from a LoRA with another
    method, such as DALorRA, set `adapter.start=PEFT_DIR` in `dalorra train`.

    Only `adapter_model.safetensors` is read, never a pickle. Plain LoRA on linear layers is
    imported, rsLoRA and ranks by pattern included; anything else, such as DoRA, biases or trained
    embeddings, is refused by name.

    **Examples**

    `dalorra import my-lora -o adapters/mine -s name=mine -s base=path/to/base -s method=mle
    -s data.source=data/mine`

    `dalorra import my-lora -o adapters/noisy -s name=noisy -s method=tfb -s data.source=data/mine`

    Exit status: 0 done, 1 the LoRA, a setting, a row or the base model cannot be used, 2 wrong
    usage.
    """
    with errors_as_exit():
        settings = load_config(config, assignments or [])
        tokens = None if label_tokens is None else read_label_tokens(label_tokens)
        import_peft(lora, settings, output, label_tokens=tokens, overwrite=overwrite, report=note)
        note(f"wrote {output}; try: dalorra inspect {output}")
