"""A grid file -> the settings of every run; no model, no data, nothing written.

Settings are merged from left to right: the grid's ``settings``, the task's, the method's. What
comes out is validated as the configuration of a training run, so a grid can say all that
``dalorra train`` can, and a wrong setting is found before the first run.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)

from dalorra_core.config import DataConfig, Design, Settings
from dalorra_core.data.tasks import find_task
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.training.settings import TrainConfig

__all__ = ["Cell", "EvaluationSettings", "Grid", "Predictive", "cells", "read_grid"]

_GROUPS = ("adapter", "data", "optim", "predictive", "run")
_RESERVED = {
    "run": {"seed": "the grid's seeds", "device": "--device"},
    "data": {"source": "the grid's tasks", "root": "--data-root"},
}
"""Settings that the bench fills in, and where they come from."""

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,31}$")]
_Label = Annotated[str, Field(pattern=r"^[^|`<>\\\x00-\x1f]{1,60}$")]
_Group = dict[str, JsonValue]
_T = TypeVar("_T")


class _Groups(Settings, frozen=True):
    """The groups of a training run, as far as they are given."""

    base: str | None = None
    adapter: _Group = Field(default_factory=dict)
    data: _Group = Field(default_factory=dict)
    optim: _Group = Field(default_factory=dict)
    predictive: _Group = Field(default_factory=dict)
    run: _Group = Field(default_factory=dict)

    @model_validator(mode="after")
    def _nothing_that_the_bench_fills_in(self) -> Self:
        for group, names in _RESERVED.items():
            for name, source in names.items():
                if name in getattr(self, group):
                    raise ValueError(f"{group}.{name} comes from {source}; leave it out")
        return self


class _TaskEntry(_Groups, frozen=True):
    """One task; keys of ``data`` may stand beside ``task``."""

    task: str
    name: _Name

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: object) -> object:
        if isinstance(value, str):
            value = {"task": value}
        if not isinstance(value, dict):
            return value
        short = {k: v for k, v in value.items() if k in DataConfig.model_fields}
        rest = {k: v for k, v in value.items() if k not in short}
        group = rest.get("data", {})
        if short and isinstance(group, dict):
            rest["data"] = {**group, **short}
        return {"name": rest.get("task"), **rest}

    @field_validator("task")
    @classmethod
    def _known(cls, value: str) -> str:
        return _known_task(value)


class _MethodEntry(_Groups, frozen=True):
    """One line of the tables: what is different about it."""

    method: str | _Group | None = None
    of: str | None = None
    temperature: StrictBool | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.method is None and self.of is None:
            raise ValueError("method must be given, or of: the label of another method")
        return self


class Predictive(Settings, frozen=True):
    """One way to answer: which estimator, with how many samples, drawn together how.

    What it leaves out is the run's own.
    """

    estimator: Literal["monte_carlo", "mean_mask"] = "monte_carlo"
    num_samples: int | None = Field(default=None, ge=1, le=256)
    design: Design | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        return {"estimator": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_pass_has_no_samples(self) -> Self:
        for name in ("num_samples", "design"):
            if self.estimator == "mean_mask" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for monte_carlo; mean_mask is one pass")
        return self

    @property
    def name(self) -> str:
        """Such as ``monte_carlo``, ``mean_mask`` or ``monte_carlo_4_stratified``."""
        own = (self.num_samples, self.design)
        return "_".join([self.estimator, *(str(part) for part in own if part is not None)])


class EvaluationSettings(Settings, frozen=True):
    """What is scored after training."""

    rows: int | None = Field(
        default=None, ge=1, description="Evaluation rows of a set, evenly spaced; null: all."
    )
    train_rows: int | None = Field(
        default=None, ge=1, description="Training rows for train_nll, evenly spaced; null: all."
    )
    temperature_rows: int | None = Field(
        default=None, ge=1, description="Held-out rows a temperature is fitted on; null: all."
    )
    predictives: tuple[Predictive, ...] = Field(default=(Predictive(),), min_length=1)
    resamples: int = Field(
        default=1000, ge=0, description="Bootstrap resamples of an interval; 0: no intervals."
    )

    @field_validator("resamples")
    @classmethod
    def _two_make_an_interval(cls, value: int) -> int:
        if value == 1:
            raise ValueError("must be 0 or at least 2")
        return value

    @field_validator("predictives")
    @classmethod
    def _once(cls, value: tuple[Predictive, ...]) -> tuple[Predictive, ...]:
        return _different(value, [one.name for one in value])


class Grid(Settings, frozen=True):
    """A grid file, checked."""

    name: _Name
    tasks: tuple[_TaskEntry, ...] = Field(min_length=1)
    out_of_distribution: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    seeds: tuple[Annotated[int, Field(strict=True, ge=0, lt=2**64)], ...] = Field(min_length=1)
    settings: _Groups = Field(default_factory=_Groups)
    methods: dict[_Label, _MethodEntry] = Field(min_length=1)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)

    @field_validator("seeds")
    @classmethod
    def _each_seed_once(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return _different(value, value)

    @field_validator("tasks")
    @classmethod
    def _each_name_once(cls, value: tuple[_TaskEntry, ...]) -> tuple[_TaskEntry, ...]:
        return _different(value, [entry.name for entry in value])

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [entry.name for entry in self.tasks]
        for name, others in self.out_of_distribution.items():
            if name not in names:
                raise ValueError(
                    f"out_of_distribution: a key must be one of the grid's tasks "
                    f"({', '.join(names)}), got {name!r}"
                )
            _different(others, others)
            for other in others:
                _known_task(other)
        for label, entry in self.methods.items():
            if entry.of is not None and entry.of not in self.methods:
                raise ValueError(
                    f"methods.{label}.of must be one of the methods ({', '.join(self.methods)}), "
                    f"got {entry.of!r}"
                )
        return self


@dataclass(frozen=True)
class Cell:
    """One (method, task, seed) of the tables.

    Attributes:
        label: Of the method, as the tables show it.
        task: Name of the grid's task.
        seed: Run seed.
        config: The training run that answers for it; cells with equal ones share a run.
        temperature: Whether its answers are tempered by a temperature fitted on held-out rows.
        others: Tasks whose evaluation rows are scored as out of distribution.
    """

    label: str
    task: str
    seed: int
    config: TrainConfig
    temperature: bool
    others: tuple[str, ...]


def read_grid(path: Path) -> Grid:
    """Read and check a grid file; the settings of its runs are checked by ``cells``.

    Raises:
        ConfigError: Naming the file, each wrong setting, its domain and its value.
    """
    try:
        raw: object = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  safe
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read grid {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"grid {path} cannot be parsed: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"grid {path} must hold a mapping, found {type(raw).__name__}")
    try:
        return Grid.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_sentence(str(path), _faults(error))) from None


def cells(grid: Grid, data_root: Path, device: Literal["cpu", "cuda"]) -> list[Cell]:
    """Return every (method, task, seed) of a grid with its validated settings, seed by seed.

    Args:
        grid: From ``read_grid``.
        data_root: Directory with one folder for each data set.
        device: What the runs train and answer on.

    Raises:
        ConfigError: A method's settings are wrong on a task, or it cannot follow the design of a
            predictive; all faults are named.
    """
    found, faults = [], []
    methods = {label: _resolved(grid.methods, label) for label in grid.methods}
    for seed in grid.seeds:
        for entry in grid.tasks:
            for label, (raw, temperature) in methods.items():
                values = _merged(_given(grid.settings), _given(entry), raw)
                values["run"] = {**values.get("run", {}), "seed": seed, "device": device}
                values["data"] = {
                    **values.get("data", {}),
                    "source": f"task:{entry.task}",
                    "root": str(data_root.absolute()),
                }
                try:
                    config = _config(values, entry.task)
                except ValidationError as error:
                    where = f"methods.{label} on {entry.name}"
                    faults += [f"{where}: {text}" for text in _faults(error)]
                    continue
                faults += _without_design(grid.evaluation.predictives, label, config)
                others = grid.out_of_distribution.get(entry.name, ())
                found.append(Cell(label, entry.name, seed, config, temperature, others))
    if faults:
        raise ConfigError(_sentence(f"grid {grid.name}", list(dict.fromkeys(faults))))
    return found


def _without_design(
    predictives: Sequence[Predictive], label: str, config: TrainConfig
) -> list[str]:
    """Return what is wrong with designs for a method; one that draws nothing needs none."""
    method, faults = METHODS[config.method.name], []
    for one in predictives:
        if one.design is not None and method.draws_samples(config.method):
            try:
                method.check_design(config.method, one.design)
            except ConfigError as error:
                faults.append(f"methods.{label}, predictive {one.name}: {error}")
    return faults


def _config(values: dict[str, Any], task: str) -> TrainConfig:
    """Return the run's settings under a name made of them: labels may change, adapters not."""
    config = TrainConfig.model_validate({"name": "unnamed", **values})
    name = f"{task}-{config.method.name}-{config.run.seed}"[:64]
    return config.model_copy(update={"name": name})


