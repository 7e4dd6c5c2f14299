"""Names the machine a benchmark ran on."""

import platform
from pathlib import Path

import torch

from dalorra_core.predictive.predictor import Predictor

__all__ = ["describe_hardware", "describe_run"]


def describe_run(predictor: Predictor) -> dict[str, str]:
    """Return what the numbers of an adapter were measured with."""
    return {
        "hardware": describe_hardware(),
        "device": str(predictor.device),
        "dtype": str(predictor.dtype),
        "torch": torch.__version__,
        "adapter": f"{predictor.manifest.name} {predictor.revision}",
    }


def describe_hardware() -> str:
    """Return processor, threads and GPU in one line."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor}, {torch.get_num_threads()} threads{gpu}"
