"""The fused forward: M samples of B rows through the model as one batch of M*B rows."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.inject import LM_HEAD, TargetSpec, decoder_of, inject
from dalorra_core.adapters.pack import ModulePack, SamplePack, fold, unfold
from dalorra_core.data.collate import TokenBatch
from dalorra_core.data.labels import LabelSet
from dalorra_core.predictive.fork import LateFold
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
        self._late_fold = LateFold(self.decoder, specs)
        self._folds_late = self._late_fold.possible and self._agrees_with_early_fold(specs)

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
        states = self._states(batch.input_ids, pack, late=self._folds_late)  # (M*B, T, d)
        hidden = states[torch.arange(len(last), device=last.device), last]  # (M*B, d)
        logits = self.head(hidden, pack)  # (M*B, C)
        mass = unfold(self.head.label_mass(hidden, logits), m) if label_mass else None
        return LabelLogits(unfold(logits, m), mass)

    def _states(self, input_ids: Tensor, pack: SamplePack, *, late: bool) -> Tensor:
        """Return the last hidden states (M*B, T, d), folding before or inside the decoder."""
        m = pack.num_samples
        ids = input_ids if late else fold(input_ids, m)
        with self.binding.bind(pack), self._late_fold.samples(m if late else 1):
            return self.decoder(input_ids=ids, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _agrees_with_early_fold(self, specs: tuple[TargetSpec, ...]) -> bool:
        """Try both ways once, on two rows and two samples with different gates."""
        device = self.head.weight.device
        modules = {
            s.name: ModulePack(
                torch.full((1, 1, s.d_in), 0.01, device=device),
                torch.full((1, s.d_out, 1), 0.01, device=device),
                torch.tensor([[0.0], [1.0]], device=device),
            )
            for s in specs
            if s.name != LM_HEAD
        }
        pack = SamplePack(2, 1.0, modules)
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=device)
        early = self._states(ids, pack, late=False)
        try:
            late = self._states(ids, pack, late=True)
        except (RuntimeError, ValueError):  # a mask or a cache with a batch axis of its own
            return False
        return late.shape == early.shape and bool(
            torch.allclose(late.float(), early.float(), rtol=1e-2, atol=1e-2)
        )
