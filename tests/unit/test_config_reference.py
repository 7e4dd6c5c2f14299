"""docs/training.md: its table of settings is the code's, and its examples are valid."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.training.settings import TrainConfig, load_config
from scripts.config_reference import BEGIN, END, PAGE, reference, with_reference

TEXT = PAGE.read_text(encoding="utf-8")


def _leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= _leaves(inner, f"{prefix}{name}.")
        elif name != "method":
            keys.add(f"{prefix}{name}")
    return keys


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def _row(key: str) -> list[str]:
    line = next(line for line in reference().splitlines() if line.startswith(f"| `{key}` |"))
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_table_of_settings_is_up_to_date() -> None:
    assert with_reference(TEXT) == TEXT, "run: python scripts/config_reference.py"


def test_every_setting_has_a_row_and_nothing_else_has_one() -> None:
    expected = _leaves(TrainConfig)
    for method in METHODS.values():
        expected |= {f"method.{name}" for name in method.settings.model_fields}
    assert set(re.findall(r"^\| `([a-z_.]+)` \|", reference(), flags=re.MULTILINE)) == expected


@pytest.mark.parametrize(
    ("key", "domain", "default"),
    [
        ("name", "text matching `^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`", "required"),
        ("method.prior_prob", "number > 0 and < 1", "`0.5`"),
        ("method.tau", "number > 0 and ≤ 5", "`0.666667`"),
        ("method.trained_as", "`map`, `mle`, or the settings of one of them", "`map`"),
        ("method.kl_scale", "`per_example`, `unit`", "`per_example`"),
        (
            "adapter.target_modules",
            "list of text, at least 1",
            "`[q_proj, v_proj, lm_head]`",
        ),
        ("adapter.layers", "list of 2: [integer, integer] or `null`", "`null`"),
        ("run.seed", "integer ≥ 0 and < 2^64", "`1`"),
        ("run.tensorboard", "true or false", "`false`"),
        ("run.eval_rows", "integer ≥ 1 or `null`", "`1000`"),
        ("predictive.design", "`iid`, `stratified`, `antithetic`", "`iid`"),
    ],
)
def test_a_row_says_domain_and_default(key: str, domain: str, default: str) -> None:
    assert _row(key)[1:3] == [domain, default]


def test_only_the_text_between_the_markers_is_rewritten() -> None:
    page = with_reference(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert page == f"before\n{BEGIN}\n\n{reference()}\n{END}\nafter\n"


@pytest.mark.parametrize("page", ["", BEGIN, END + BEGIN, BEGIN + END + BEGIN, BEGIN + END + END])
def test_a_page_without_its_markers_is_refused(page: str) -> None:
    with pytest.raises(ConfigError, match="each once"):
        with_reference(page)


def test_the_configurations_on_the_page_are_valid(tmp_path: Path) -> None:
    blocks = _blocks("yaml")
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        load_config(file)


def test_the_rows_on_the_page_are_valid() -> None:
    rows = [json.loads(line) for block in _blocks("json") for line in block.splitlines()]
    assert {type(parse_row(row)).__name__ for row in rows} == {"TextExample", "ChoiceExample"}
