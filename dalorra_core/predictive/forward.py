"""The fused forward: M samples of B rows through the model as one batch of M*B rows.

Rows of several adapters may share it: the base model's products run once over all of them, each
adapter's low-rank parts and label head over its own rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import RowContext, SamplePack, unfold
from dalorra_core.data.collate import TokenBatch
from dalorra_core.data.labels import LabelSet
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.label_head import LabelHead
from dalorra_core.predictive.trunk import Stem, Trunk, first_adapted_layer

__all__ = [
    "LabelLogits",
    "LabelModel",
    "PackedRows",
    "begun_together",
    "forward_together",
    "last_hidden",
    "positions_up_to",
]


@dataclass(frozen=True)
class LabelLogits:
    """What one forward pass gives.

    Attributes:
        logits: (M, B, C), float32, not normalised and not masked by ``allowed``.
        label_mass: (M, B) in [0, 1], or None when it was not asked for.
    """

    logits: Tensor
    label_mass: Tensor | None


class LabelModel(nn.Module):
    """One adapter's view of a trunk: its adapted layers and a head over its label tokens.

    Holds no tensor of the adapter but the frozen label rows; packs are lent for each forward.
    """

    def __init__(self, trunk: Trunk, specs: tuple[TargetSpec, ...], label_set: LabelSet) -> None:
        super().__init__()
        self.trunk = trunk
        self.decoder = trunk.decoder
        self.head = LabelHead(trunk.model, label_set.token_ids)
        with trunk.turns:
            self.head.check_against(trunk.model, trunk.decoder)
            _ = trunk.shortens, trunk.unpads  # tried now, not under the first request
        self.head.check_adapter(specs)
        trunk.adapt(specs)
        self._layers = {spec.name: spec.layer for spec in specs}
        self.fold_layer = self._fold_layer(specs)

    @property
    def num_labels(self) -> int:
        """C."""
        return len(self.head.weight)

    def forward(
        self, batch: TokenBatch, pack: SamplePack, *, label_mass: bool = False
    ) -> LabelLogits:
        """Return the label logits of every sample for every row.

        Args:
            batch: B rows on this model's device, padded on the right.
            pack: M samples.
            label_mass: Also compute the label tokens' share of the full vocabulary.

        Source:
            docs/decisions/0002: row m*B + b is sample m of row b.
        """
        (found,) = forward_together((PackedRows(self, pack, batch),), label_mass=label_mass)
        return found

    def settled(self, pack: SamplePack, batch: TokenBatch) -> SamplePack:
        """Return the pack for these rows; the very same one where nothing in it depends on rows.

        Args:
            pack: M samples.
            batch: B rows on this model's device, padded on the right.
        """
        if pack.per_row is None:
            return pack
        is_token = positions_up_to(batch.last_index, batch.input_ids.shape[1])  # (B, T)
        embed = partial(self._mean_embedding, batch.input_ids, is_token)
        return pack.for_rows(RowContext(embed, is_token))

    @torch.no_grad()
    def _mean_embedding(self, input_ids: Tensor, is_token: Tensor) -> Tensor:
        """Return the mean input embedding of each row's tokens, (B, d) in float32."""
        embedding: nn.Module = self.trunk.model.get_input_embeddings()  # pyright: ignore
        embedded: Tensor = embedding(input_ids)  # (B, T, d)
        weight = is_token.unsqueeze(-1)
        # In float64, so that the order of the sum, which padding may change, does not show.
        return ((embedded.double() * weight).sum(1) / weight.sum(1)).float()

    def known(self, batch: TokenBatch) -> Stem | None:
        """Return what the batch brings along of the lower layers' work."""
        layer = self.fold_layer if batch.stem_layer is None else batch.stem_layer
        return None if batch.stem is None or layer is None else Stem(layer, batch.stem)

    def fold_layer_of(self, pack: SamplePack) -> int | None:
        """Return the layer at whose inputs the samples of a pack begin to differ.

        Below it every module is one function for all samples, or is not adapted. None: before the
        decoder, or where nobody knows how to begin at that layer. To be asked inside the trunk's
        turn and while nothing is bound.

        Args:
            pack: M samples, settled for their rows.
        """
        layers = getattr(self.decoder, "layers", None)
        if pack.num_samples == 1 or not isinstance(layers, nn.ModuleList):
            return self.fold_layer
        differ = [self._layers[name] for name, m in pack.modules.items() if not m.shared]
        first = min((layer for layer in differ if layer is not None), default=len(layers) - 1)
        return first if first > 0 and self.trunk.begins_at(first) else None

    def shared_depth(self, pack: SamplePack) -> float:
        """Return the share of the layers that run once for all samples of a pack, in [0, 1).

        Args:
            pack: M samples.
        """
        with self.trunk.turns:
            layer = self.fold_layer if pack.per_row is not None else self.fold_layer_of(pack)
        if layer is None:
            return 0.0
        return layer / len(list(self.decoder.get_submodule("layers").children()))

    def _fold_layer(self, specs: tuple[TargetSpec, ...]) -> int | None:
        """Return the first adapted layer, where a forward can begin there."""
        first = first_adapted_layer(self.decoder, specs)
        if first is None:
            return None
        with self.trunk.turns:
            return first if self.trunk.begins_at(first) else None


