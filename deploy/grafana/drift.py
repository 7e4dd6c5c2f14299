"""The dashboard *Confidence and drift*: are the questions those the adapter was calibrated on?

It reads what the recording rules of ``deploy/prometheus`` compute; where a rule keeps the median
only, other quantiles come from the histograms, over the window chosen at the top.
"""

from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana.layout import add_section, chosen_by, new_board, or_all
from deploy.grafana.outcomes import add_outcomes
from deploy.grafana.panels import Heading, Steps, bars, lines, number
from deploy.grafana.selectors import metric, quantile, rule
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["drift_dashboard"]

# Lines and colours change where the shipped alerts fire.
SHIPPED = RuleSettings()
NOT_THE_LAST = 'le!="+Inf"'


def drift_dashboard() -> dashboard.Dashboard:
    """Return the dashboard, not yet built."""
    revisions = 'label_values(dalorra_adapter_info{adapter="$adapter"}, revision)'
    windows = (
        dashboard.IntervalVariable("window")
        .label("Window")
        .values("5m,15m,1h,6h,1d")
        .current(models.VariableOption(text="1h", value="1h"))
    )
    board = (
        new_board("Confidence and drift", "dalorra-drift", "now-6h")
        .with_variable(
            chosen_by("adapter", "Adapter", "label_values(dalorra_adapter_info, adapter)")
        )
        .with_variable(or_all(chosen_by("revision", "Revision", revisions)))
        .with_variable(windows)
    )
    add_section(board, "Now", 4, *((4, panel) for panel in _now()))
    add_section(board, "Confidence", 8, *((8, panel) for panel in _confidence()))
    add_section(board, "Against calibration", 8, *((12, panel) for panel in _distributions()))
    add_section(board, "Uncertainty", 8, *((8, panel) for panel in _uncertainty()))
    add_outcomes(board)
    return board


def _now() -> tuple[Any, ...]:
    psi = Heading("Confidence: PSI", "Population stability index against calibration.", decimals=3)
    ks = Heading("Confidence: KS", "Largest distance of the cumulative shares.", decimals=3)
    declined = Heading("Not accepted", "Answers to review or abstained from.", "percentunit", 1)
    rows = Heading(
        "Answers in the window", f"Below {SHIPPED.min_rows} drift is mostly noise.", "short"
    )
    risk = Heading("Wrong among accepted", "From feedback, last day.", "percentunit", 1)
    certificate = Heading("Certificate", "Violated: more errors than its target can explain.")
    violated = f"max by (revision) ({metric('certificate_violated')})"
    return (
        number(psi, {"{{revision}}": rule("confidence:psi")}, Steps(0.1, SHIPPED.psi)),
        number(ks, {"{{revision}}": rule("confidence:ks")}, Steps(0.1, SHIPPED.ks)),
        number(declined, {"{{revision}}": rule("abstain:ratio")}),
        number(rows, {"{{revision}}": rule("drift:rows")}, Steps(SHIPPED.min_rows, 100)),
        number(risk, {"{{revision}}": rule("selective_risk:ratio")}),
        number(
            certificate, {"{{revision}}": violated}, Steps(1, 1), {"0": "holds", "1": "violated"}
        ),
    )


def _confidence() -> tuple[Any, ...]:
    confidence = Heading("Confidence", "Over the window.", "percentunit", maximum=1)
    psi = Heading("PSI against calibration", f"Staying above {SHIPPED.psi} fires an alert.")
    ks = Heading("KS distance from calibration", f"Staying above {SHIPPED.ks} fires an alert.")
    limit = metric("policy_threshold", 'signal="accept_confidence"')
    return (
        lines(
            confidence,
            {
                "median {{revision}}": rule("confidence:median"),
                "10 % below {{revision}}": quantile(0.1, "confidence_ratio"),
                "reference median {{revision}}": rule("confidence:median_reference"),
                "limit of {{policy}}": f"max by (policy) ({limit})",
            },
        ),
        lines(psi, {"{{revision}}": rule("confidence:psi")}, limit=SHIPPED.psi),
        lines(ks, {"{{revision}}": rule("confidence:ks")}, limit=SHIPPED.ks),
    )


def _distributions() -> tuple[Any, ...]:
    at_most = Heading(
        "Share of answers with at most this confidence",
        "The largest gap between neighbours is KS.",
        "percentunit",
        maximum=1,
    )
    tenths = Heading(
        "Share of answers in each drift bin",
        "Bins are tenths of the calibration rows, merged where they would be too small. Without "
        "drift each bar is as high as its reference; PSI adds up the differences.",
        "percentunit",
    )
    now = rule("confidence_bucket:share", NOT_THE_LAST)
    reference = metric("reference_confidence_cdf_ratio", NOT_THE_LAST)
    return (
        bars(
            at_most,
            {
                "now": f"avg by (le) ({now})",
                "reference": f"avg by (le) ({reference})",
            },
            "le",
            numeric=True,
        ),
        bars(
            tenths,
            {
                "now": f"avg by (bin) ({rule('confidence_bin:share')})",
                "reference": f"avg by (bin) ({metric('reference_confidence_bin_ratio')})",
            },
            "bin",
            numeric=True,
        ),
    )


def _uncertainty() -> tuple[Any, ...]:
    entropy = Heading("Entropy / ln K", "0: one label has all the probability; 1: all are equal.")
    information = Heading(
        "Mutual information / ln K",
        "What the posterior samples disagree about: high for questions unlike the training data.",
    )
    mass = Heading(
        "Label mass", "Probability of the label tokens before they are normalised.", "percentunit"
    )
    mass_queries = {
        "median {{revision}}": quantile(0.5, "label_mass_ratio"),
        "10 % below {{revision}}": quantile(0.1, "label_mass_ratio"),
    }
    return (
        _spread(entropy, "entropy"),
        _spread(information, "mutual_information"),
        lines(mass, mass_queries),
    )


def _spread(heading: Heading, score: str) -> Any:
    return lines(
        heading,
        {
            "median {{revision}}": rule(f"{score}:median"),
            "90 % below {{revision}}": quantile(0.9, f"{score}_ratio"),
            "reference median {{revision}}": rule(f"{score}:median_reference"),
        },
    )
