"""Derivatives of the label logits in the outputs of the adapted layers, one row at a time.

One forward pass and C backward passes for a batch; the rows of a batch do not mix, so the sum of
one logit over the rows has each row's own derivative.

All C derivatives of a batch are held at once, so what bounds a batch here is memory, counted in
bytes for each of its tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from dalorra_core.adapters.gradients import LabelGradients, ModuleGradients
from dalorra_core.adapters.inject import LM_HEAD, num_layers_of
from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate
from dalorra_core.errors import ConfigError, RowMemoryError
from dalorra_core.predictive.forward import LabelModel, positions_up_to
from dalorra_core.predictive.scoring import plan_chunks
from dalorra_core.predictive.trunk import RowStates

__all__ = [
    "CHUNK_BYTES",
    "GPU_CHUNK_BYTES",
    "MOST_ROW_BYTES",
    "bytes_per_token",
    "label_gradients",
    "label_gradients_of_rows",
]

CHUNK_BYTES = 2**28
"""Memory that the gradients of one chunk of rows may take; one row always goes through."""

GPU_CHUNK_BYTES = 2**31
"""The same on a GPU, which needs more rows at a time to be busy."""

MOST_ROW_BYTES = 2**33
"""Memory that the gradients of one row may take; a row that would take more is refused."""

_HIDDEN_WIDE_PER_LAYER = 24
"""Tensors of the hidden width that the graph of one decoder layer keeps for a token, at most.

Those of Llama keep 13 with an MLP 2.7 times as wide and 17 with one 4 times as wide, and up to 21
where attention weights are kept too.
"""


def bytes_per_token(model: LabelModel, modules: Sequence[str]) -> int:
    """Return about what the gradients of one token take in memory, in bytes.

    C derivatives in each module's output, the module's input, and what the backward passes need of
    the decoder's layers.

    Args:
        model: The adapted model.
        modules: See ``label_gradients``.
    """
    labels, hidden = model.head.weight.shape
    numbers = 0
    for name in modules:
        layer = None if name == LM_HEAD else model.trunk.model.get_submodule(name)
        if isinstance(layer, AdaptedLinear):
            numbers += labels * layer.base.out_features + layer.base.in_features
        else:
            numbers += labels * labels + hidden
    if any(name != LM_HEAD for name in modules):
        numbers += num_layers_of(model.trunk.model) * _HIDDEN_WIDE_PER_LAYER * hidden
    return numbers * torch.float32.itemsize


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


def label_gradients_of_rows(  # noqa: PLR0913  options by name
    model: LabelModel,
    pack: SamplePack,
    rows: Sequence[EncodedExample],
    *,
    modules: Sequence[str],
    max_padded_tokens: int,
    wanted: Callable[[int], bool] | None = None,
    stems: RowStates | None = None,
) -> Iterator[tuple[list[int], LabelGradients]]:
    """Yield the gradients of many rows, chunk by chunk: (places of the rows, their gradients).

    Args:
        model: The adapted model.
        pack: One function (M = 1) on the model's device.
        rows: Encoded rows; shorter ones come first.
        modules: See ``label_gradients``.
        max_padded_tokens: Tokens of one forward pass; a chunk has fewer where its gradients would
            take more than ``CHUNK_BYTES``, on a GPU ``GPU_CHUNK_BYTES``.
        wanted: Asked before every chunk for the rows in it; those that are not wanted are left out.
        stems: The rows' states below the first adapted layer, where they are known.

    Raises:
        RowMemoryError: The gradients of a row alone would take more than ``MOST_ROW_BYTES``.
    """
    lengths = [len(row.token_ids) for row in rows]
    each = bytes_per_token(model, modules)
    budget = CHUNK_BYTES if model.head.weight.device.type == "cpu" else GPU_CHUNK_BYTES
    limit = min(max_padded_tokens, max(1, budget // each))
    for chunk, _ in plan_chunks(lengths, 1, limit):
        places = [i for i in chunk if wanted is None or wanted(i)]
        if not places:
            continue
        longest = max(lengths[i] for i in places)
        if longest * each > MOST_ROW_BYTES:
            raise RowMemoryError(
                f"the gradients of {model.num_labels} labels for a prompt of {longest} tokens "
                f"would take about {longest * each} bytes; the limit is {MOST_ROW_BYTES}. Shorten "
                "it, or fit the method with subset last_layer"
            )
        batch = collate([rows[i] for i in places], num_labels=model.num_labels)
        if stems is not None:
            batch = replace(batch, stem=stems.of(places))
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
        states = model.trunk.states(
            batch.input_ids, (pack,), (len(rows),), None, model.known(batch)
        )
    hidden = states[rows, batch.last_index]  # (B, d)
    offset = torch.zeros(len(rows), model.num_labels, device=hidden.device, requires_grad=True)
    logits = model.head(hidden, pack, offset)  # (B, C)
    offsets = {name: probe.offset for name, probe in probes.items()}
    is_token = positions_up_to(batch.last_index, batch.input_ids.shape[1])  # (B, T)
    inputs_of = _masked_inputs(probes, is_token)
    found = {name: (inputs_of[name], is_token) for name in probes}
    if LM_HEAD in wanted:
        offsets[LM_HEAD] = offset
        found[LM_HEAD] = (hidden.detach().unsqueeze(1).float(), torch.ones_like(is_token[:, :1]))
    points = [offsets[name] for name in found]
    per_label = [
        list(torch.autograd.grad(logits[:, c].sum(), points, retain_graph=True))
        for c in range(model.num_labels)
    ]
    modules = {}
    for name, (inputs, is_own) in found.items():
        outputs = torch.stack([gradients.pop(0) for gradients in per_label]).float()
        shape = (model.num_labels, *inputs.shape[:2], -1)
        modules[name] = ModuleGradients(inputs, outputs.view(shape), is_own)
    return LabelGradients(logits.detach(), batch.allowed, modules)


def _masked_inputs(probes: Mapping[str, _Probe], is_token: Tensor) -> dict[str, Tensor]:
    """Return what each module read, float32, zero for padding; one tensor where several read it."""
    shared: dict[tuple[int, torch.Size], Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, probe in probes.items():
        key = (probe.inputs.data_ptr(), probe.inputs.shape)  # such as q_proj's and v_proj's
        if key not in shared:
            shared[key] = (probe.inputs * is_token.unsqueeze(-1)).float()
        found[name] = shared[key]
    return found
