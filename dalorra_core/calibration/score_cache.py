"""Keep the answers to calibration rows in a file, so that other targets need no second scoring."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dalorra_core.errors import ConfigError
from dalorra_core.predictive.scoring import Prediction

__all__ = ["read_scores", "write_scores"]

_KEY = "answers_of"


def write_scores(path: Path, prediction: Prediction, key: Mapping[str, str]) -> None:
    """Write answers.

    Args:
        path: Replaced in one step.
        prediction: Answers without temperature.
        key: Everything that the answers depend on: rows, adapter, predictive, precision.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"log_probs": prediction.log_probs.contiguous()}
    if prediction.label_mass is not None:
        tensors["label_mass"] = prediction.label_mass
    scratch = path.with_name(f".{path.name}.writing")
    save_file(tensors, scratch, {_KEY: json.dumps(dict(key), sort_keys=True)})
    scratch.replace(path)


def read_scores(path: Path, key: Mapping[str, str]) -> Prediction:
    """Return stored answers.

    Raises:
        ConfigError: If the file is none of ours, or answers other questions than ``key`` says.
    """
    try:
        with safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"scores {path} cannot be read: {error}") from error
    for name, value in key.items():
        if stored.get(name) != value:
            raise ConfigError(
                f"scores {path} were made with {name} {stored.get(name)}, now it is {value}; give "
                "another file"
            )
    return Prediction(tensors["log_probs"], tensors.get("label_mass"))
