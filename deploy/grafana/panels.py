"""How a panel looks: the few kinds the two dashboards are made of.

A panel is built from plain queries: a mapping from the name of a series to its expression, where
``{{label}}`` in a name stands for that label's value. Colours, legends and line styles are decided
here, once: on both dashboards a dashed grey line is what was expected and a red one is a limit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import barchart, common, dashboard, stat, table, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.board import EXPECTED, LIMIT

__all__ = [
    "DATASOURCE",
    "Heading",
    "Steps",
    "bars",
    "lines",
    "number",
    "rows_table",
]

# Filled in by the variable of that name, so that a dashboard can be imported anywhere.
DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")


Queries = Mapping[str, str]


@dataclass(frozen=True)
class Heading:
    """What stands above a panel, and the unit of its values.

    Attributes:
        title: Short; the picture's reader sees nothing else.
        text: What it shows and what to do about it; Grafana shows it at the title.
        unit: Grafana's name of a unit, such as ``percentunit`` or ``s``.
        decimals: Digits after the point; None leaves it to Grafana.
        maximum: Upper end of the axis; None leaves it to the data.
    """

    title: str
    text: str
    unit: str = "none"
    decimals: int | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class Steps:
    """Values from which a number is worrying, and bad; low values are bad when warn > bad."""

    warn: float
    bad: float


def lines(
    heading: Heading,
    queries: Queries,
    *,
    limit: float | None = None,
    stacked: bool = False,
) -> timeseries.Panel:
    """Return values over time.

    Args:
        heading: Title, text and unit.
        queries: One or more; each may give several lines.
        limit: A value to draw as a red line, where an alert fires.
        stacked: Areas on top of each other, for shares that add up.
    """
    panel = _headed(timeseries.Panel(), heading).min(0)
    panel.line_width(2).fill_opacity(45 if stacked else 0).show_points(
        common_models.VisibilityMode.NEVER
    )
    panel.legend(
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(show_legend=True)
    )
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    if stacked:
        panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if limit is not None:
        panel.thresholds(_thresholds(("transparent", None), ("red", limit)))
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(common_models.GraphThresholdsStyleMode.DASHED)
        )
    panel.override_by_regexp(EXPECTED, _line_style("text"))
    panel.override_by_regexp(LIMIT, _line_style("red"))
    for ref_id, name, expr in _numbered(queries):
        panel.with_target(_target(ref_id, name, expr))
    return panel


def number(
    heading: Heading,
    queries: Queries,
    steps: Steps | None = None,
    words: dict[str, str] | None = None,
) -> stat.Panel:
    """Return one large number with its recent course behind it.

    Args:
        heading: Title, text and unit.
        queries: One; its last value is shown.
        steps: Where its colour changes.
        words: Shown in place of the numbers that are keys here.
    """
    panel = _headed(stat.Panel(), heading)
    panel.graph_mode(common_models.BigValueGraphMode.AREA)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if steps is None:
        panel.thresholds(_thresholds(("blue", None)))
    elif steps.warn > steps.bad:
        panel.thresholds(_thresholds(("red", None), ("orange", steps.bad), ("green", steps.warn)))
    else:
        panel.thresholds(_thresholds(("green", None), ("orange", steps.warn), ("red", steps.bad)))
    if words:
        options = {value: models.ValueMappingResult(text=word) for value, word in words.items()}
        panel.mappings([models.ValueMap(options=options)])
    ((name, expr),) = queries.items()
    return panel.with_target(_target("A", name, expr))


def bars(heading: Heading, queries: Queries, by: str, *, numeric: bool = False) -> barchart.Panel:
    """Return bars of the present values, side by side for each value of a label.

    Args:
        heading: Title, text and unit.
        queries: Two or more; each gives one bar per value of the label, and no other labels.
        by: The label.
        numeric: Its values are numbers and stand in their order, not the alphabet's.
    """
    panel = _headed(barchart.Panel(), heading).min(0)
    panel.x_field(by).show_value(common_models.VisibilityMode.NEVER).fill_opacity(80)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(show_legend=True)
    )
    panel.override_by_regexp(EXPECTED, [_fixed_color("text")])
    for ref_id, name, expr in _numbered(queries):
        target = _target(ref_id, name, expr)
        panel.with_target(target.instant().format(PromQueryFormat.TABLE))
    panel.with_transformation(_transformation("joinByField", byField=by, mode="outer"))
    if numeric:
        panel.with_transformation(_converted(by, "number"))
    panel.with_transformation(_transformation("sortBy", sort=[{"field": by}]))
    if numeric:  # bars stand side by side, not at a distance that a number would tell
        panel.with_transformation(_converted(by, "string"))
    names = {f"Value #{ref_id}": name for ref_id, name, _ in _numbered(queries)}
    hidden = {f"Time {count}": True for count in range(1, len(queries) + 1)} | {"Time": True}
    panel.with_transformation(_transformation("organize", excludeByName=hidden, renameByName=names))
    return panel


def rows_table(heading: Heading, queries: Queries, columns: Sequence[str]) -> table.Panel:
    """Return the labels and values of one query as a table.

    Args:
        heading: Title, text and unit of the value.
        queries: One; its name heads the column of values.
        columns: Labels to show, in this order.
    """
    panel = _headed(table.Panel(), heading)
    ((name, expr),) = queries.items()
    panel.with_target(_target("A", name, expr).instant().format(PromQueryFormat.TABLE))
    order = {column: place for place, column in enumerate((*columns, "Value"))}
    panel.with_transformation(
        _transformation("filterFieldsByName", include={"names": [*columns, "Value"]})
    )
    panel.with_transformation(
        _transformation("organize", indexByName=order, renameByName={"Value": name})
    )
    return panel


def _headed(panel: Any, heading: Heading) -> Any:
    panel.title(heading.title).description(heading.text).datasource(DATASOURCE).unit(heading.unit)
    if heading.decimals is not None:
        panel.decimals(heading.decimals)
    if heading.maximum is not None:
        panel.max(heading.maximum)
    return panel


def _numbered(queries: Queries) -> list[tuple[str, str, str]]:
    return [
        (ref_id, name, expr)
        for ref_id, (name, expr) in zip("ABCDEFGH", queries.items(), strict=False)
    ]


def _target(ref_id: str, name: str, expr: str) -> Dataquery:
    return Dataquery().ref_id(ref_id).expr(expr).legend_format(name)


def _thresholds(*steps: tuple[str, float | None]) -> dashboard.ThresholdsConfig:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(color=color, value=value) for color, value in steps])
    )


def _line_style(color: str) -> list[models.DynamicConfigValue]:
    dashed = {"fill": "dash", "dash": [8, 6]}
    return [
        _fixed_color(color),
        models.DynamicConfigValue(id_val="custom.lineStyle", value=dashed),
        models.DynamicConfigValue(id_val="custom.fillOpacity", value=0),
        models.DynamicConfigValue(id_val="custom.stacking", value={"mode": "none"}),
    ]


def _fixed_color(color: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": color})


def _transformation(name: str, **options: Any) -> models.DataTransformerConfig:
    return models.DataTransformerConfig(id_val=name, options=options)


def _converted(field: str, kind: str) -> models.DataTransformerConfig:
    conversions = [{"targetField": field, "destinationType": kind}]
    return _transformation("convertFieldType", conversions=conversions)
