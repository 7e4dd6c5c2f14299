"""One training run: every setting, read from a file and from the command line."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator

from dalorra_core.config import (
    AdapterConfig,
    DataConfig,
    OptimConfig,
    PredictiveConfig,
    RunConfig,
    Settings,
)
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS, MethodConfig
from dalorra_core.methods.dalorra import DalorraConfig

__all__ = ["TrainConfig", "load_config"]


class TrainConfig(Settings, frozen=True):
    """One training run, whole."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the adapter."
    )
    base: str = Field(
        default="smollm2-135m-instruct", description="Directory, hub id or built-in alias."
    )
    method: MethodConfig = Field(default_factory=DalorraConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    predictive: PredictiveConfig = Field(default_factory=PredictiveConfig)

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": "dalorra", **value}  # as when there is no group ``method`` at all
        return value

    @field_validator("predictive")
    @classmethod
    def _method_follows_design(
        cls, value: PredictiveConfig, info: ValidationInfo
    ) -> PredictiveConfig:
        if value.estimator != "monte_carlo":
            raise ValueError(
                f"estimator must be monte_carlo before training, got {value.estimator}: "
                "dalorra calibrate --plan changes it where that is better"
            )
        method = info.data.get("method")  # absent where it is wrong itself
        if method is not None:
            try:
                METHODS[method.name].check_design(method, value.design)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML, TOML or JSON file, apply ``key.sub=value`` overrides, and validate.

    Args:
        path: The file; None starts from nothing but the overrides.
        overrides: Dotted assignments such as ``method.tau=0.5``; the value is read as YAML.

    Raises:
        ConfigError: Naming the file, each wrong setting, its domain and its value.
    """
    raw = _read_mapping(path) if path is not None else {}
    for text in overrides:
        _assign(raw, text)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(p) for p in e['loc']) or '(top)'}: {e['msg']}; got {e['input']!r}"
            for e in error.errors()
        ]
        where = f"{path}" if path is not None else "the command line"
        raise ConfigError(f"{where}: {len(lines)} wrong setting(s)\n" + "\n".join(lines)) from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {path}: {error}") from None
    try:
        if path.suffix == ".toml":
            value: object = tomllib.loads(text)
        elif path.suffix == ".json":
            value = json.loads(text)
        else:
            value = yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be parsed: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"config file {path} must hold a mapping, found {type(value).__name__}")
    return value


def _assign(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override must read KEY=VALUE, such as method.tau=0.5; got {text!r}")
    *parents, leaf = key.strip().split(".")
    node: Any = raw
    for part in parents:
        child = node.setdefault(part, {})
        if isinstance(child, str):  # method=dalorra, then method.tau=0.5
            child = node[part] = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {part} is not a group of settings")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value cannot be read: {error}") from None
