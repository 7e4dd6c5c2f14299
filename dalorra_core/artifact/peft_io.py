"""Plain LoRA as PEFT keeps it: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT itself is not needed. Reading is for directories of unknown origin: pickle is never opened, no
path in them is followed, and a setting under which the factors are not all there is to it is
refused by name.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from dalorra_core.adapters.plain_lora import Factors, PlainLora
from dalorra_core.artifact.placing import write_synced
from dalorra_core.artifact.reading import read_file
from dalorra_core.errors import ArtifactCorruptError, ArtifactError, ArtifactUnsafeError

__all__ = [
    "MOST_RANK",
    "PEFT_CONFIG_FILE",
    "PEFT_TENSOR_FILE",
    "VLLM_RANKS",
    "copied_weights",
    "peft_sha256",
    "read_peft",
    "write_peft",
]

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_TENSOR_FILE = "adapter_model.safetensors"

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``max_lora_rank``, which is the room that it keeps for every adapter.

1 is one more, too small to be worth a case of its own.
"""

MOST_RANK = 512

_KEY = re.compile(r"base_model\.model\.([A-Za-z0-9_.]+)\.lora_([AB])\.weight")
_COPY = re.compile(r"base_model\.model\.([A-Za-z0-9_.]+)\.base_layer\.weight")
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.ckpt")
_LARGEST_CONFIG = 1 << 20
_MOST_ALPHA = 1e9
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+")

# What is read here, and what says nothing about the function: where the adapter comes from, how it
# was trained or started, and the modules, which the tensors themselves name.
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "init_lora_weights"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
}
# Others (pissa, olora, corda, loftq, lora_ga) take a part off the base model's weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


# --- writing ----------------------------------------------------------------------------------


