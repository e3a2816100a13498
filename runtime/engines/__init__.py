"""Bundles on engines of TensorRT and TensorRT-RTX; neither is imported, nor cuda-bindings, before they are chosen."""
