"""The fused forward: M samples of B rows through the model as one batch of M*B rows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.inject import TargetSpec, decoder_of, inject
from dalorra_core.adapters.pack import SamplePack, fold, unfold
from dalorra_core.data.collate import TokenBatch
from dalorra_core.data.labels import LabelSet
from dalorra_core.predictive.label_head import LabelHead

__all__ = ["LabelLogits", "LabelModel"]


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
    """A frozen causal LM with adapted layers and a head over the label tokens."""

    def __init__(
        self, model: nn.Module, specs: tuple[TargetSpec, ...], label_set: LabelSet
    ) -> None:
        super().__init__()
        model.requires_grad_(requires_grad=False)
        model.eval()
        self.decoder = decoder_of(model)
        self.head = LabelHead(model, label_set.token_ids)
        self.head.check_against(model, self.decoder)
        self.binding: Binding = inject(model, specs)

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
        m = pack.num_samples
        last = batch.last_index.repeat(m)  # (M*B,)
        with self.binding.bind(pack):
            states = self.decoder(
                input_ids=fold(batch.input_ids, m), use_cache=False
            ).last_hidden_state  # (M*B, T, d)
        hidden = states[torch.arange(len(last), device=last.device), last]  # (M*B, d)
        logits = self.head(hidden, pack)  # (M*B, C)
        mass = unfold(self.head.label_mass(hidden, logits), m) if label_mass else None
        return LabelLogits(unfold(logits, m), mass)