def write_peft(directory: Path, lora: PlainLora, base_id: str) -> str:
    """Write an adapter that PEFT and vLLM load as it is, and return the sha256 of its tensors.

    Factors are written in float32. lora_alpha is a whole number, as PEFT's type says: where
    scaling * r is none, B takes the scaling instead.

    Args:
        directory: Empty; made if it is not there.
        lora: Module paths as the base model has them, B of an output projection in full size.
        base_id: What the adapter says its base model is.

    Source:
        PEFT's checkpoint format, docs/source/developer_guides/checkpoint.md of its repository.
    """
    alpha, times = _alpha(lora)
    tensors = {}
    for name, factors in lora.modules.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = factors.down.contiguous()
        tensors[f"{key}.lora_B.weight"] = (factors.up * times).contiguous()
    content = dump_tensors(tensors, {"format": "pt"})
    directory.mkdir(exist_ok=True)
    write_synced(directory / PEFT_TENSOR_FILE, content)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_id,
        "r": lora.r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(lora.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    write_synced(directory / PEFT_CONFIG_FILE, (json.dumps(config, indent=1) + "\n").encode())
    return hashlib.sha256(content).hexdigest()


def _alpha(lora: PlainLora) -> tuple[int, float]:
    """Return lora_alpha, and what B is multiplied with besides."""
    alpha = lora.scaling * lora.r
    whole = round(alpha)
    if whole > 0 and math.isclose(alpha, whole, rel_tol=1e-12):
        return whole, 1.0
    return lora.r, lora.scaling


# --- reading ----------------------------------------------------------------------------------


def read_peft(directory: Path) -> PlainLora:
    """Return the adapter of a PEFT directory as factors of one rank and one scale.

    Copies of the base model's weights are left out; ``copied_weights`` has them. Modules of
    different ranks are filled up with zeros to the largest; where they differ in scale, B takes
    the difference.

    Args:
        directory: Of unknown origin.

    Returns:
        float32 factors; B of an output projection has a row for every token.

    Raises:
        ArtifactMissingFileError: A file is not there.
        ArtifactUnsafeError: The tensors are pickled.
        ArtifactCorruptError: A file cannot be parsed, or its values fit nothing.
        ArtifactError: It is another kind of adapter, or LoRA with something that plain factors
            cannot say; names the setting, what is allowed and the value.
    """
    for name in _PICKLED:
        if (directory / name).exists():
            raise ArtifactUnsafeError(
                f"{directory} holds {name}: pickle-based formats can execute code and are never "
                f"read. Save the adapter again with PEFT, which writes {PEFT_TENSOR_FILE}"
            )
    config = _config(directory)
    pairs = dict(_pairs(directory))
    if not pairs:
        raise ArtifactCorruptError(f"{directory / PEFT_TENSOR_FILE} holds no LoRA factor")
    r = max(factors.down.shape[0] for factors in pairs.values())
    scales = {name: _scale(config, name, f) for name, f in pairs.items()}
    scaling = next(iter(scales.values()))
    modules = {}
    for name, factors in pairs.items():
        down, up = torch.zeros(r, factors.down.shape[1]), torch.zeros(len(factors.up), r)
        own = factors.down.shape[0]
        down[:own], up[:, :own] = factors.down, factors.up * (scales[name] / scaling)
        modules[name] = Factors(down, up)
    return PlainLora(r, scaling, modules)


def copied_weights(directory: Path) -> dict[str, Tensor]:
    """Return what a PEFT directory holds of the base model itself: module path to its weight.

    PEFT stores the weight of an adapted output projection beside its factors. It is the base
    model's own, unless that was trained too.

    Raises:
        ArtifactMissingFileError, ArtifactCorruptError: See ``read_peft``.
    """
    found = {}
    for key, value in _tensors(directory / PEFT_TENSOR_FILE).items():
        parts = _COPY.fullmatch(key)
        if parts is not None:
            found[parts[1]] = value
    return found


def peft_sha256(directory: Path) -> str:
    """Return the sha256 of the tensors and the configuration of a PEFT directory.

    Raises:
        ArtifactMissingFileError: One of them is not there.
    """
    digest = hashlib.sha256()
    for name in (PEFT_TENSOR_FILE, PEFT_CONFIG_FILE):
        digest.update(hashlib.sha256(read_file(directory / name)).digest())
    return digest.hexdigest()


def _config(directory: Path) -> Mapping[str, Any]:
    path = directory / PEFT_CONFIG_FILE
    content = read_file(path, _LARGEST_CONFIG)
    try:
        config: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ArtifactCorruptError(f"{path} must hold a JSON object, got {type(config).__name__}")
    for name, allowed, found in _refused(config):
        raise ArtifactError(f"{path}: {name} must be {allowed} to be imported, got {found!r}")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ArtifactCorruptError(f"{path}: alpha_pattern must be an object, got {patterns!r}")
    alphas: list[Any] = [config.get("lora_alpha"), *patterns.values()]
    for alpha in alphas:
        if not _is_number(alpha) or not 0 < alpha <= _MOST_ALPHA:
            raise ArtifactCorruptError(
                f"{path}: lora_alpha and alpha_pattern must be above 0 and at most "
                f"{_MOST_ALPHA:g}, got {alpha!r}"
            )
    for name in patterns:
        if not _PLAIN_NAME.fullmatch(name):  # to PEFT it is a regular expression
            raise ArtifactError(f"{path}: alpha_pattern must have module names, got {name!r}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refused(config: Mapping[str, Any]) -> Iterator[tuple[str, str, object]]:
    """Yield the settings that plain factors cannot say: (name, what is allowed, value)."""
    if config.get("peft_type") != "LORA":
        yield "peft_type", "LORA", config.get("peft_type")
    if config.get("bias", "none") != "none":
        yield "bias", "none", config["bias"]
    if config.get("init_lora_weights") not in _STARTS:
        yield (
            "init_lora_weights",
            "one that leaves the base model as it is",
            config["init_lora_weights"],
        )
    for name in sorted(config.keys() - _READ - _WITHOUT_EFFECT - {"bias"}):
        if config[name]:
            yield name, "off", config[name]


def _pairs(directory: Path) -> Iterator[tuple[str, Factors]]:
    """Yield the modules in the order of their names, with factors that fit each other."""
    path = directory / PEFT_TENSOR_FILE
    tensors = _tensors(path)
    found: dict[str, dict[str, Tensor]] = {}
    for key in sorted(tensors):
        if _COPY.fullmatch(key):
            continue
        parts = _KEY.fullmatch(key)
        if parts is None:
            raise ArtifactError(
                f"{path}: tensor {key!r} must be lora_A.weight or lora_B.weight of a linear layer"
            )
        found.setdefault(parts[1], {})[parts[2]] = tensors[key]
    for name, pair in found.items():
        if len(pair) < 2:  # noqa: PLR2004  A and B
            raise ArtifactCorruptError(f"{path}: module {name} has lora_{next(iter(pair))} alone")
        yield name, _fitting(path, name, pair["A"], pair["B"])


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_tensors(read_file(path))
    except SafetensorError as error:
        raise ArtifactCorruptError(f"{path} cannot be read: {error}") from None


def _fitting(path: Path, name: str, down: Tensor, up: Tensor) -> Factors:
    shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:  # noqa: PLR2004
        raise ArtifactCorruptError(f"{path}: module {name}: {shapes} do not fit each other")
    if not 1 <= down.shape[0] <= MOST_RANK:
        raise ArtifactCorruptError(
            f"{path}: module {name}: the rank must be 1 to {MOST_RANK}, got {down.shape[0]}"
        )
    for factor in (down, up):
        if not factor.is_floating_point() or not bool(factor.float().isfinite().all()):
            raise ArtifactCorruptError(f"{path}: module {name} must hold finite floats")
    return Factors(down.float(), up.float())


def _scale(config: Mapping[str, Any], name: str, factors: Factors) -> float:
    """Return what PEFT multiplies a module's part with."""
    r, alpha = factors.down.shape[0], config["lora_alpha"]
    for ending, own in (config.get("alpha_pattern") or {}).items():
        if f".{name}".endswith(f".{ending}"):
            alpha = own
            break
    return float(alpha / (math.sqrt(r) if config.get("use_rslora") else r))
