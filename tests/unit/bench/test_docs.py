"""docs/bench.md: its grid is valid, and its table of settings is whole."""

import re
from pathlib import Path

from dalorra_core.bench.grid import EvaluationSettings, cells, read_grid
from dalorra_core.bench.sweeps import SWEPT

PAGE = Path(__file__).parents[3] / "docs" / "bench.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_grid_on_the_page_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    file = tmp_path / "grid.yaml"
    file.write_text(block, encoding="utf-8")
    found = cells(read_grid(file), Path("data"), "cpu")
    assert len(found) == 3 * 2 * 4
    assert found[3].config.method.model_dump()["prior_prob"] == 0.7
    assert found[3].config.optim.lr == 1e-3


def test_every_setting_of_the_evaluation_has_a_line() -> None:
    table = TEXT.partition("| `evaluation` | |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(
        EvaluationSettings.model_fields
    )


def test_every_setting_that_is_swept_is_named() -> None:
    figures = TEXT.partition("Figures:")[2]
    listed = figures.partition("differ in nothing else")[2].partition("Over `adapter.r`")[0]
    assert re.findall(r"`([\w.]+)`", listed) == list(SWEPT)
