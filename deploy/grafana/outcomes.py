"""The lower half of *Confidence and drift*: decisions, labels, and what feedback says of them."""

from typing import Any

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.layout import add_section
from deploy.grafana.panels import Heading, bars, lines, rows_table
from deploy.grafana.selectors import metric, rule

__all__ = ["add_outcomes"]


def add_outcomes(board: dashboard.Dashboard) -> None:
    """Add three sections to a dashboard."""
    add_section(board, "Decisions", 8, *((6, panel) for panel in _decisions()))
    add_section(board, "Labels", 8, *zip((16, 8), _labels(), strict=True))
    feedback = zip((8, 6, 5, 5), _with_feedback(), strict=True)
    add_section(board, "Answers with a known label", 8, *feedback)


def _decisions() -> tuple[Any, ...]:
    shares = Heading("Decisions", "Shares of the answers.", "percentunit", maximum=1)
    declined = Heading("Not accepted, and at calibration", "Review and abstain.", "percentunit")
    reasons = Heading("Reasons", "Share of answers with each; one can have several.", "percentunit")
    policies = Heading("Limits in force", "In the unit of the histograms.", decimals=4)
    with_reason = f"sum by (reason) (rate({metric('decision_reasons_total')}[$window]))"
    answers = f"sum (rate({metric('predictions_total')}[$window]))"
    return (
        lines(
            shares,
            {"{{decision}}": f"avg by (decision) ({rule('decision:share')})"},
            stacked=True,
        ),
        lines(
            declined,
            {
                "now {{revision}}": rule("abstain:ratio"),
                "reference {{revision}}": rule("abstain:ratio_reference"),
            },
        ),
        lines(reasons, {"{{reason}}": f"{with_reason} / on () group_left {answers}"}),
        rows_table(
            policies,
            {"threshold": f"max by (policy, signal) ({metric('policy_threshold')})"},
            ["policy", "signal"],
        ),
    )


def _labels() -> tuple[Any, ...]:
    moved = Heading("Labels whose share moved most", "Twelve of them.", "percentunit")
    distance = Heading(
        "Distance of the label shares from calibration",
        "Total variation; expected: what chance alone makes of so few answers.",
        "percentunit",
    )
    one = "adapter, revision, label"
    # Replicas export the same reference: take one of them.
    reference = f"max by ({one}) ({metric('reference_label_ratio')})"
    live = rule("label:share")
    most = f"topk(12, abs({live} - on ({one}) {reference}))"
    return (
        bars(
            moved,
            {
                "now": f"avg by (label) ({live} and on (revision, label) {most})",
                "reference": f"avg by (label) ({reference} and on (revision, label) {most})",
            },
            "label",
        ),
        lines(
            distance,
            {
                "distance {{revision}}": rule("label:tv"),
                "expected by chance {{revision}}": rule("label:tv_noise"),
            },
        ),
    )


def _with_feedback() -> tuple[Any, ...]:
    risk = Heading(
        "Selective risk against its target",
        "Wrong answers among accepted ones, by policy. The certificate is violated when the lower "
        "bound passes the target.",
        "percentunit",
    )
    ece = Heading("Calibration error (ECE)", "Last day.", "percentunit")
    labelled = Heading("Labelled answers", "By decision and outcome, over the window.", "short")
    counts = f"sum by (decision, outcome) (increase({metric('feedback_total')}[$window]))"
    return (
        lines(
            risk,
            {
                "measured, {{policy}}": f"max by (policy) ({rule('policy_risk:ratio')})",
                "lower bound, {{policy}}": "max by (policy) "
                f"({metric('feedback_risk_lower_bound_ratio')})",
                "target of {{policy}}": f"max by (policy) ({metric('policy_target_risk_ratio')})",
            },
        ),
        _reliability(),
        lines(ece, {"{{revision}}": rule("calibration:ece")}),
        lines(labelled, {"{{decision}}, {{outcome}}": counts}),
    )


def _reliability() -> Any:
    heading = Heading(
        "Accuracy by confidence",
        "In fifteen bins of confidence. Bars as high as their neighbour: it can be believed.",
        "percentunit",
        maximum=1,
    )
    total = _summed("calibration_bin_total")
    return bars(
        heading,
        {
            "accuracy": f"{_summed('calibration_bin_correct_total')} / ({total} > 0)",
            "expected": f"{_summed('calibration_bin_confidence_sum_total')} / ({total} > 0)",
        },
        "bin",
        numeric=True,
    )


def _summed(counter: str) -> str:
    return f"sum by (bin) (increase({metric(counter)}[$__range]))"
