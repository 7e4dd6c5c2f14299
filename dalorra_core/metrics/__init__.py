"""Quality of predictions: uncertainty per row, calibration, ranking by confidence, intervals.

Pure functions of tensors. They know nothing of models, files or the server; telemetry (what
Prometheus scrapes) lives elsewhere. Everything is computed in float64, in nats, and every
docstring says which direction is better.
"""

from dalorra_core.metrics.bootstrap import BootstrapInterval, bootstrap_interval
from dalorra_core.metrics.calibration import (
    NoiseFloor,
    ReliabilityBins,
    adaptive_ece,
    brier,
    classwise_ece,
    ece,
    ece_noise_floor,
    nll,
    reliability_bins,
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
    "BootstrapInterval",
    "Detection",
    "NoiseFloor",
    "ReliabilityBins",
    "RiskCoverageCurve",
    "UncertaintySummary",
    "adaptive_ece",
    "augrc",
    "aurc",
    "auroc",
    "bootstrap_interval",
    "brier",
    "classwise_ece",
    "confidence",
    "confidence_std",
    "detection_at_threshold",
    "ece",
    "ece_noise_floor",
    "expected_entropy",
    "log_mean_probs",
    "mean_probs",
    "mutual_information",
    "nll",
    "normalized_entropy",
    "predictive_entropy",
    "reliability_bins",
    "risk_coverage_curve",
    "selective_risk",
    "summarise",
    "variation_ratio",
]
