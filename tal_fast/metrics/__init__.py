"""Metrics of failure detection and calibration."""

from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import (
    CONVENTIONS,
    HIGHER_IS_BETTER,
    METRICS,
    aurc_floor,
    aurc_random,
    failure_metrics,
    undefined_reasons,
)
from tal_fast.metrics.ranking import RiskCoverage, risk_coverage_curve, tied_share

__all__ = [
    "CONVENTIONS", "HIGHER_IS_BETTER", "METRICS", "RiskCoverage", "aurc_floor", "aurc_random", "calibration_metrics",
    "failure_metrics", "risk_coverage_curve", "tied_share", "undefined_reasons",
]  # fmt: skip