def _resolved(
    methods: Mapping[str, _MethodEntry], label: str, seen: tuple[str, ...] = ()
) -> tuple[dict[str, Any], bool]:
    """Return a method's settings with those it is made ``of``, and whether it is tempered."""
    if label in seen:
        raise ConfigError(f"methods: of goes round in a circle: {' -> '.join((*seen, label))}")
    entry = methods[label]
    parent, tempered = _resolved(methods, entry.of, (*seen, label)) if entry.of else ({}, False)
    raw = _merged(parent, _given(entry))
    own = {"name": entry.method} if isinstance(entry.method, str) else entry.method
    if own is not None:
        raw["method"] = _method(parent.get("method"), own)
    return raw, tempered if entry.temperature is None else entry.temperature


def _method(parent: dict[str, Any] | None, own: dict[str, Any]) -> dict[str, Any]:
    """Settings of another method are not handed down."""
    if parent is None or own.get("name", parent.get("name")) != parent.get("name"):
        return own
    return {**parent, **own}


def _given(groups: _Groups) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(groups, name) for name in _GROUPS}
    return found if groups.base is None else {**found, "base": groups.base}


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings group by group; the last one wins."""
    merged: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            old = merged.get(name)
            merged[name] = {**old, **value} if isinstance(old, dict) and name in _GROUPS else value
    return merged


def _known_task(name: str) -> str:
    try:
        find_task(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return name


def _different(values: _T, names: Sequence[object]) -> _T:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"must be different, got {repeated!r} more than once")
    return values


def _faults(error: ValidationError) -> list[str]:
    return [
        f"{'.'.join(str(part) for part in fault['loc']) or '(grid)'}: "
        f"{fault['msg'].removeprefix('Value error, ')}{_known(fault['type'], fault['loc'])}"
        + ("" if isinstance(fault["input"], BaseModel) else f"; got {fault['input']!r}")
        for fault in error.errors()
    ]


def _known(kind: str, place: tuple[int | str, ...]) -> str:
    """Name the keys that there are, where an unknown one of the grid was given."""
    if kind != "extra_forbidden":
        return ""
    models: dict[object, type[BaseModel]] = {
        "methods": _MethodEntry,
        "tasks": _TaskEntry,
        "settings": _Groups,
        "evaluation": EvaluationSettings,
    }
    model = Grid if len(place) == 1 else models.get(place[0])
    return "" if model is None else f"; known are {', '.join(model.model_fields)}"


def _sentence(where: str, faults: Sequence[str]) -> str:
    return f"{where}: {len(faults)} wrong setting(s)\n" + "\n".join(f"  {one}" for one in faults)


class _Loader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:  # noqa: FBT001, FBT002  the base class's
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {repeated!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)
