"""Run many rows through the fused forward in chunks of bounded size."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.errors import ConfigError
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel, PackedRows, begun_together, forward_together
from dalorra_core.predictive.trunk import RowStates

__all__ = [
    "Prediction",
    "RowsToScore",
    "joined",
    "padded_token_limit",
    "plan_chunks",
    "plan_runs",
    "score_rows",
    "score_together",
]


@dataclass(frozen=True)
class Prediction:
    """The answer of M samples for B rows, on the CPU.

    Attributes:
        log_probs: (M, B, C) float32, normalised over each row's labels; -inf where not allowed.
        label_mass: (B,) probability of the label tokens under the full vocabulary, mean over M;
            None when it was not asked for.
        answered: (B,) bool, False for rows that were left out because nobody wanted them any more;
            their numbers are NaN. None stands for all True.
    """

    log_probs: Tensor
    label_mass: Tensor | None
    answered: Tensor | None = None

    @property
    def answered_rows(self) -> list[int]:
        """Places of the rows that were answered, in order."""
        if self.answered is None:
            return list(range(self.log_probs.shape[1]))
        return [int(i) for i in self.answered.nonzero()]

    def of_answered(self) -> "Prediction":
        """Return the rows that were answered, as a prediction of their own."""
        if self.answered is None or bool(self.answered.all()):
            return self
        mass = None if self.label_mass is None else self.label_mass[self.answered]
        return Prediction(self.log_probs[:, self.answered], mass)


def joined(parts: Sequence[Prediction]) -> Prediction:
    """Return the rows of several predictions of the same M as one, in order."""
    masses = [part.label_mass for part in parts if part.label_mass is not None]
    answered = [_answered(part) for part in parts]
    return Prediction(
        torch.cat([part.log_probs for part in parts], dim=1),
        torch.cat(masses) if masses else None,
        torch.cat(answered),
    )


def _answered(prediction: Prediction) -> Tensor:
    if prediction.answered is not None:
        return prediction.answered
    return torch.ones(prediction.log_probs.shape[1], dtype=torch.bool)


def padded_token_limit(device: torch.device) -> int:
    """Return how many padded tokens (M * B * T) one forward pass takes at most.

    On a CPU the activations of a larger pass leave the caches: SmolLM2-135M in float32 ran twice
    as fast at 128 to 512 tokens as at 2,048 (docs/results.md). On a GPU the limit bounds memory.
    """
    return 512 if device.type == "cpu" else 65536


def plan_chunks(
    lengths: Sequence[int], num_samples: int, max_padded_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Cut rows into forward passes of similar length.

    Args:
        lengths: Tokens of each row.
        num_samples: M.
        max_padded_tokens: Limit on M * rows * longest; one sample of one row always goes through.

    Yields:
        (row indices, samples per pass): every index once, shortest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    start = 0
    while start < len(order):
        stop = start + 1
        while (
            stop < len(order)
            and (stop + 1 - start) * lengths[order[stop]] * num_samples <= max_padded_tokens
        ):
            stop += 1
        rows = order[start:stop]
        per_sample = len(rows) * lengths[rows[-1]]
        passes = -(-num_samples // max(1, max_padded_tokens // per_sample))
        yield rows, -(-num_samples // passes)  # samples spread evenly over the passes
        start = stop


def plan_runs(
    lengths: Sequence[int], num_samples: int, max_padded_tokens: int
) -> Iterator[list[tuple[list[int], int]]]:
    """Group the chunks of ``plan_chunks`` into runs whose rows fit into one pass of one sample.

    What all samples share is computed for the rows of a run at once, as one pass.

    Args:
        lengths: Tokens of each row.
        num_samples: M.
        max_padded_tokens: Limit on rows * longest; one chunk always goes through.

    Yields:
        Chunks, every one of ``plan_chunks`` once and in its order.
    """
    run: list[tuple[list[int], int]] = []
    count = 0
    for chunk in plan_chunks(lengths, num_samples, max_padded_tokens):
        rows, _ = chunk
        if run and (count + len(rows)) * lengths[rows[-1]] > max_padded_tokens:
            yield run
            run, count = [], 0
        run.append(chunk)
        count += len(rows)
    if run:
        yield run


@dataclass(frozen=True)
class RowsToScore:
    """Rows that one adapter answers with one pack.

    Attributes:
        model: The adapted model.
        pack: M samples, on the model's device.
        rows: At least one encoded row.
        stems: The rows' states below the first adapted layer, where they are known; used when one
            adapter has a pass for itself.
    """

    model: LabelModel
    pack: SamplePack
    rows: Sequence[EncodedExample]
    stems: RowStates | None = None


def score_rows(  # noqa: PLR0913  one call says all that decides the answer
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    num_labels: int,
    max_padded_tokens: int,
    label_mass: bool = False,
    on_progress: Callable[[int], None] | None = None,
    wanted: Callable[[int], bool] | None = None,
    stems: RowStates | None = None,
) -> Prediction:
    """Return the label log-probabilities of every sample for every row, in the rows' order.

    Args:
        model: The adapted model.
        pack: M samples, on the model's device.
        rows: At least one encoded row.
        num_labels: C.
        max_padded_tokens: Size of one forward pass.
        label_mass: Also compute that diagnostic.
        on_progress: Called with the number of rows finished since the last call.
        wanted: See ``score_together``.
        stems: See ``RowsToScore``.
    """
    if num_labels != model.num_labels:
        raise ConfigError(f"num_labels must be the model's {model.num_labels}, got {num_labels}")
    (found,) = score_together(
        (RowsToScore(model, pack, rows, stems),),
        max_padded_tokens=max_padded_tokens,
        label_mass=label_mass,
        on_progress=on_progress,
        wanted=wanted,
    )
    return found


@torch.inference_mode()
def score_together(
    groups: Sequence[RowsToScore],
    *,
    max_padded_tokens: int,
    label_mass: bool = False,
    on_progress: Callable[[int], None] | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> list[Prediction]:
    """Return the answers of several adapters' rows, which share forward passes.

    Args:
        groups: At least one; all of one base model in memory, with equal M.
        max_padded_tokens: Size of one forward pass.
        label_mass: Also compute that diagnostic.
        on_progress: Called with the number of rows finished since the last call.
        wanted: Asked before every forward pass for the rows in it, by their place among all rows
            (those of the first group first). A row that is not wanted before the layers that all
            samples share, or before the first pass of its chunk, is left out; the rest of a chunk
            is left out when none of its rows is wanted.

    Returns:
        One for each group, in order; ``Prediction.answered`` says what was left out.

    Raises:
        ConfigError: The groups do not share a base model or M.
    """
    m = groups[0].pack.num_samples
    stops = accumulate(len(group.rows) for group in groups)
    sheets = [
        _Sheet.blank(group, stop - len(group.rows), label_mass=label_mass)
        for group, stop in zip(groups, stops, strict=True)
    ]
    lengths = [len(row.token_ids) for group in groups for row in group.rows]
    ask = wanted if wanted is not None else _always
    for run in plan_runs(lengths, m, max_padded_tokens):
        kept = {n: None for chunk, _ in run for n in chunk if ask(n)}
        parts = [_Part.of(sheet, own) for sheet in sheets if (own := sheet.own(kept))]
        if parts and (len(run) > 1 or run[0][1] < m):
            parts = _begun(parts)
        for number, (chunk, step) in enumerate(run):
            still = [n for n in chunk if n in kept and (number == 0 or ask(n))]
            now = [part.picked(own) for part in parts if (own := part.sheet.own(still))]
            if now:
                _run_chunk(now, step, ask, label_mass=label_mass)
            if on_progress is not None:
                on_progress(len(chunk))
    return [sheet.prediction() for sheet in sheets]


def _always(_: int) -> bool:
    return True


@dataclass(frozen=True)
class _Sheet:
    """Where the answers of one group are written down."""

    group: RowsToScore
    start: int  # place of the group's first row among all rows
    log_probs: Tensor  # (M, B_g, C)
    mass: Tensor | None  # (B_g,), sum over samples
    answered: Tensor  # (B_g,)

    @classmethod
    def blank(cls, group: RowsToScore, start: int, *, label_mass: bool) -> Self:
        m, rows = group.pack.num_samples, len(group.rows)
        return cls(
            group,
            start,
            torch.empty(m, rows, group.model.num_labels),
            torch.zeros(rows, dtype=torch.float64) if label_mass else None,
            torch.zeros(rows, dtype=torch.bool),
        )

    def own(self, places: Iterable[int]) -> list[int]:
        """Return the places that are of this group's rows."""
        return [n for n in places if self.start <= n < self.start + len(self.group.rows)]

    def prediction(self) -> Prediction:
        m = self.group.pack.num_samples
        mass = None if self.mass is None else (self.mass / m).float()
        if not bool(self.answered.all()):
            self.log_probs[:, ~self.answered] = math.nan
            if mass is not None:
                mass[~self.answered] = math.nan
        return Prediction(self.log_probs, mass, self.answered)


