"""Alerts: when a person should look. Each has a section of its name in docs/operations.md."""

from dataclasses import dataclass

from deploy.prometheus.recording_rules import WHOSE, clean
from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["Alert", "drift_alerts", "feedback_alerts", "service_alerts"]

_WHICH = "adapter {{ $labels.adapter }} ({{ $labels.revision }})"


@dataclass(frozen=True)
class Alert:
    """One alert.

    Attributes:
        name: Also the heading of its runbook section.
        expr: It is active while this gives series.
        wait: How long before it fires.
        severity: page: now, users suffer; ticket: today; info: know it.
        summary: One line; may use label and value templates.
    """

    name: str
    expr: str
    wait: str
    severity: str
    summary: str


def drift_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """Return the alerts on traffic that differs from what an adapter was calibrated on."""

    def enough(condition: str) -> str:
        return f"{clean(condition)}\nand on ({WHOSE}) dalorra:drift:rows >= {settings.min_rows}"

    def alert(name: str, severity: str, expr: str, summary: str) -> Alert:
        return Alert(name, enough(expr), settings.drift_for, severity, summary)

    return (
        alert(
            "DalorraConfidencePsiHigh",
            "ticket",
            f"dalorra:confidence:psi > {settings.psi:g}",
            f'Confidence of {_WHICH} has drifted: PSI {{{{ $value | printf "%.2f" }}}}',
        ),
        alert(
            "DalorraConfidenceKsHigh",
            "ticket",
            f"dalorra:confidence:ks > {settings.ks:g}",
            f'Confidence of {_WHICH} has drifted: KS {{{{ $value | printf "%.2f" }}}}',
        ),
        alert(
            "DalorraAbstainRatioHigh",
            "ticket",
            _abstains_more(settings),
            f"{{{{ $value | humanizePercentage }}}} of the answers of {_WHICH} are not accepted, "
            "far more than at calibration",
        ),
        alert(
            "DalorraMutualInformationHigh",
            "ticket",
            f"""
            dalorra:mutual_information:median
            > on ({WHOSE}) ({settings.factor:g} * dalorra:mutual_information:median_reference)
            """,
            f"The samples of {_WHICH} disagree far more than at calibration",
        ),
        alert(
            "DalorraLabelShift",
            "info",
            f"dalorra:label:tv - dalorra:label:tv_noise > {settings.label_shift:g}",
            f"{_WHICH} answers with another mix of labels than at calibration",
        ),
    )


def _abstains_more(settings: RuleSettings) -> str:
    # A share above one half cannot double: then half of the accepted share must have gone.
    ratio, reference = "dalorra:abstain:ratio", "dalorra:abstain:ratio_reference"
    return f"""
    (
      (
        {ratio} > on ({WHOSE}) ({settings.factor:g} * {reference})
        and on ({WHOSE}) {ratio} - on ({WHOSE}) {reference} > {settings.rise:g}
      )
      or {ratio} > on ({WHOSE}) ((1 + {reference}) / 2)
    )
    """


def feedback_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """Return the alerts on accepted answers that turned out wrong."""
    policy = f"{WHOSE}, policy"
    target = "dalorra_policy_target_risk_ratio"
    return (
        Alert(
            "DalorraSelectiveRiskAboveTarget",
            clean(
                f"""
                dalorra:policy_risk:ratio
                > on ({policy}) max by ({policy}) ({target})
                and on ({policy}) dalorra:policy_risk:rows >= {settings.min_labels}
                """
            ),
            settings.feedback_for,
            "ticket",
            "{{ $value | humanizePercentage }} of the labelled answers that policy "
            f"{{{{ $labels.policy }}}} of {_WHICH} accepted are wrong, more than its target",
        ),
        Alert(
            "DalorraRecentRiskAboveTarget",
            clean(
                f"""
                dalorra:selective_risk:ratio
                > on ({WHOSE}) max by ({WHOSE}) ({target})
                and on ({WHOSE}) dalorra:feedback:rows >= {settings.min_labels}
                """
            ),
            settings.feedback_for,
            "ticket",
            "{{ $value | humanizePercentage }} of the recently labelled accepted answers of "
            f"{_WHICH} are wrong, more than its loosest target",
        ),
        Alert(
            "DalorraCertificateViolated",
            f"max by ({policy}) (dalorra_certificate_violated) == 1",
            "5m",
            "page",
            f"The certificate of policy {{{{ $labels.policy }}}} of {_WHICH} does not hold here",
        ),
        Alert(
            "DalorraCalibrationErrorHigh",
            clean(
                f"""
                dalorra:calibration:ece > {settings.ece:g}
                and on ({WHOSE}) dalorra:calibration:rows >= {5 * settings.min_labels}
                """
            ),
            settings.feedback_for,
            "ticket",
            f'Confidence of {_WHICH} is off by {{{{ $value | printf "%.2f" }}}} on average',
        ),
    )


