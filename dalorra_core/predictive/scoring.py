"""Run many rows through the fused forward in chunks of bounded size."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import torch
from torch import Tensor

from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.errors import ConfigError
from dalorra_core.objectives.elbo import label_log_probs
from dalorra_core.predictive.forward import LabelModel, PackedRows, forward_together
from dalorra_core.predictive.trunk import RowStates

__all__ = [
    "Prediction",
    "RowsToScore",
    "joined",
    "padded_token_limit",
    "plan_chunks",
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
            (those of the first group first). A row that is not wanted before the first pass of
            its chunk is left out; the rest of a chunk is left out when none of its rows is.

    Returns:
        One for each group, in order; ``Prediction.answered`` says what was left out.

    Raises:
        ConfigError: The groups do not share a base model or M.
    """
    m = groups[0].pack.num_samples
    sheets = [_Sheet.blank(group, label_mass=label_mass) for group in groups]
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group.rows))]
    lengths = [len(groups[g].rows[i].token_ids) for g, i in places]
    ask = wanted if wanted is not None else _always
    for chunk, step in plan_chunks(lengths, m, max_padded_tokens):
        kept = sorted((n for n in chunk if ask(n)), key=lambda n: places[n][0])  # by group; stable
        parts = [
            _Part.of(sheets[g], [places[n][1] for n in own])
            for g, own in groupby(kept, key=lambda n: places[n][0])
        ]
        if step < m:  # one row, which all passes begin at the first layer where samples differ
            parts = [part.begun() for part in parts]
        for start in range(0, m, step) if parts else ():
            if start > 0 and not any(ask(n) for n in kept):
                break
            _run_pass(parts, start, min(start + step, m), label_mass=label_mass)
        else:
            for part in parts:
                part.sheet.answered[part.rows] = True
        if on_progress is not None:
            on_progress(len(chunk))
    return [sheet.prediction() for sheet in sheets]


def _always(_: int) -> bool:
    return True


@dataclass(frozen=True)
class _Sheet:
    """Where the answers of one group are written down."""

    group: RowsToScore
    log_probs: Tensor  # (M, B_g, C)
    mass: Tensor | None  # (B_g,), sum over samples
    answered: Tensor  # (B_g,)

    @classmethod
    def blank(cls, group: RowsToScore, *, label_mass: bool) -> Self:
        m, rows = group.pack.num_samples, len(group.rows)
        return cls(
            group,
            torch.empty(m, rows, group.model.num_labels),
            torch.zeros(rows, dtype=torch.float64) if label_mass else None,
            torch.zeros(rows, dtype=torch.bool),
        )

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
    """One group's rows in a chunk."""

    sheet: _Sheet
    rows: list[int]
    batch: TokenBatch

    @classmethod
    def of(cls, sheet: _Sheet, rows: list[int]) -> Self:
        group = sheet.group
        batch = collate([group.rows[i] for i in rows], num_labels=group.model.num_labels)
        if group.stems is not None:
            batch = replace(batch, stem=group.stems.of(rows))
        return cls(sheet, rows, batch.to(group.model.head.weight.device))

    def begun(self) -> Self:
        """Return the part with the states that its samples share, for several passes."""
        group = self.sheet.group
        return replace(self, batch=group.model.begun(self.batch, group.pack))


def _run_pass(parts: Sequence[_Part], start: int, stop: int, *, label_mass: bool) -> None:
    """Run samples ``start`` to ``stop - 1`` of a chunk and write the answers down."""
    packed = []
    for part in parts:
        group = part.sheet.group
        whole = stop - start == group.pack.num_samples
        pack = group.pack if whole else group.pack.narrow(start, stop)
        packed.append(PackedRows(group.model, pack, part.batch))
    found = forward_together(packed, label_mass=label_mass)
    for part, out in zip(parts, found, strict=True):
        sheet = part.sheet
        sheet.log_probs[start:stop, part.rows] = label_log_probs(
            out.logits, part.batch.allowed
        ).cpu()
        if sheet.mass is not None and out.label_mass is not None:
            sheet.mass[part.rows] += out.label_mass.double().sum(0).cpu()
