"""Where a quantized checkpoint lost what it lost: both checkpoints over the same inputs, layer by layer."""
