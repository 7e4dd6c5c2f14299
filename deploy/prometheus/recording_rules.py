"""Recording rules: what is measured. Every expression gives one series per adapter and revision.

Three habits keep them right. Live sides are sums over replicas of ``increase``, which survives
restarts. Reference sides are ``max by`` over replicas, which all show the same values: without it a
join of two replicas is many-to-many and fails. Denominators are filtered with ``> 0``, so that no
traffic gives no series rather than NaN.
"""

from collections.abc import Mapping
from textwrap import dedent

from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["WHOSE", "clean", "drift_records", "feedback_records", "service_records"]

WHOSE = "adapter, revision"


def drift_records(settings: RuleSettings) -> dict[str, str]:
    """Return record name to expression: live scores and decisions against the reference."""
    window = settings.drift_window
    live_bin = "clamp_min(dalorra:confidence_bin:share, 1e-4)"
    reference_bin = clean(
        f"""
        clamp_min(max by ({WHOSE}, bin) (dalorra_reference_confidence_bin_ratio), 1e-4)
        """
    )
    return _cleaned(
        {
            "dalorra:drift:rows": f"""
                sum by ({WHOSE}) (increase(dalorra_confidence_ratio_count[{window}])) > 0
            """,
            "dalorra:confidence_bucket:share": f"""
                sum by ({WHOSE}, le) (increase(dalorra_confidence_ratio_bucket[{window}]))
                / on ({WHOSE}) group_left ()
                dalorra:drift:rows
            """,
            "dalorra:confidence:ks": f"""
                max by ({WHOSE}) (
                  abs(
                    dalorra:confidence_bucket:share
                    - on ({WHOSE}, le)
                    max by ({WHOSE}, le) (dalorra_reference_confidence_cdf_ratio)
                  )
                )
            """,
            "dalorra:confidence_bin:share": f"""
                sum by ({WHOSE}, bin) (increase(dalorra_confidence_bin_total[{window}]))
                / on ({WHOSE}) group_left ()
                (sum by ({WHOSE}) (increase(dalorra_confidence_bin_total[{window}])) > 0)
            """,
            "dalorra:confidence:psi": f"""
                sum by ({WHOSE}) (
                  (
                    {live_bin}
                    - on ({WHOSE}, bin)
                    {reference_bin}
                  )
                  * on ({WHOSE}, bin)
                  ln(
                    {live_bin}
                    / on ({WHOSE}, bin)
                    {reference_bin}
                  )
                )
            """,
            **_medians("confidence", window),
            **_medians("entropy", window),
            **_medians("mutual_information", window),
            **_decisions(window),
            **_labels(window),
        }
    )


def _medians(score: str, window: str) -> dict[str, str]:
    # a comparison with NaN is false: a histogram without rows gives no series
    return {
        f"dalorra:{score}:median": f"""
            histogram_quantile(
              0.5,
              sum by ({WHOSE}, le) (increase(dalorra_{score}_ratio_bucket[{window}]))
            ) >= 0
        """,
        f"dalorra:{score}:median_reference": f"""
            histogram_quantile(
              0.5,
              max by ({WHOSE}, le) (dalorra_reference_{score}_cdf_ratio)
            )
        """,
    }


def _decisions(window: str) -> dict[str, str]:
    return {
        "dalorra:decision:share": f"""
            sum by ({WHOSE}, decision) (increase(dalorra_predictions_total[{window}]))
            / on ({WHOSE}) group_left ()
            (sum by ({WHOSE}) (increase(dalorra_predictions_total[{window}])) > 0)
        """,
        "dalorra:abstain:ratio": f"""
            sum by ({WHOSE}) (dalorra:decision:share{{decision!="accept"}})
        """,
        "dalorra:abstain:ratio_reference": f"""
            1 - max by ({WHOSE}) (dalorra_reference_decision_ratio{{decision="accept"}})
        """,
    }


def _labels(window: str) -> dict[str, str]:
    # 0.4 sqrt(K / n) is the expected total variation of n draws from K equally likely labels
    return {
        "dalorra:label:share": f"""
            sum by ({WHOSE}, label) (increase(dalorra_predictions_total[{window}]))
            / on ({WHOSE}) group_left ()
            (sum by ({WHOSE}) (increase(dalorra_predictions_total[{window}])) > 0)
        """,
        "dalorra:label:tv": f"""
            0.5
            * sum by ({WHOSE}) (
              abs(
                dalorra:label:share
                - on ({WHOSE}, label)
                max by ({WHOSE}, label) (dalorra_reference_label_ratio)
              )
            )
        """,
        "dalorra:label:tv_noise": f"""
            0.4
            * sqrt(
              count by ({WHOSE}) (dalorra:label:share)
              * (1 / dalorra:drift:rows + 1 / max by ({WHOSE}) (dalorra_reference_rows))
            )
        """,
    }


def feedback_records(settings: RuleSettings) -> dict[str, str]:
    """Return record name to expression: risk and calibration error from true labels."""
    window = settings.feedback_window
    policy = f"{WHOSE}, policy"
    return _cleaned(
        {
            "dalorra:feedback:rows": f"""
                sum by ({WHOSE}) (
                  increase(dalorra_feedback_total{{decision="accept"}}[{window}])
                ) > 0
            """,
            "dalorra:selective_risk:ratio": f"""
                sum by ({WHOSE}) (
                  increase(dalorra_feedback_total{{decision="accept", outcome="wrong"}}[{window}])
                )
                / dalorra:feedback:rows
            """,
            "dalorra:calibration:rows": f"""
                sum by ({WHOSE}) (increase(dalorra_calibration_bin_total[{window}])) > 0
            """,
            "dalorra:calibration:ece": f"""
                sum by ({WHOSE}) (
                  abs(
                    sum by ({WHOSE}, bin) (
                      increase(dalorra_calibration_bin_correct_total[{window}])
                    )
                    - sum by ({WHOSE}, bin) (
                      increase(dalorra_calibration_bin_confidence_sum_total[{window}])
                    )
                  )
                )
                / dalorra:calibration:rows
            """,
            "dalorra:policy_risk:rows": f"max by ({policy}) (dalorra_feedback_rows) > 0",
            "dalorra:policy_risk:ratio": f"""
                sum by ({policy}) (dalorra_feedback_selective_risk_ratio * dalorra_feedback_rows)
                / sum by ({policy}) (dalorra_feedback_rows)
            """,
        }
    )


def service_records(_settings: RuleSettings) -> dict[str, str]:
    """Return record name to expression: errors, waiting and refusals of all replicas together."""
    failed = 'dalorra_http_requests_total{status=~"5.."}'
    return _cleaned(
        {
            **{
                f"dalorra:http_errors:ratio{window}": f"""
                    sum(rate({failed}[{window}]))
                    / (sum(rate(dalorra_http_requests_total[{window}])) > 0)
                """
                for window in ("5m", "30m", "1h", "6h")
            },
            "dalorra:queue_wait_seconds:p99": """
                histogram_quantile(
                  0.99,
                  sum by (le) (rate(dalorra_stage_duration_seconds_bucket{stage="queue"}[5m]))
                ) >= 0
            """,
            "dalorra:rejections:ratio": """
                sum(rate(dalorra_rejections_total{reason="queue_full"}[5m]))
                / (sum(rate(dalorra_http_requests_total[5m])) > 0)
            """,
        }
    )


def clean(expression: str) -> str:
    """Return an expression without the indentation of the code around it."""
    return dedent(expression).strip()


def _cleaned(records: Mapping[str, str]) -> dict[str, str]:
    return {name: clean(expression) for name, expression in records.items()}
