"""The command line of replay."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast, get_args

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from server.errors import ApiError
from server.feedback import (
    BadPredictionIdError,
    FeedbackSetupError,
    PredictionClaim,
    PredictionSigner,
    claim_unverified,
    load_secrets,
    secret_path,
)
from server.parsing import parse_document
from server.ports import Question, Truncate
from server.replay.comparison import Comparison, compare, sampling_of
from server.schemas import ClassifyRequest
from server.settings import Settings

__all__ = ["replay_command"]

_NOT_REPRODUCED, _USAGE_ERROR = 1, 2


@dataclass(frozen=True, slots=True)
class _Engine:
    """How to compute; None: as the id says."""

    place: Path
    base: str | None
    device: str
    dtype: str | None
    exact: bool | None


def replay_command(  # noqa: PLR0913, PLR0917 - one parameter per option
    prediction_id: Annotated[str, typer.Argument(help="As it stood in the row of the answer.")],
    adapter: Annotated[
        Path,
        typer.Option("--adapter", "-a", help="Adapter directory, or a directory of such."),
    ],
    text: Annotated[
        str | None, typer.Option(help="The text that was asked. [default: standard input]")
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(help="One row as JSON, as in the request: a question with its choices."),
    ] = None,
    truncate: Annotated[str, typer.Option(help="As in the request: none, start or end.")] = "none",
    secret_file: Annotated[
        Path | None,
        typer.Option(help="Secrets that sign ids. [default: the server's, by its settings]"),
    ] = None,
    unverified: Annotated[  # noqa: FBT002 - a command-line flag
        bool, typer.Option("--unverified", help="Believe what the id says, whoever made it.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: a directory, hub id or alias. [default: the adapter's]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the base model: float32 or bfloat16. [default: as in the id]"),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--batched",
            help="Demand the same bits, or only close numbers. [default: as in the id]",
        ),
    ] = None,
    as_json: Annotated[  # noqa: FBT002
        bool, typer.Option("--json", help="The comparison as one JSON object.")
    ] = False,
) -> None:
    """Compute a past answer again and compare it with what its id recorded.

    The id says which revision answered, how it was sampled and what came out, and nothing of the
    question, which must be given again, character for character. Neither a server nor a database
    is needed: only the adapter's files, the base model and the secret that signed the id.

    An answer of a deterministic server must come out the same to the bit. That holds for the same
    kind of processor and the same library versions; the number of threads is taken from the id.
    Other answers depend in their last digits on what shared the batch: their confidence must agree
    within 1e-5 in float32 and 0.05 in bfloat16, and their label and decision must be the same.

    **Examples**

    - `dalorra replay ID --adapter adapters/clinc150 --text "move 100 dollars to my savings"`

    - `dalorra replay ID --adapter adapters < question.txt` (a last line end is left out)

    Exit status: 0 the answer came out as recorded; 1 it did not, or the id is not signed with the
    secret; 2 wrong usage: no such revision, no secret, a question that does not fit.
    """
    claim = _claim(prediction_id, secret_file, unverified=unverified)
    cut = _one_of("truncate", truncate, get_args(Truncate))
    if dtype is not None:
        _one_of("dtype", dtype, ("float32", "bfloat16"))
    question = _question(text, row)
    found = _replayed(claim, question, cut, _Engine(adapter, base, device, dtype, exact))
    if as_json:
        typer.echo(json.dumps({"verified": not unverified, **found.as_json()}, indent=1))
    else:
        _show(found)
    raise typer.Exit(0 if found.reproduced else _NOT_REPRODUCED)


def _replayed(
    claim: PredictionClaim, question: Question, truncate: Truncate, how: _Engine
) -> Comparison:
    # torch takes seconds to import, and a wrong option shall not wait for it
    from server.engines.replay import Replay, ReplayError, find_adapter, recompute  # noqa: PLC0415

    recorded = claim.reproduction
    replay = Replay(
        question=question,
        sampling=sampling_of(claim),
        truncate=truncate,
        base=how.base,
        device=how.device,
        dtype=how.dtype or (recorded.dtype if recorded else "auto"),
        deterministic=bool(recorded and recorded.deterministic) if how.exact is None else how.exact,
        threads=recorded.threads if recorded else 0,
    )
    try:
        directory = find_adapter(how.place, claim.revision, recorded.manifest if recorded else "")
        found = recompute(directory, replay)
    except ReplayError as error:
        _refuse(str(error))
    return compare(
        claim, found.card, found.scores, found.mask_set, truncated=found.truncated, exact=how.exact
    )


def _claim(prediction_id: str, secret_file: Path | None, *, unverified: bool) -> PredictionClaim:
    try:
        if unverified:
            typer.echo("dalorra replay: the id is not verified; anyone may have made it", err=True)
            return claim_unverified(prediction_id)
        path = secret_file or _default_secret()
        return PredictionSigner(load_secrets(path, create=False)).verify(prediction_id)
    except FeedbackSetupError as error:
        _refuse(f"{error}; without the secret, --unverified believes the id")
    except BadPredictionIdError:
        reason = "is not in the form of an id" if unverified else "is not signed with this secret"
        typer.echo(f"dalorra replay: the prediction id {reason}", err=True)
        raise typer.Exit(_NOT_REPRODUCED) from None


def _default_secret() -> Path:
    try:
        return secret_path(Settings())
    except ValidationError as error:
        names = ", ".join(str(fault["loc"][0]) for fault in error.errors() if fault["loc"])
        _refuse(f"settings outside their domain: {names}; give --secret-file")


def _question(text: str | None, row: str | None) -> Question:
    """Return the question as the server would have read it from a request."""
    if text is not None and row is not None:
        _refuse("give --text or --row, not both")
    if row is not None:
        try:
            item: Any = json.loads(row)
        except (ValueError, RecursionError):
            _refuse("--row must be one JSON object")
    else:
        item = sys.stdin.read().removesuffix("\n") if text is None else text
    try:
        request = parse_document(json.dumps({"input": item}).encode(), ClassifyRequest)
    except ApiError as error:
        _refuse(f"the question cannot be read: {error.detail}")
    questions = request.questions()
    if len(questions) != 1:
        _refuse(f"--row must be one row, got {len(questions)}")
    return questions[0]


def _show(found: Comparison) -> None:
    table = Table("", "recorded", "recomputed", "same")
    said = {True: "yes", False: "NO", None: "-"}
    for line in found.lines:
        shown = ("-" if v is None else str(v) for v in (line.recorded, line.recomputed))
        table.add_row(line.name, *shown, said[line.same])
    console = Console(highlight=False, markup=False)
    console.print(table)
    for text in found.notes:
        console.print(f"note: {text}")
    how = "to the bit" if found.exact else f"within {found.tolerance:g}"
    console.print(
        f"{'reproduced' if found.reproduced else 'NOT reproduced'} ({how}); the confidence differs "
        f"by {found.difference:.3g}"
    )


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        _refuse(f"--{option} must be one of {', '.join(allowed)}, got {value}")
    return cast("Any", value)


def _refuse(text: str) -> NoReturn:
    typer.echo(f"dalorra replay: {text}", err=True)
    raise typer.Exit(_USAGE_ERROR) from None
