"""One base model in memory, and who it is; any number of adapters may stand on it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch

from dalorra_core.adapters.inject import decoder_of
from dalorra_core.base_models.fingerprint import fingerprint
from dalorra_core.base_models.loading import load_model, load_tokenizer, pick_device, pick_dtype
from dalorra_core.base_models.packed import pack_linears
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.predictive.lean_layers import make_lean
from dalorra_core.predictive.matching import BaseIdentity, tokenizer_sha256
from dalorra_core.predictive.memory import tokens_within
from dalorra_core.predictive.pass_size import tried_tokens
from dalorra_core.predictive.scoring import padded_token_limit
from dalorra_core.predictive.trunk import Trunk

__all__ = ["SharedBase", "identify"]


def identify(base: str | Path) -> BaseIdentity:
    """Return who a base model is, from its files alone; fetches a known one the first time.

    Args:
        base: Directory, hub id or alias.

    Raises:
        BaseModelError: It cannot be found or read.
    """
    directory = resolve_base_model(base)
    return BaseIdentity(directory, fingerprint(directory), tokenizer_sha256(directory))


@dataclass(frozen=True, eq=False)
class SharedBase:
    """A base model that is loaded once, whatever number of adapters it has.

    Attributes:
        identity: Directory and hashes.
        trunk: The model, its adapted layers and whose turn it is.
        tokenizer: Its tokenizer; used by several threads at once.
        device: Where the model is.
        dtype: Its precision.
        pass_tokens: Padded tokens (M * B * T) of one forward pass at most; one sample of one row
            always goes through.
    """

    identity: BaseIdentity
    trunk: Trunk
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    pass_tokens: int

    @classmethod
    def load(  # noqa: PLR0913  each a setting
        cls,
        identity: BaseIdentity,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: Literal["sdpa", "eager"] = "sdpa",
        pass_memory_mb: int | None = None,
        pass_tokens: int | Literal["auto"] | None = None,
        packed: bool = False,
        sharded: bool = False,
    ) -> Self:
        """Load a base model and its tokenizer.

        Args:
            identity: From ``identify``.
            device: auto, cpu, cuda or cuda:N.
            dtype: auto, float32 or bfloat16.
            attention: sdpa or eager.
            pass_memory_mb: MiB that the activations of a forward pass may take; None leaves its
                size to the device.
            pass_tokens: Padded tokens (M * B * T) of a forward pass, where that is smaller; None
                leaves it to the device. auto tries several sizes on a CPU, in some 3 seconds:
                answers then differ from start to start, in what rounding allows.
            packed: For inference alone: linear layers as ``pack_linears`` makes them, layers of the
                decoder as ``make_lean`` does.
            sharded: Spread its layers over the processes of the group, which all have to call this.

        Raises:
            BaseModelError: If it cannot be read.
            ConfigError: If the device or the precision is not to be had.
        """
        where = pick_device(device)
        load = load_model
        if sharded:
            from dalorra_core.predictive.sharded_base import (  # noqa: PLC0415  slow to import
                load_sharded as load,
            )
        model = load(identity.directory, where, pick_dtype(dtype, where), attention)
        if packed:
            pack_linears(model)
            make_lean(decoder_of(model))
        tokenizer = load_tokenizer(identity.directory)
        real: torch.dtype = next(model.parameters()).dtype
        trunk, most = Trunk(model, sharded=sharded), padded_token_limit(where)
        if isinstance(pass_tokens, int):
            most = pass_tokens
        elif pass_tokens is not None and where.type == "cpu":
            most = tried_tokens(trunk, most)
        if pass_memory_mb is not None:
            most = min(most, tokens_within(model, pass_memory_mb))
        return cls(identity, trunk, tokenizer, where, real, most)