@dataclass(frozen=True)
class PackedRows:
    """Rows that one adapter answers with one pack.

    Attributes:
        model: The adapter.
        pack: Its M samples.
        batch: Its B_g rows, on the model's device.
    """

    model: LabelModel
    pack: SamplePack
    batch: TokenBatch


def forward_together(
    groups: Sequence[PackedRows], *, label_mass: bool = False
) -> tuple[LabelLogits, ...]:
    """Return the label logits of several adapters' rows, computed in one forward.

    Ranks, scalings, adapted modules and label counts may differ from group to group; an answer
    does not depend on the other groups, beyond rounding. Holds the trunk's turn throughout.

    Args:
        groups: At least one; all on one trunk, with equal M.
        label_mass: Also compute the label tokens' share of the full vocabulary.

    Returns:
        One for each group, in order.

    Raises:
        ConfigError: The groups do not share a trunk or M.
    """
    trunk, m = groups[0].model.trunk, groups[0].pack.num_samples
    if any(group.model.trunk is not trunk for group in groups):
        raise ConfigError("rows of one forward must be of adapters on one base model in memory")
    with trunk.turns:
        hidden, packs = last_hidden(groups)
        folded = hidden.flatten(0, 1)  # (M*B, d)
        full = unfold(groups[0].model.head.vocabulary(folded), m) if label_mass else None
        return tuple(
            _answers(group.model.head, pack, hidden[:, own], None if full is None else full[:, own])
            for group, pack, own in zip(groups, packs, _runs(_counts(groups)), strict=True)
        )


def begun_together(groups: Sequence[PackedRows]) -> tuple[TokenBatch, ...]:
    """Return the groups' batches with the states that all samples share, for several forwards.

    The layers below run once over the rows of all groups. The very same batches where nothing is
    shared. Holds the trunk's turn.

    Args:
        groups: See ``forward_together``.
    """
    trunk, batches = groups[0].model.trunk, tuple(group.batch for group in groups)
    with trunk.turns:
        packs = [group.model.settled(group.pack, group.batch) for group in groups]
        layer = _fold_layer(groups, packs)
        if layer is None:
            return batches
        counts = _counts(groups)
        ids = _joined([batch.input_ids for batch in batches])
        last = torch.cat([batch.last_index for batch in batches])
        states = trunk.stem(ids, layer, packs, counts, _known(groups), last).states
    return tuple(
        replace(batch, stem=states[own, : batch.input_ids.shape[1]], stem_layer=layer)
        for batch, own in zip(batches, _runs(counts), strict=True)
    )


def last_hidden(groups: Sequence[PackedRows]) -> tuple[Tensor, list[SamplePack]]:
    """Return the last hidden states and the packs for these rows; to be called inside ``turns``.

    Args:
        groups: At least one; all on one trunk, with equal M.

    Returns:
        (M, B, d), the groups' rows one after the other; the pack of each group, settled.
    """
    m, rows = groups[0].pack.num_samples, _counts(groups)
    input_ids = _joined([group.batch.input_ids for group in groups])  # (B, T)
    last = torch.cat([group.batch.last_index for group in groups]).repeat(m)  # (M*B,)
    packs = [group.model.settled(group.pack, group.batch) for group in groups]
    stem = _known(groups)
    layer = _fold_layer(groups, packs)
    trunk = groups[0].model.trunk
    return unfold(trunk.last_states(input_ids, last, packs, rows, layer, stem), m), packs


def _counts(groups: Sequence[PackedRows]) -> list[int]:
    return [len(group.batch.last_index) for group in groups]


def _answers(head: LabelHead, pack: SamplePack, hidden: Tensor, full: Tensor | None) -> LabelLogits:
    """Return one group's answers from its hidden states (M, B_g, d) and full logits."""
    logits = unfold(head(hidden.flatten(0, 1), pack), pack.num_samples)  # (M, B_g, C)
    return LabelLogits(logits, None if full is None else head.label_mass(full, logits))


def positions_up_to(last_index: Tensor, length: int) -> Tensor:
    """Return which of ``length`` positions hold tokens of rows padded on the right, (B, T) bool."""
    return torch.arange(length, device=last_index.device) <= last_index.unsqueeze(1)


def _fold_layer(groups: Sequence[PackedRows], packs: Sequence[SamplePack]) -> int | None:
    """Return the layer from which any group's samples differ; None: before the decoder."""
    pairs = zip(groups, packs, strict=True)
    layers = [group.model.fold_layer_of(pack) for group, pack in pairs]
    found = [layer for layer in layers if layer is not None]
    return min(found) if len(found) == len(layers) else None


def _known(groups: Sequence[PackedRows]) -> Stem | None:
    """Return the inputs of one layer for all rows; None unless all groups bring those along."""
    stems = [group.model.known(group.batch) for group in groups]
    known = [stem for stem in stems if stem is not None]
    if len(known) < len(stems) or len({stem.layer for stem in known}) > 1:
        return None
    return Stem(known[0].layer, _joined([stem.states for stem in known]))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the groups' token ids (B_g, T_g) or states (B_g, T_g, d) padded to the longest row."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    after = [(0, 0) * (part.ndim - 2) + (0, longest - part.shape[1]) for part in parts]
    return torch.cat([F.pad(part, pad) for part, pad in zip(parts, after, strict=True)])  # (B, ...)


def _runs(counts: Sequence[int]) -> list[slice]:
    """Return the runs of rows that groups of these sizes have."""
    stops = list(accumulate(counts))
    return [slice(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]
