"""Draw the dashboards from a Prometheus: ``python -m deploy.grafana.render --adapter clinc150``.

For documentation and for looking at them without a Grafana: every panel of the committed JSON in
its place, with the data of a time range. Writes one PNG per dashboard and
says which panels had no data.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.grafana.board import Board, Target, filled, read_board
from deploy.grafana.drawing import Drawn, draw_board
from deploy.grafana.prometheus_api import query, query_range

__all__ = ["FOLDER", "main", "render"]

FOLDER = Path(__file__).parent / "generated"
NUM_POINTS = 240


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 when a panel had no data.

    Args:
        arguments: Command line without the program's name; None reads the real one.
    """
    options = _parser().parse_args(arguments)
    end_s = options.end or time.time()
    span_s = (end_s - options.seconds, end_s)
    window = options.window
    variables = {
        "adapter": options.adapter,
        "revision": options.revision,
        "instance": ".+",
        "window": window,
        "__rate_interval": options.rate_interval or window,
        "__range": f"{options.seconds}s",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    empty = []
    for path in sorted(FOLDER.glob("*.json")):
        target = options.out / f"dashboard-{path.stem}.png"
        empty += render(read_board(path), options.url.rstrip("/"), span_s, variables, target)
        sys.stdout.write(f"wrote {target}\n")
    for title in empty:
        sys.stderr.write(f"no data: {title}\n")
    return 1 if empty else 0


def render(
    board: Board,
    url: str,
    span_s: tuple[float, float],
    variables: Mapping[str, str],
    target: Path,
) -> list[str]:
    """Draw one dashboard to a file and return the titles of the panels without any data.

    Args:
        board: What to draw.
        url: Of Prometheus.
        span_s: First and last time, seconds since 1970.
        variables: Values of the dashboard's variables, Grafana's own among them.
        target: PNG file.
    """
    drawn = [
        Drawn(panel, tuple(_series(one, url, span_s, variables) for one in panel.targets))
        for panel in board.panels
    ]
    draw_board(board.title, drawn, span_s, target)
    return [one.panel.title for one in drawn if one.panel.kind != "row" and not any(one.results)]


def _series(
    one: Target,
    url: str,
    span_s: tuple[float, float],
    variables: Mapping[str, str],
) -> tuple:
    expr = filled(one.expr, variables)
    if one.instant:
        found = query(url, expr, span_s[1])
    else:
        step_s = max(1.0, round((span_s[1] - span_s[0]) / NUM_POINTS))
        found = query_range(url, expr, span_s, step_s)
    return tuple(series for series in found if series.points)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="of Prometheus")
    parser.add_argument("--adapter", required=True, help="name of the adapter to show")
    parser.add_argument("--revision", default=".+", help="its revision, as a pattern")
    parser.add_argument("--seconds", type=int, default=3600, help="length of the time range")
    parser.add_argument("--end", type=float, help="its end, seconds since 1970; now if left out")
    parser.add_argument("--window", default="1h", help="window of rates and quantiles")
    parser.add_argument("--rate-interval", help="window of the service's rates; --window if none")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the PNGs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