def service_alerts(settings: RuleSettings) -> tuple[Alert, ...]:
    """Return the alerts on a server that fails, is slow, or is not there."""
    return (
        _burn(settings, "Fast", 14.4, ("1h", "5m"), "page"),
        _burn(settings, "Slow", 6.0, ("6h", "30m"), "ticket"),
        Alert(
            "DalorraQueueWaitHigh",
            f"dalorra:queue_wait_seconds:p99 > {settings.deadline_s / 2:g}",
            "5m",
            "page",
            "1 % of the rows wait longer than {{ $value | humanizeDuration }} for the engine",
        ),
        Alert(
            "DalorraOverloaded",
            "dalorra:rejections:ratio > 0.05",
            "10m",
            "ticket",
            "{{ $value | humanizePercentage }} of the requests are refused: the queue is full",
        ),
        Alert(
            "DalorraSelftestFailed",
            "dalorra_selftest_ok == 0",
            "1m",
            "page",
            "{{ $labels.instance }} computes other numbers than adapter {{ $labels.adapter }} "
            "was stored with",
        ),
        Alert(
            "DalorraEngineLost",
            "dalorra_adapter_loaded == 0",
            "1m",
            "page",
            "{{ $labels.instance }} can no longer answer for adapter {{ $labels.adapter }}",
        ),
        Alert(
            "DalorraEngineRestarted",
            "sum by (instance, reason) (increase(dalorra_engine_restarts_total[1h])) > 0",
            "0m",
            "ticket",
            "{{ $labels.instance }} restarted an engine that was {{ $labels.reason }}",
        ),
        Alert(
            "DalorraAdapterNotLoaded",
            "increase(dalorra_adapter_load_failures_total[15m]) > 0",
            "0m",
            "ticket",
            "{{ $labels.instance }} could not load an adapter",
        ),
        Alert(
            "DalorraKeysUnreadable",
            "increase(dalorra_api_keys_reload_failures_total[15m]) > 0",
            "0m",
            "ticket",
            "{{ $labels.instance }} cannot read its API keys again and goes on with the old ones",
        ),
        Alert(
            "DalorraTargetDown",
            'up{job="dalorra"} == 0',
            "2m",
            "page",
            "{{ $labels.instance }} cannot be scraped",
        ),
        Alert(
            "DalorraDown",
            "absent(dalorra_build_info)",
            "5m",
            "page",
            "No server is there",
        ),
    )


def _burn(
    settings: RuleSettings, speed: str, factor: float, windows: tuple[str, str], severity: str
) -> Alert:
    """Return a burn-rate alert: the long window says that it matters, the short that it goes on."""
    long, short = windows
    limit = f"{factor * (1 - settings.objective):.4g}"
    return Alert(
        f"DalorraErrorBudgetBurn{speed}",
        clean(
            f"""
            dalorra:http_errors:ratio{long} > {limit}
            and dalorra:http_errors:ratio{short} > {limit}
            and sum(increase(dalorra_http_requests_total[{long}])) >= {settings.min_requests}
            """
        ),
        "2m",
        severity,
        f"{{{{ $value | humanizePercentage }}}} of the requests of the last {long} failed, and it "
        "goes on",
    )
