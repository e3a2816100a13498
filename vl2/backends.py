"""The backends that run bundles, by the names that `--backend` takes: the fastest first, with what each needs."""

AUTO = "auto"
BACKENDS = {
    "trt": "engines of TensorRT that were built for this GPU, TensorRT, cuda-bindings",
    "trt-rtx": "engines of TensorRT-RTX that were built for this GPU, tensorrt-rtx, cuda-bindings",
    "ort-cuda": "onnxruntime-gpu with working CUDA and cuDNN libraries",
    "ort-cpu": "onnxruntime",
}
# Whose engines each runs, as a manifest's `engines` names it.
ENGINES_OF = {"trt": "tensorrt", "trt-rtx": "tensorrt-rtx"}
# What `--device` stands for.
DEVICES = {AUTO: AUTO, "cpu": "ort-cpu", "cuda": "ort-cuda"}
# Of bundles that engines are built of, and that nothing else runs.
ENGINE_LOWERING = "trt"
