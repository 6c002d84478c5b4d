"""Chooses lazy layers from data: prompts with images run through our own runtime, at any weight type and without torch."""

from .calibrate import METRICS, Calibration, CalibrationSettings, Measured, calibrate, measure

__all__ = ["METRICS", "Calibration", "CalibrationSettings", "Measured", "calibrate", "measure"]
