"""Operators that ONNX does not have; one folder an operator, its eager body is its reference."""
