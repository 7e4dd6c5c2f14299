"""``dalorra export``."""

import re
from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.artifact.export_record import Engine, ExportRecord, MaskKind
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.cli.console import errors_as_exit, note
from dalorra_core.cli.options import (
    AdapterArgument,
    BaseOption,
    DesignOption,
    DeviceOption,
    DtypeOption,
    SeedOption,
    plan_from,
)
from dalorra_core.data.readers import read_jsonl
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.export import Exported, check_output, prepare_export, write_export
from dalorra_core.predictive.parity import Expected, expected_answers
from dalorra_core.predictive.predictor import Predictor

__all__ = ["export_command", "parse_mask"]

_COUNT = re.compile(r"[1-9][0-9]{0,5}")


def export_command(  # noqa: PLR0913, PLR0917  one parameter per option
    adapter: AdapterArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write; new or empty.")
    ],
    mask: Annotated[
        str,
        typer.Option(help="mean, ones, or samples:M; samples alone takes the adapter's own M."),
    ],
    format_: Annotated[str, typer.Option("--format", help="peft, the only one.")] = "peft",
    engine: Annotated[
        str,
        typer.Option(
            help="Who is to load it: peft, or vllm, which takes an adapter of the output "
            "projection for some models only."
        ),
    ] = "peft",
    design: DesignOption = None,
    seed: SeedOption = None,
    verify: Annotated[  # noqa: FBT002  a command-line flag
        bool,
        typer.Option(
            help="Load what was written with PEFT and compare with our own forward pass; needs the "
            "extra `peft`."
        ),
    ] = True,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of rows to compare on [default: the adapter's golden probes]."
        ),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Write an adapter as plain LoRA that PEFT and vLLM load unchanged.

    `--mask mean` is the one function at the posterior mean, `ones` has every gate open, and
    `samples:M` writes M adapters, `OUTPUT/sample-000` and so on: the very samples that the server
    averages over, so that an engine that averages the probabilities of all M gives its answers.
    Gates are multiplied into B, ranks are filled up with zeros to one that vLLM has room for, and B
    of the output projection has zero rows for all tokens but the labels'. The base model is never
    changed: nothing is merged.

    `OUTPUT/dalorra-export.json` says which labels, tokens, prompt, temperature and masks these are,
    and how far PEFT's answers are from ours. What plain LoRA cannot say (gates of each question,
    noise on each token, functions between the factors, draws of logits) is refused.

    **Examples**

    `dalorra export adapters/clinc150 -o exported/mean --mask mean`

    `dalorra export adapters/clinc150 -o exported/clinc150 --mask samples:8 --design stratified`

    Exit status: 0 done; 1 the adapter cannot be exported, or PEFT answers otherwise with it
    (nothing is written then); 2 wrong usage.
    """
    with errors_as_exit():
        if format_ != "peft":
            raise ConfigError(f"format must be peft, got {format_!r}")
        kind, num_samples = parse_mask(mask)
        loader = _engine(engine)
        if kind != "samples" and (design is not None or seed is not None):
            raise ConfigError(f"design and seed must be left out with mask {kind}")
        check_output(output)
        predictor = Predictor.load(adapter, base=base, device=device, dtype=dtype)
        plan = plan_from(predictor, num_samples, seed, "monte_carlo", design)
        exported = prepare_export(predictor, kind, plan, loader)
        expected = _expected(predictor, exported, texts, base) if verify else None
        del predictor  # the base model is loaded once more to be compared with, not twice at once
        record = write_export(exported, output, expected)
        _show(output, record)


def parse_mask(text: str) -> tuple[MaskKind, int | None]:
    """Return which functions a mask names, and M where it is given.

    Args:
        text: ``mean``, ``ones``, ``samples`` or ``samples:M`` with M at least 1.

    Raises:
        ConfigError: It is none of them.

    Example:
        >>> parse_mask("samples:8")
        ('samples', 8)
    """
    if text in ("mean", "ones"):
        return ("mean" if text == "mean" else "ones"), None
    name, colon, count = text.partition(":")
    if name == "samples" and not colon:
        return "samples", None
    if name == "samples" and _COUNT.fullmatch(count):
        return "samples", int(count)
    raise ConfigError(f"mask must be mean, ones, samples or samples:M with M >= 1, got {text!r}")


def _engine(text: str) -> Engine:
    if text not in ("peft", "vllm"):
        raise ConfigError(f"engine must be peft or vllm, got {text!r}")
    return "peft" if text == "peft" else "vllm"


def _expected(
    predictor: Predictor, exported: Exported, texts: Path | None, base: str | None
) -> Expected:
    """Return our answers to the rows that the written adapters are tried on."""
    if texts is None:
        rows = predictor.golden_rows()
    else:
        examples = read_jsonl(texts, require_labels=False)
        rows = [predictor.encode(example, truncate="end") for example in examples]
    if not rows:
        raise ConfigError(
            "verify compares answers to the adapter's golden probes, and it has none; pass --texts "
            "FILE or --no-verify"
        )
    directory = resolve_base_model(base if base is not None else predictor.manifest.base.id)
    source = "golden probes" if texts is None else texts.name
    return expected_answers(predictor, exported.pack, rows, source, directory)


def _show(output: Path, record: ExportRecord) -> None:
    count = len(record.adapters)
    what = f"{count} adapters" if record.mask == "samples" else "one adapter"
    typer.echo(
        f"{record.source.name} ({record.source.method}, revision {record.source.revision}), mask "
        f"{record.mask}: {what} of rank {record.r} in {output}"
    )
    parity = record.parity
    if parity is None:
        note("not compared with PEFT")
        return
    typer.echo(
        f"PEFT {parity.peft} in {parity.dtype}, {parity.rows} rows of {parity.source}: largest "
        f"difference of a probability {parity.probabilities:.2g}, of their average "
        f"{parity.mean_probabilities:.2g}, of a logit {parity.logits:.2g} of the largest (limit "
        f"{parity.limit:g})"
    )
