"""Weight-only quantization: schemes, packing, methods, the quantized checkpoint."""
