"""Whether a model fits a device and how fast it may be there, from configurations alone: no weights, no torch."""
