"""Logits of the label tokens only, from the last hidden state, in float32.

No tensor of (tokens x vocabulary) is ever made: training and prediction need C rows of the output
projection at one position. The full-vocabulary product over the last position alone serves the
``label_mass`` diagnostic, which training never sees.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dalorra_core.adapters.inject import LM_HEAD, TargetSpec, lm_head_of
from dalorra_core.adapters.linear import low_rank_delta
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.errors import BaseModelError

__all__ = ["LabelHead"]

_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 0.15}
"""Largest difference to the model's own logits, relative to their largest magnitude."""


class LabelHead(nn.Module):
    """The C label rows of a frozen output projection, plus the rows' own low-rank adapter."""

    weight: Tensor
    token_ids: Tensor

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__()
        head = lm_head_of(model)
        if not all(0 <= token < head.out_features for token in token_ids):
            raise BaseModelError(
                f"label tokens must lie in 0..{head.out_features - 1} for this base model, "
                f"got {min(token_ids)} to {max(token_ids)}"
            )
        ids = torch.tensor(token_ids, dtype=torch.int64, device=head.weight.device)
        self.register_buffer("token_ids", ids, persistent=False)
        self.register_buffer("weight", head.weight.detach()[ids].float(), persistent=False)
        self.bias = None if head.bias is None else head.bias.detach()[ids].float()
        self._dtype = head.weight.dtype
        self._vocabulary = [head]  # a list keeps the shared module out of this one's own tree
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)

    def forward(
        self, hidden: Tensor, pack: SamplePack | None, offset: Tensor | None = None
    ) -> Tensor:
        """Return label logits.

        Args:
            hidden: Last hidden states (M*B, d), row m*B + b, any float dtype.
            pack: The pack bound in the trunk; its ``lm_head`` module is applied here.
            offset: (M*B, C) added to the projection's output, where a derivative in it is wanted.

        Returns:
            (M*B, C), float32.
        """
        h = hidden.float()
        with torch.autocast(h.device.type, enabled=False):  # float32 whatever the trunk runs in
            logits = nn.functional.linear(h, self.weight, self.bias)  # (M*B, C)
            if pack is not None and LM_HEAD in pack.modules:
                module = pack.modules[LM_HEAD]
                logits = logits + low_rank_delta(h, module, pack.num_samples, pack.scaling)
        return self.cap(logits if offset is None else logits + offset)

    def gate_parts(self, hidden: Tensor, pack: SamplePack) -> tuple[Tensor, Tensor]:
        """Return what the logits are made of, before any cap: their sum is linear in the gates.

        Args:
            hidden: Last hidden states (M*B, d), row m*B + b, any float dtype.
            pack: M samples whose ``lm_head`` module has gates; their values do not matter.

        Returns:
            The logits with every gate off (M*B, C), and what each gate adds to them (M*B, r, C),
            float32.
        """
        module, m = pack.modules[LM_HEAD], pack.num_samples
        rank = module.lora_A.shape[1]
        h = hidden.float()
        with torch.autocast(h.device.type, enabled=False):
            off = nn.functional.linear(h, self.weight, self.bias)  # (M*B, C)
            alone = torch.eye(rank, device=h.device).unsqueeze(1).expand(-1, m, -1)  # (r, M, r)
            parts = [
                low_rank_delta(h, replace(module, z=z), m, pack.scaling) for z in alone
            ]  # (M*B, C) each
        return off, torch.stack(parts, dim=1)

    def vocabulary(self, hidden: Tensor) -> Tensor:
        """Return the logits of the frozen output projection, the same for every adapter.

        Args:
            hidden: Last hidden states (N, d).

        Returns:
            (N, V), float32, fresh.
        """
        head = self._vocabulary[0]
        return self.cap(head(hidden.to(self._dtype)).float())

    def label_mass(self, full: Tensor, label_logits: Tensor) -> Tensor:
        """Return the probability of the label tokens under the full vocabulary.

        Args:
            full: What ``vocabulary`` gave, (..., V); its label columns are written over.
            label_logits: What ``forward`` gave for the same rows, (..., C).

        Returns:
            (...) in [0, 1].
        """
        full[..., self.token_ids] = label_logits  # the adapted rows in place of the frozen ones
        return (label_logits.logsumexp(-1) - full.logsumexp(-1)).exp()

    def cap(self, logits: Tensor) -> Tensor:
        """Return logits as the model caps them; the very same where it does not."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def check_adapter(self, specs: Sequence[TargetSpec]) -> None:
        """Refuse an ``lm_head`` adapter that is not of these label rows.

        Raises:
            BaseModelError: Naming both shapes.
        """
        labels, width = self.weight.shape
        for spec in specs:
            if spec.name == LM_HEAD and (spec.d_in, spec.d_out) != (width, labels):
                raise BaseModelError(
                    f"the output projection has {labels} label rows of width {width}, the "
                    f"adapter's {LM_HEAD} has {spec.d_out} of width {spec.d_in}"
                )

    @torch.no_grad()
    def check_against(self, model: nn.Module, decoder: nn.Module) -> None:
        """Refuse a model whose own logits this head does not reproduce.

        Some families transform logits after the projection (scaling, capping). Comparing one
        forward without any adapter finds every such case, known or not.

        Raises:
            BaseModelError: Naming the difference and its limit.
        """
        ids = torch.tensor([[1, 2, 3]], device=self.weight.device)
        own = model(input_ids=ids, use_cache=False).logits[0, -1, self.token_ids].float()
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        ours = self.forward(hidden, None)[0]
        limit = _CHECK_TOLERANCE.get(hidden.dtype, 0.15) * float(own.abs().max().clamp_min(1.0))
        difference = float((own - ours).abs().max())
        if not difference <= limit:
            raise BaseModelError(
                f"{type(model).__name__} changes its logits after the output projection in a way "
                f"this program does not know: label logits differ by {difference:.3g}, "
                f"the limit is {limit:.3g}"
            )
