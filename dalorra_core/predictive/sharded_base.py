"""A base model whose decoder layers are spread over processes, for one that no device can hold.

FSDP2 keeps a part of every layer's weights in each process, gathers a layer when a pass comes to
it, forward or backward, and lets it go behind. All processes have to run the same passes through
the same layers in the same order: one that runs alone would wait for the others for ever. See
docs/decisions/0033.
"""

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.distributed.fsdp import fully_shard

from dalorra_core.adapters.inject import decoder_of
from dalorra_core.base_models.loading import load_model
from dalorra_core.errors import BaseModelError, ConfigError

__all__ = ["load_sharded", "shard_layers"]


def load_sharded(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> nn.Module:
    """Return this process's part of a base model; to be called by all processes of the group.

    The processes of a machine load one after the other: its memory holds one whole model and the
    parts of those that are done, a GPU never more than its part and one layer.

    Args:
        directory: See ``load_model``, as for the others.
        device: Where the parts are to be.
        dtype: Of the weights.
        attention: sdpa or eager.

    Raises:
        BaseModelError: It cannot be loaded, or not be spread.
        ConfigError: This torch cannot do that on a CPU.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ConfigError(
            "run.shard_base must be false on a CPU with this torch, whose FSDP2 needs a GPU: "
            f"2.7 can do it, this is {torch.__version__}"
        )
    model: nn.Module | None = None
    own_turn = get_node_local_rank(fallback_rank=distributed.get_rank())
    for turn in range(distributed.get_world_size()):
        if turn == own_turn:
            model = load_model(directory, torch.device("cpu"), dtype, attention)
            shard_layers(model, device)
        distributed.barrier()
    return cast("nn.Module", model)


def shard_layers(model: nn.Module, device: torch.device) -> None:
    """Keep this process's part of each decoder layer only, on a device; changes ``model``.

    Embeddings, output projection and the last norm stay whole: label rows and embeddings of tokens
    are looked up in them, they are often one tensor, and the larger a model, the less they count.

    Args:
        model: A frozen causal LM.
        device: Where the parts go, and what is whole.

    Raises:
        BaseModelError: Its layers are not where they are looked for, or are of several precisions.
    """
    layers: Any = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise BaseModelError(
            f"run.shard_base must be false for {type(model).__name__}: its decoder has no list of "
            "layers to spread"
        )
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for layer in layers:
        if len(kinds := {str(param.dtype) for param in layer.parameters()}) > 1:
            raise BaseModelError(
                f"run.shard_base must be false for {type(model).__name__}: weights of a layer are "
                f"gathered in one precision, it has {', '.join(sorted(kinds))}"
            )
        fully_shard(layer, mesh=mesh)
    joint = _Joint(layers)
    fully_shard(joint, mesh=mesh)
    joint(torch.empty(0, device=device))
    model.to(device)


class _Joint(nn.Module):
    """Above all layers and without weights: lets them share streams and the order of gathering.

    FSDP2 takes what is run first for the whole model. That must not be a layer.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return x
