"""Quality of predictions: uncertainty, calibration, ranking by confidence, paired comparisons.

Pure functions of tensors. They know nothing of models, files or the server; telemetry (what
Prometheus scrapes) lives elsewhere. Everything is computed in float64, in nats, and every
docstring says which direction is better.
"""

from dalorra_core.metrics.bootstrap import BootstrapInterval, bootstrap_interval
from dalorra_core.metrics.calibration import (
    NoiseFloor,
    ReliabilityBins,
    adaptive_ece,
    bin_index,
    brier,
    classwise_ece,
    ece,
    ece_noise_floor,
    nll,
    reliability_bins,
)
from dalorra_core.metrics.paired import (
    PairedDifference,
    RowDraw,
    SeedScores,
    Standing,
    holm,
    paired_difference,
    seed_scores,
    standing,
    swap_p_value,
)
from dalorra_core.metrics.resampled import one_by_one
from dalorra_core.metrics.scored import (
    METRICS,
    Metric,
    ScoredRows,
    detection_scores,
    metric_scores,
    with_outside,
)
from dalorra_core.metrics.selective import (
    Detection,
    RiskCoverageCurve,
    augrc,
    aurc,
    auroc,
    detection_at_threshold,
    risk_coverage_curve,
    selective_risk,
)
from dalorra_core.metrics.uncertainty import (
    UncertaintySummary,
    confidence,
    confidence_std,
    expected_entropy,
    log_mean_probs,
    mean_probs,
    mutual_information,
    normalized_entropy,
    predictive_entropy,
    summarise,
    variation_ratio,
)

__all__ = [
    "METRICS",
    "BootstrapInterval",
    "Detection",
    "Metric",
    "NoiseFloor",
    "PairedDifference",
    "ReliabilityBins",
    "RiskCoverageCurve",
    "RowDraw",
    "ScoredRows",
    "SeedScores",
    "Standing",
    "UncertaintySummary",
    "adaptive_ece",
    "augrc",
    "aurc",
    "auroc",
    "bin_index",
    "bootstrap_interval",
    "brier",
    "classwise_ece",
    "confidence",
    "confidence_std",
    "detection_at_threshold",
    "detection_scores",
    "ece",
    "ece_noise_floor",
    "expected_entropy",
    "holm",
    "log_mean_probs",
    "mean_probs",
    "metric_scores",
    "mutual_information",
    "nll",
    "normalized_entropy",
    "one_by_one",
    "paired_difference",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage_curve",
    "seed_scores",
    "selective_risk",
    "standing",
    "summarise",
    "swap_p_value",
    "variation_ratio",
    "with_outside",
]
