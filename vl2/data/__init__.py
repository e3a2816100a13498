"""What users bring as data: one reader a format, shared by calibration and evaluation."""
