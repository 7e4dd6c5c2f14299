"""``dalorra fix-gates``."""

from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.cli.console import errors_as_exit, note
from dalorra_core.cli.options import AdapterArgument, BaseOption
from dalorra_core.training.fixing import fix_gates

__all__ = ["fix_gates_command"]


def fix_gates_command(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Artifact directory to write.")],
    below_layer: Annotated[
        int,
        typer.Option(
            help="Gates of decoder layers below this one are fixed; counted from 0, as in "
            "`adapter.layers`."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the new adapter [default: the old one's].")
    ] = None,
    base: BaseOption = None,
    overwrite: Annotated[  # noqa: FBT002  a command-line flag
        bool, typer.Option("--overwrite", help="Replace an existing artifact at the output.")
    ] = False,
) -> None:
    """Make samples cheaper: fix the gates of lower layers at their keep probabilities.

    Samples then differ from `--below-layer` on, and all layers below it are run once for all of
    them: with 24 of 30 layers fixed, ten samples of a batch cost about two passes in place of
    six. The mean probability hardly changes; the epistemic uncertainty becomes that of
    the later layers alone and so smaller. Its policies are gone: calibrate the new adapter.

    **Examples**

    `dalorra fix-gates adapters/clinc150 -o adapters/mine --below-layer 24 --name mine`

    Exit status: 0 done, 1 the adapter, a setting or the base model cannot be used, 2 wrong usage.
    """
    with errors_as_exit():
        fix_gates(
            adapter, output, below_layer=below_layer, name=name, base=base, overwrite=overwrite
        )
        note(f"wrote {output}; it has no policy: dalorra calibrate {output} --data ...")
