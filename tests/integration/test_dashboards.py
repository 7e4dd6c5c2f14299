"""The dashboards against a real Prometheus that scraped the real server: no panel without data."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from prometheus_client.parser import text_string_to_metric_families

from deploy.grafana.board import Board, Panel, filled, read_board
from deploy.grafana.dashboards import FOLDER, rendered
from deploy.grafana.drawing import DOTS_PER_INCH, TITLE_INCHES, panel_box
from deploy.grafana.prometheus_api import Series, query, query_range
from deploy.grafana.render import main as render_command
from deploy.prometheus.drift_rules import render as rendered_rules
from deploy.prometheus.rule_settings import RuleSettings
from tests.support.prometheus import find_prometheus, prometheus_server
from tests.support.required import require_or_skip
from tests.support.watched import WATCHED, Traffic, watched_server

BOARDS = ("confidence-and-drift.json", "service.json")
RULES = RuleSettings(
    interval="1s",
    drift_window="15s",
    drift_for="5s",
    min_rows=50,
    feedback_window="30s",
    feedback_for="5s",
    min_labels=20,
)
VARIABLES = {
    "adapter": WATCHED.name,
    "revision": ".+",
    "instance": ".+",
    "window": "15s",
    "__rate_interval": "5s",
    "__range": "30s",
}
TRAFFIC_S = 12
PATIENCE_S = 20


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that watched some traffic, and what the server showed at its end."""

    url: str
    exposition: str


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    require_or_skip("prometheus", find_prometheus())
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        watched_server(tmp_path_factory.mktemp("state")) as server,
        prometheus_server(folder, [server.removeprefix("http://")], RULES) as url,
    ):
        traffic = Traffic(server)
        _until_scraped(url)
        end_s = time.monotonic() + TRAFFIC_S
        while time.monotonic() < end_s:
            traffic.send(num_requests=3)
            traffic.send_troubles()
            time.sleep(0.1)
        yield Scraped(url, traffic.metrics())
        traffic.close()


def _until_scraped(url: str) -> None:
    """Wait for counters at zero, without which their first step would not be seen."""
    end_s = time.monotonic() + PATIENCE_S
    while not query(url, "count_over_time(dalorra_build_info[1m]) >= 2", time.time()):
        assert time.monotonic() < end_s, "nothing was scraped"
        time.sleep(0.2)


def _board(name: str) -> Board:
    return read_board(FOLDER / name)


def _data(url: str, expr: str, *, instant: bool) -> list[Series]:
    now_s = time.time()
    found = query(url, expr, now_s) if instant else query_range(url, expr, (now_s - 10, now_s), 1.0)
    return [series for series in found if series.points]


@pytest.mark.parametrize("name", BOARDS)
def test_the_committed_dashboards_are_what_the_code_makes(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == rendered()[name]
    assert set(rendered()) == set(BOARDS) == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", BOARDS)
def test_panels_fill_the_grid_without_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _board(name).panels:
        x, y, w, h = panel.place
        cells = {(left, top) for left in range(x, x + w) for top in range(y, y + h)}
        assert not cells & taken, panel.title
        taken |= cells
    assert {left for left, _ in taken} == set(range(24))
    assert len(taken) == 24 * len({top for _, top in taken}), "a line is not full"


@pytest.mark.parametrize("name", BOARDS)
def test_every_query_of_every_panel_returns_data(scraped: Scraped, name: str) -> None:
    missing = {
        (panel.title, target.name): (filled(target.expr, VARIABLES), target.instant)
        for panel in _board(name).panels
        for target in panel.targets
    }
    assert len(missing) > 20
    end_s = time.monotonic() + PATIENCE_S
    while missing and time.monotonic() < end_s:
        missing = {
            which: (expr, instant)
            for which, (expr, instant) in missing.items()
            if not _data(scraped.url, expr, instant=instant)
        }
        time.sleep(0.5 if missing else 0)
    assert not missing


@pytest.mark.parametrize("name", BOARDS)
def test_every_metric_that_a_dashboard_names_exists(scraped: Scraped, name: str) -> None:
    shown = {
        sample.name
        for family in text_string_to_metric_families(scraped.exposition)
        for sample in family.samples
    }
    recorded = set(re.findall(r"record: (\S+)", "".join(rendered_rules(RULES).values())))
    board = _board(name)
    texts = [target.expr for panel in board.panels for target in panel.targets]
    named = set(
        re.findall(r"dalorra[:_][a-z0-9_:]+", " ".join([*texts, *board.variables.values()]))
    )
    assert len(named) > 10
    assert named <= shown | recorded, named - shown - recorded


def test_the_pictures_show_every_panel(
    scraped: Scraped, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", scraped.url, "--adapter", WATCHED.name, "--seconds", "30"]
    windows = ["--window", "15s", "--rate-interval", "5s", "--out", str(tmp_path)]
    assert render_command([*options, *windows]) == 0, capsys.readouterr().err
    for name in BOARDS:
        picture = image.imread(tmp_path / f"dashboard-{Path(name).stem}.png")
        blank = [panel.title for panel in _board(name).panels if not _has_ink(picture, panel)]
        assert not blank


def _has_ink(picture: np.ndarray, panel: Panel) -> bool:
    """Return whether something is drawn in a panel below its title."""
    height = picture.shape[0] / DOTS_PER_INCH
    left, bottom, wide, tall = panel_box(panel, height)
    title = TITLE_INCHES if panel.kind != "row" else 0
    top, base = height - bottom - tall + title, height - bottom
    rows = slice(int(top * DOTS_PER_INCH) + 2, int(base * DOTS_PER_INCH) - 2)
    columns = slice(int(left * DOTS_PER_INCH) + 2, int((left + wide) * DOTS_PER_INCH) - 2)
    shown = picture[rows, columns, :3]
    return float(shown.max(axis=(0, 1)).max() - shown.min()) > 0.3


def test_a_picture_of_an_unknown_adapter_says_what_is_missing(
    scraped: Scraped, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", scraped.url, "--adapter", "nobody", "--seconds", "30", "--window", "15s"]
    assert render_command([*options, "--out", str(tmp_path)]) == 1
    assert "no data: PSI against calibration\n" in capsys.readouterr().err
