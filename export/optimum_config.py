"""Registers DeepSeek-VL2 with optimum's TasksManager when imported; needs the extra `[optimum]`.

    import vl2.export.optimum_config
    TasksManager.get_exporter_config_constructor("onnx", model_type="deepseek_vl_v2", task="image-text-to-text")

It describes the decoder graph. The export is `vl2 export`'s: optimum-onnx does not run beside transformers 5.
"""

from __future__ import annotations

from typing import Any

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.export.graphs import declare_graphs
from vl2.manifest import Port

try:
    from optimum.exporters.base import ExporterConfig
    from optimum.exporters.tasks import TasksManager
except ImportError as error:
    raise VL2Error(f"optimum cannot be imported: {error}", "pip install '.[optimum]' in vl2's folder") from error

MODEL_TYPE, TASK = "deepseek_vl_v2", "image-text-to-text"
Axes = dict[str, dict[int, str]]


@TasksManager.create_register("onnx")(MODEL_TYPE, TASK)
class VL2OnnxConfig(ExporterConfig):
    """Names and dynamic axes of the decoder graph's ports; `config` is a `vl2.config.ModelConfig`.

    Raises VL2Error for any other: only `load_config` accounts for every key of config.json.
    """

    def __init__(self, config: ModelConfig, task: str = TASK, int_dtype: str = "int64", float_dtype: str = "fp32"):
        if not isinstance(config, ModelConfig):
            raise VL2Error(f"the configuration is a {type(config).__name__}, expected a vl2.config.ModelConfig",
                           "read it with vl2.config.load_config(CHECKPOINT)")  # fmt: skip
        self.task, self.int_dtype, self.float_dtype = task, int_dtype, float_dtype
        self._config = config

    @property
    def inputs(self) -> Axes:
        return _axes(declare_graphs(self._config)["decoder"].inputs)

    @property
    def outputs(self) -> Axes:
        return _axes(declare_graphs(self._config)["decoder"].outputs)

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> dict[str, Any]:
        """Always raises VL2Error: there is nothing for optimum to trace."""
        raise VL2Error("optimum does not export this model", "vl2 export CHECKPOINT --out BUNDLE")


def _axes(ports: tuple[Port, ...]) -> Axes:
    return {port.name: {axis: side for axis, side in enumerate(port.shape) if isinstance(side, str)} for port in ports}
