"""Keep probabilities of the gates for given rows: how they react to an input, familiar or not."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dalorra_core.adapters.pack import ModulePack, SamplePack
from dalorra_core.config import MethodSettings
from dalorra_core.data.collate import EncodedExample, collate
from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import DalorraConfig
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.scoring import plan_chunks

__all__ = ["gate_entropy", "gate_probs", "independent_gates"]


@runtime_checkable
class _GatingCore(Protocol):
    def keep_probs(self) -> Tensor: ...


@torch.inference_mode()
def gate_probs(
    model: LabelModel, pack: SamplePack, rows: Sequence[EncodedExample], *, max_padded_tokens: int
) -> Tensor:
    """Return the keep probabilities of all gates for each row, (n, L, r), on the CPU.

    Gates of each token are averaged over the row's tokens. Gates that do not look at the input are
    the same in every row.

    Args:
        model: The adapted model.
        pack: ``mean_pack`` of a method with gates, on the model's device.
        rows: At least one encoded row.
        max_padded_tokens: Tokens of one forward pass.

    Raises:
        ConfigError: A module of the pack has no gates.
    """
    lengths = [len(row.token_ids) for row in rows]
    found: dict[int, Tensor] = {}
    for chunk, _ in plan_chunks(lengths, 1, max_padded_tokens):
        batch = collate([rows[i] for i in chunk], num_labels=model.num_labels)
        batch = batch.to(model.head.weight.device)
        settled = model.settled(pack, batch)
        if any(module.core is not None for module in settled.modules.values()):
            model(batch, settled)  # the gates are read on the way
        of_modules = [_of_rows(m, len(chunk)) for m in settled.modules.values()]
        found |= zip(chunk, torch.stack(of_modules, dim=1).cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])


def _of_rows(module: ModulePack, num_rows: int) -> Tensor:
    """Return the keep probabilities of one module, (B, r)."""
    if isinstance(module.core, _GatingCore):
        return module.core.keep_probs()
    if module.z is None:
        raise ConfigError("keep probabilities are asked for, but this method has no gates")
    return module.z[0].expand(num_rows, -1)


def gate_entropy(keep_probs: Tensor) -> Tensor:
    """Return the mean entropy of the gates of each row, in nats, 0 to ln 2; higher is less sure.

    Args:
        keep_probs: (n, L, r) in [0, 1].

    Returns:
        (n,), float64.
    """
    p = keep_probs.double()
    entropy = torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy.mean((1, 2))


def independent_gates(config: MethodSettings, mean_pack: SamplePack) -> Mapping[str, Tensor]:
    """Return the keep probabilities of gates that are independent of each other, by module, (r,).

    Estimators that use the posterior's formula instead of its samples need these: hard gates, each
    on with its own probability whatever the others and the question are.

    Args:
        config: The method's settings.
        mean_pack: Its ``mean_pack``.

    Raises:
        ConfigError: The method's posterior is another one.
    """
    if not isinstance(config, DalorraConfig) or config.test_masks != "hard":
        raise ConfigError(
            "this estimator needs the independent hard gates of method dalorra with test_masks "
            f"hard, got method {config.name}"
        )
    return {name: m.z[0] for name, m in mean_pack.modules.items() if m.z is not None}
