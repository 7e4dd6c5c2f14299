"""Derivatives of the label logits in the outputs of the adapted layers, one row at a time.

One forward pass and C backward passes for a batch; the rows of a batch do not mix, so the sum of
one logit over the rows has each row's own derivative.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from dalorra_core.adapters.gradients import LabelGradients, ModuleGradients
from dalorra_core.adapters.inject import LM_HEAD
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.forward import LabelModel, positions_up_to
from dalorra_core.predictive.scoring import plan_chunks

__all__ = ["label_gradients", "label_gradients_of_rows"]


def label_gradients(
    model: LabelModel, pack: SamplePack, batch: TokenBatch, modules: Sequence[str]
) -> LabelGradients:
    """Return the label logits of one function and their derivatives.

    Holds the trunk's turn throughout.

    Args:
        model: The adapted model.
        pack: One function (M = 1) on the model's device.
        batch: B rows on the model's device, padded on the right.
        modules: Adapted modules whose derivatives are asked for, at least one; what lies below the
            first one costs no backward pass.

    Returns:
        Values without a graph; float32.

    Raises:
        ConfigError: The pack holds more than one function.
    """
    if pack.num_samples != 1:
        raise ConfigError(f"gradients are of one function, got a pack of {pack.num_samples}")
    with torch.enable_grad(), model.trunk.turns:
        return _gradients(model, model.settled(pack, batch), batch, modules)


def label_gradients_of_rows(
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    modules: Sequence[str],
    max_padded_tokens: int,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[tuple[list[int], LabelGradients]]:
    """Yield the gradients of many rows, chunk by chunk: (places of the rows, their gradients).

    Args:
        model: The adapted model.
        pack: One function (M = 1) on the model's device.
        rows: Encoded rows; shorter ones come first.
        modules: See ``label_gradients``.
        max_padded_tokens: Tokens of one chunk, whose C derivatives are held at once.
        wanted: Asked before every chunk for the rows in it; those that are not wanted are left out.
    """
    lengths = [len(row.token_ids) for row in rows]
    for chunk, _ in plan_chunks(lengths, 1, max_padded_tokens):
        places = [i for i in chunk if wanted is None or wanted(i)]
        if not places:
            continue
        batch = collate([rows[i] for i in places], num_labels=model.num_labels)
        moved = batch.to(model.head.weight.device)
        yield places, label_gradients(model, pack, moved, modules)


class _Probe:
    """Adds a zero with a gradient to a layer's output, and keeps the layer's input."""

    def __init__(self) -> None:
        self.inputs = torch.empty(0)
        self.offset = torch.empty(0)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.inputs = args[0].detach()
        self.offset = torch.zeros_like(output, requires_grad=True)
        return output + self.offset


def _gradients(
    model: LabelModel, pack: SamplePack, batch: TokenBatch, wanted: Sequence[str]
) -> LabelGradients:
    rows = torch.arange(len(batch.last_index), device=batch.last_index.device)
    probes = {name: _Probe() for name in wanted if name != LM_HEAD}
    with ExitStack() as hooks:
        for name, probe in probes.items():
            layer = model.trunk.model.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(probe))
        states = model.trunk.states(batch.input_ids, (pack,), (len(rows),), None)
    hidden = states[rows, batch.last_index]  # (B, d)
    offset = torch.zeros(len(rows), model.num_labels, device=hidden.device, requires_grad=True)
    logits = model.head(hidden, pack, offset)  # (B, C)
    offsets = {name: probe.offset for name, probe in probes.items()}
    is_token = positions_up_to(batch.last_index, batch.input_ids.shape[1])  # (B, T)
    found = {
        name: (probe.inputs * is_token.unsqueeze(-1), is_token) for name, probe in probes.items()
    }
    if LM_HEAD in wanted:
        offsets[LM_HEAD] = offset
        found[LM_HEAD] = (hidden.detach().unsqueeze(1), torch.ones_like(is_token[:, :1]))
    points = [offsets[name] for name in found]
    per_label = [
        list(torch.autograd.grad(logits[:, c].sum(), points, retain_graph=True))
        for c in range(model.num_labels)
    ]
    modules = {}
    for name, (inputs, is_own) in found.items():
        outputs = torch.stack([gradients.pop(0) for gradients in per_label]).float()
        shape = (model.num_labels, *inputs.shape[:2], -1)
        modules[name] = ModuleGradients(inputs.float(), outputs.view(shape), is_own)
    return LabelGradients(logits.detach(), batch.allowed, modules)
