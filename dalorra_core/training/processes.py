"""Several processes that train one adapter: who computes which rows, and how gradients meet.

The rows of a micro-batch are shared out and the gradients added up, once for each optimiser step;
everything else of a step is computed alike by all. See docs/decisions/0029.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save
from torch import Tensor, distributed

from dalorra_core.errors import ConfigError, DalorraError

__all__ = ["PATIENCE", "Processes", "Share", "is_first_process"]

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others, such as for the first one's evaluation."""

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def is_first_process() -> bool:
    """Return whether this process is the one that writes and reports."""
    return bool(PartialState().is_main_process)


@dataclass(frozen=True)
class Share:
    """One process's rows of a micro-batch.

    Attributes:
        rows: Which ones; never none.
        weight: Their part of the micro-batch: those of all processes sum to 1. 0 where there are
            more processes than rows: what such a process computes does not count.
    """

    rows: slice
    weight: float


@dataclass(frozen=True)
class Processes:
    """This process and its companions, each with a copy of the adapter.

    Attributes:
        rank: Number of this process, from 0.
        count: How many there are.
    """

    rank: int
    count: int

    @classmethod
    def of(cls, accelerator: Accelerator) -> "Processes":
        """Return what the launcher set up.

        Raises:
            ConfigError: The launcher asks for something else than copies of the model.
        """
        kind = accelerator.distributed_type
        if kind not in _PLAIN:
            raise ConfigError(
                "training runs in processes with the whole model, or with run.shard_base: the "
                f"launcher must ask for plain processes on CPUs or GPUs, got {kind.value}"
            )
        return cls(accelerator.process_index, accelerator.num_processes)

    def share(self, num_rows: int) -> Share:
        """Return this process's part of a micro-batch; parts differ by at most one row.

        Args:
            num_rows: Rows of the micro-batch, at least 1.

        Example:
            >>> Processes(1, 2).share(5)
            Share(rows=slice(2, 5, None), weight=0.6)
        """
        start = num_rows * self.rank // self.count
        stop = num_rows * (self.rank + 1) // self.count
        if start == stop:
            return Share(slice(0, 1), 0.0)
        return Share(slice(start, stop), (stop - start) / num_rows)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; changes ``tensors``.

        All processes get the very same bits. They must pass tensors of the same shapes in the same
        order; all of them travel in one message.

        Raises:
            DalorraError: Another process is gone.
        """
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([t.detach().flatten() for t in tensors])
        with self._together():
            distributed.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def total(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """Return the sum of every value over the processes.

        Args:
            values: The same names in every process.
            device: Where the processes' messages come from.
        """
        if self.count == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float32, device=device)
        self.add_up([sums])
        return dict(zip(values, sums.tolist(), strict=True))

    def check_alike(
        self, identity: Mapping[str, Any], step: int, params: Mapping[str, Tensor]
    ) -> None:
        """Refuse to begin where the processes do not have the same run before them.

        Args:
            identity: Settings, rows and base model, as JSON values.
            step: Optimiser steps that are done.
            params: The adapter's parameters.

        Raises:
            ConfigError: In every process, naming what differs.
        """
        if self.count == 1:
            return
        stored = {name: value.detach().cpu().contiguous() for name, value in params.items()}
        digest = hashlib.sha256(save(stored)).hexdigest()
        self.check_same({**identity, "step": step, "parameters": digest})

    def check_same(self, own: Mapping[str, Any]) -> None:
        """Refuse to go on where the processes differ in some value.

        Args:
            own: This process's values by name, as JSON values.

        Raises:
            ConfigError: In every process, naming what differs.
        """
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        with self._together():
            distributed.all_gather_object(found, own)
        differing = sorted(
            {key for other in found for key in own if other.get(key) != found[0].get(key)}
        )
        if differing:
            raise ConfigError(
                f"the {self.count} processes must train one run: they differ in "
                f"{', '.join(differing)}. Settings, rows and the base model must be the same "
                "everywhere, and a run directory with checkpoints one that all of them see"
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise DalorraError(
                f"process {self.rank} of {self.count} lost another one ({reason}). What that one "
                "said comes first; --resume goes on from the last checkpoint"
            ) from error