@dataclass(frozen=True)
class _Part:
    """One group's rows in a run of chunks, or in one of them."""

    sheet: _Sheet
    places: list[int]  # among all rows
    batch: TokenBatch

    @classmethod
    def of(cls, sheet: _Sheet, places: list[int]) -> Self:
        group, rows = sheet.group, [n - sheet.start for n in places]
        batch = collate([group.rows[i] for i in rows], num_labels=group.model.num_labels)
        if group.stems is not None:
            batch = replace(batch, stem=group.stems.of(rows))
        return cls(sheet, places, batch.to(group.model.head.weight.device))

    @property
    def rows(self) -> list[int]:
        """Places among the rows of the group."""
        return [n - self.sheet.start for n in self.places]

    def picked(self, kept: Collection[int]) -> Self:
        """Return the part without the rows whose places are not among these."""
        index = [i for i, n in enumerate(self.places) if n in kept]
        if len(index) == len(self.places):
            return self
        part = replace(self, places=[self.places[i] for i in index])
        longest = max(len(self.sheet.group.rows[i].token_ids) for i in part.rows)
        return replace(part, batch=self.batch.picked(index, longest))

    def with_pack(self, start: int, stop: int) -> PackedRows:
        """Return the rows with samples ``start`` to ``stop - 1``."""
        group = self.sheet.group
        whole = stop - start == group.pack.num_samples
        pack = group.pack if whole else group.pack.narrow(start, stop)
        return PackedRows(group.model, pack, self.batch)


