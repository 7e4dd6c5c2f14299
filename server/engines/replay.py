"""Compute an answer again from an adapter's files: the part of ``dalorra replay`` that needs torch.

It stands here because only engines may touch the core, and because the answer must come from the
very engine that serves.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dalorra_core.artifact.reading import ADAPTER_FILE, MANIFEST_FILE
from dalorra_core.errors import DalorraError
from server.engines.local import LocalEngine
from server.ports import (
    AdapterCard,
    AdapterLoadError,
    BatchRow,
    ChoiceQuestion,
    Question,
    RowRejectedError,
    RowScores,
    Sampling,
    Truncate,
)

__all__ = ["Recomputed", "Replay", "ReplayError", "find_adapter", "recompute"]

_REVISION_CHARS = 12


class ReplayError(Exception):
    """The answer cannot be computed here; the text says why."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What to compute again.

    Attributes:
        question: As it was asked.
        sampling: As it was sampled.
        truncate: How a question that is too long was cut.
        base: Base model; None for the one the adapter names.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, float32 or bfloat16.
        deterministic: Whether the server ran every row alone.
        threads: Threads of one forward pass; 0 leaves it to torch.
    """

    question: Question
    sampling: Sampling
    truncate: Truncate
    base: str | None
    device: str
    dtype: str
    deterministic: bool
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came out this time."""

    card: AdapterCard
    scores: RowScores
    truncated: bool
    mask_set: str | None


def find_adapter(place: Path, revision: str, manifest: str) -> Path:
    """Return the adapter of a revision: ``place`` itself, or a directory in it.

    Of several with these tensors, the one with this manifest comes first. Nothing is verified:
    loading does that.

    Args:
        place: An artifact, or a directory of artifacts.
        revision: First 12 hex digits of the sha256 of its tensors.
        manifest: What the digest of its manifest begins with; empty when that is not known.

    Raises:
        ReplayError: None has this revision; says which there are.
    """
    seen: dict[Path, tuple[str, str]] = {}
    for directory in (place, *_directories(place)):
        if (found := _identity(directory)) is not None:
            seen[directory] = found
    same = [directory for directory, (found, _) in seen.items() if found == revision]
    if not same:
        there = ", ".join(f"{d.name} ({r})" for d, (r, _) in seen.items()) or "no adapter"
        raise ReplayError(f"adapter: revision {revision} is not in {place}; it holds {there}")
    return next((d for d in same if manifest and seen[d][1].startswith(manifest)), same[0])


def recompute(directory: Path, replay: Replay) -> Recomputed:
    """Load an adapter, check it, and ask it the question.

    Raises:
        ReplayError: The adapter or the base model cannot be used, or the question does not fit.
    """
    engine = LocalEngine(
        (directory,),
        base=replay.base,
        device=replay.device,
        dtype=replay.dtype,
        deterministic=replay.deterministic,
    )
    try:
        with _threads(replay.threads):
            (card,) = engine.load()
            _check_kind(card, replay.question)
            row = engine.encode(card.key, replay.question, replay.truncate)
            key = card.batch_key(replay.sampling)
            (scores,) = engine.run_batch([BatchRow(key, row)], lambda _place: True).rows
        if scores is None:  # only of a row that nobody wants
            raise AssertionError("the engine left out a row that was wanted")
        return Recomputed(card, scores, row.truncated, engine.mask_set(key))
    except (AdapterLoadError, DalorraError, RowRejectedError) as error:
        raise ReplayError(str(error)) from None
    finally:
        engine.close()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while: how a sum is divided decides its last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_kind(card: AdapterCard, question: Question) -> None:
    if (card.kind == "choice") != isinstance(question, ChoiceQuestion):
        wanted = "--text TEXT" if card.kind == "text" else "--row JSON with question and choices"
        raise ReplayError(f"adapter {card.name} answers {card.kind} input: give {wanted}")


def _directories(place: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in place.iterdir() if path.is_dir())
    except OSError as error:
        raise ReplayError(f"adapter: {place} cannot be read: {error.strerror}") from None


def _identity(directory: Path) -> tuple[str, str] | None:
    """Return revision and manifest digest as a manifest states them; None where there is none."""
    try:
        values = json.loads((directory / MANIFEST_FILE).read_bytes())
        return values["files"][ADAPTER_FILE][:_REVISION_CHARS], str(values["manifest_sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
