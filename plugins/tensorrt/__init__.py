"""Python plugins for TensorRT and TensorRT-RTX over the launch plans of `vl2.plugins.cuda`; building engines."""
