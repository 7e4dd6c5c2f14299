"""What stands around the panels: the dashboard itself, its variables and its sections."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.panels import DATASOURCE

__all__ = ["add_section", "chosen_by", "new_board", "or_all"]


def new_board(title: str, uid: str, since: str) -> dashboard.Dashboard:
    """Return an empty dashboard with the variable that names the data source.

    Args:
        title: Of the dashboard.
        uid: Its address in Grafana; links to it hold as long as this stays.
        since: Start of the time range at first, such as ``now-6h``.
    """
    source = dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
    return (
        dashboard.Dashboard(title)
        .uid(uid)
        .tags(["dalorra"])
        .time(since, "now")
        .refresh("1m")
        .timezone("browser")
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(source)
    )


def chosen_by(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """Return a variable that is chosen at the top of a dashboard.

    Args:
        name: As in ``$name``.
        label: Its name for the reader.
        query: Gives its values, such as ``label_values(metric, label)``.
    """
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def or_all(variable: dashboard.QueryVariable) -> dashboard.QueryVariable:
    """Let a variable stand for all its values at first; queries match it with ``=~``."""
    everything = models.VariableOption(text="All", value="$__all")
    return variable.include_all(include_all=True).all_value(".+").current(everything)


def add_section(
    board: dashboard.Dashboard, title: str, height: int, *panels: tuple[int, Any]
) -> None:
    """Add a heading and panels below it, from left to right; 24 columns make a full line.

    Args:
        board: Changed in place.
        title: Of the section.
        height: Of every panel, in Grafana's units of 30 pixels.
        panels: Width in columns, and the panel.
    """
    board.with_row(dashboard.Row(title))
    for width, panel in panels:
        board.with_panel(panel.span(width).height(height))
