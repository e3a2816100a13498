"""What the workstation half and the device half of vl2 must agree on. Imports neither torch nor a backend."""

__version__ = "0.1.0"
