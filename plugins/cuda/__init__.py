"""CUDA kernels of the operators: launch plans, the compiled pack, and an emulation of the same source on a CPU."""