def _begun(parts: Sequence[_Part]) -> list[_Part]:
    """Return the parts with the states that their samples share, for several passes."""
    m = parts[0].sheet.group.pack.num_samples
    batches = begun_together([part.with_pack(0, m) for part in parts])
    return [replace(part, batch=batch) for part, batch in zip(parts, batches, strict=True)]


def _run_chunk(
    parts: Sequence[_Part], step: int, ask: Callable[[int], bool], *, label_mass: bool
) -> None:
    """Run all samples of a chunk, so many at a time, and write the answers down.

    The rest is left out as soon as none of the rows is wanted.
    """
    m = parts[0].sheet.group.pack.num_samples
    for start in range(0, m, step):
        if start > 0 and not any(ask(n) for part in parts for n in part.places):
            return
        _run_pass(parts, start, min(start + step, m), label_mass=label_mass)
    for part in parts:
        part.sheet.answered[part.rows] = True


def _run_pass(parts: Sequence[_Part], start: int, stop: int, *, label_mass: bool) -> None:
    """Run samples ``start`` to ``stop - 1`` of a chunk and write the answers down."""
    found = forward_together([part.with_pack(start, stop) for part in parts], label_mass=label_mass)
    for part, out in zip(parts, found, strict=True):
        sheet = part.sheet
        sheet.log_probs[start:stop, part.rows] = label_log_probs(
            out.logits, part.batch.allowed
        ).cpu()
        if sheet.mass is not None and out.label_mass is not None:
            sheet.mass[part.rows] += out.label_mass.double().sum(0).cpu()
