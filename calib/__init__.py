"""Calibration data and statistics, collected layer by layer."""
