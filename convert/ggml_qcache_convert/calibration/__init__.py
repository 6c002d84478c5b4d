"""Chooses and corrects lazy layers from data: prompts with images run through our own runtime, at any weight type and without torch."""

from .calibrate import METRICS, Calibration, CalibrationSettings, Measured, calibrate, measure
from .correct import Corrections
from .looking import LOOK_BLOCK_TOKENS, N_SEQ_MAX
from .report import check_report, write_report

__all__ = [
    "LOOK_BLOCK_TOKENS",
    "METRICS",
    "N_SEQ_MAX",
    "Calibration",
    "CalibrationSettings",
    "Corrections",
    "Measured",
    "calibrate",
    "check_report",
    "measure",
    "write_report",
]
