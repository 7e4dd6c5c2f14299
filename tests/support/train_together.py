"""One of several processes that train together: does a list of jobs, one after the other.

Started with what a launcher sets (RANK, WORLD_SIZE ...). A job is {"config", "run", "resume"} and
may have "rank_1", settings that process 1 gets in place of its own, "dies_at", the step before
which process 1 is killed, and "watched", to count what is whole in every pass. Errors are written
to RUN/error-RANK.txt, parameters to RUN/params-RANK.safetensors, and what the process holds of the
base model after the last step to RUN/base-RANK.json.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook

from dalorra_core.errors import DalorraError
from dalorra_core.training import run
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training.step import TrainStep


def main(rank: int, jobs: list[dict[str, Any]]) -> None:
    """Do the jobs as process ``rank``."""
    torch.set_num_threads(1)
    setattr(Accelerator, "end_training", _stay)  # noqa: B010  it would part the processes
    for job in jobs:
        folder = Path(job["run"])
        _keep_parameters(folder / f"params-{rank}.safetensors", watched="watched" in job)
        if rank == 1 and "dies_at" in job:
            _die_before(job["dies_at"])
        values = job["rank_1"] if rank == 1 and "rank_1" in job else job["config"]
        try:
            run.run_training(
                TrainConfig.model_validate(values),
                folder / "out",
                folder,
                resume=job.get("resume", False),
                overwrite=True,
                report=lambda _: None,
            )
        except DalorraError as error:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")


def _stay(_: Accelerator) -> None:
    """End nothing: the next job needs the processes together."""


def _keep_parameters(file: Path, *, watched: bool) -> None:
    train = _TRAIN

    def kept(*args: Any, **options: Any) -> TrainingResult:
        model, counts = args[0].trunk.model, list[int]()
        if watched:
            _watch(model, counts)
        result: TrainingResult = train(*args, **options)
        save_file(dict(result.state.params), file)
        held = {**_held(model), "in_passes": sorted(set(counts))}
        file.with_name(file.stem.replace("params", "base") + ".json").write_text(json.dumps(held))
        return result

    run.train_members = kept


def _held(model: nn.Module) -> dict[str, Any]:
    """Return the bytes of the layers, in this process and in all, and the number of whole matrices.

    Args:
        model: The base model.
    """
    layers = [p for name, p in model.named_parameters() if ".layers." in name]
    gc.collect()  # models of jobs before
    here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in layers)
    whole = sum(p.numel() * p.element_size() for p in layers)
    return {"here": here, "whole": whole, "gathered": _whole_matrices(_shapes(model))}


def _shapes(model: nn.Module) -> set[torch.Size]:
    """Return the shapes of the matrices of MLPs, which no part of another one has."""
    return {
        p.shape for name, p in model.named_parameters() if ".layers." in name and ".mlp." in name
    }


def _whole_matrices(shapes: set[torch.Size]) -> int:
    """Return how many have memory, among all that is alive: nothing gathered is overlooked."""
    return sum(
        one.untyped_storage().nbytes() > 0
        for one in gc.get_objects()
        if type(one) in (Tensor, nn.Parameter) and one.shape in shapes
    )


def _watch(model: nn.Module, counts: list[int]) -> None:
    """Count whole matrices whenever an MLP has run, forward or backward."""
    shapes = _shapes(model)
    gc.collect()

    def count(*_: Any) -> None:
        counts.append(_whole_matrices(shapes))

    for name, module in model.named_modules():
        if name.endswith(".mlp.act_fn"):
            module.register_forward_hook(count)
            module.register_full_backward_hook(count)


def _die_before(step: int) -> None:
    def die(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, TrainStep) and arguments[1] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(die)


_TRAIN = run.train_members

if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
