"""`--dry-run`: what a quantization will make and need, before hours are spent on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vl2.cli.progress import format_time
from vl2.errors import VL2Error

if TYPE_CHECKING:
    from vl2.calib.calibration_set import CalibrationSet
    from vl2.calib.data import CalibrationData
    from vl2.config import ModelConfig
    from vl2.quant.quantizer import QuantizeOptions

# Of the rate of large matrix products that the whole work reaches: gathered rows, small matrices, files.
_EFFICIENCY = 0.4
_READ_BYTES_PER_SECOND = 200e6
_EXPORT_SECONDS, _EXPORT_BYTES_PER_SECOND = 30.0, 25e6  # tracing; reading, writing, hashing and the parity run


@dataclass(frozen=True)
class Extent:
    """How much is calibrated on: tokens, of the longest sequence too, and tiles that still have to be encoded."""

    tokens: int = 0
    longest: int = 0
    tiles: int = 0


@dataclass(frozen=True)
class QuantizationPlan:
    """Sizes in bytes; modules: of the quantized checkpoint; disk_bytes: while it works, beside the checkpoint; steps:
    seconds of "images", "quantizing" and "exporting", which includes verification. Memory and time are estimates."""

    checkpoint: str
    recipe: str
    method: str
    calibration_tokens: int
    modules: dict[str, int]
    total_bytes: int
    peak_memory_bytes: int
    disk_bytes: int
    steps: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.steps.values())

    def later(self, step: str) -> float:
        """The time of the steps after this one, in times of this one; 0 where it takes none."""
        following = list(self.steps.values())[list(self.steps).index(step) + 1:]
        return sum(following) / self.steps[step] if self.steps[step] else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self) | {"seconds": self.seconds}

    def describe(self) -> str:
        """The plan as text for a person."""
        told = f"{self.calibration_tokens} calibration tokens" if self.calibration_tokens else "no calibration"
        head = f"{self.checkpoint}: {self.recipe} by {self.method}, {told} → {_size(self.total_bytes)}"
        lines = [head, "", "modules"]
        lines += [f"  {name:20} {_size(size):>10}" for name, size in self.modules.items()]
        return "\n".join([*lines, "", self.needs()])

    def needs(self) -> str:
        """Memory, disk and time as text."""
        return (f"peak memory about {_size(self.peak_memory_bytes)}\n"
                f"disk about {_size(self.disk_bytes)} while it works\ntime roughly {format_time(self.seconds)}")


def product_rate() -> float:
    """Floating-point operations a second that the long steps reach on this machine, roughly."""
    from vl2.calib.demands import matrix_rate

    return _EFFICIENCY * matrix_rate()


def extent_of_set(found: CalibrationSet) -> Extent:
    return Extent(found.tokens, max(sequence.tokens for sequence in found.sequences))


def extent_of_data(data: CalibrationData) -> Extent:
    tokens = [sample.tokens for sample in data.samples]
    return Extent(sum(tokens), max(tokens), sum(sample.tiles for sample in data.samples))


def plan_quantization(
    checkpoint: Path, options: QuantizeOptions, extent: Extent, kept_bytes: int | None = None
) -> QuantizationPlan:
    """kept_bytes: of a number that is not quantized, for a bundle; without it the quantized checkpoint's are meant.

    Raises VL2Error on a bad checkpoint or recipe.
    """
    from vl2.calib import demands as calib
    from vl2.quant import demands as quant
    from vl2.quant.method import METHODS, method_named
    from vl2.quant.plan import planned_sizes
    from vl2.quant.quantizer import recipe_for
    from vl2.quant.recipe import assign_schemes
    from vl2.quant.source import Source

    source = Source(checkpoint)
    config, recipe = source.config, recipe_for(options, source.config)
    schemes, method = assign_schemes(recipe, config), method_named(options.method)
    if not extent.tokens and method.needs_statistics:
        method = METHODS["search"]
    size_bytes = sum(entry.size_bytes for entry in source.entries.values())
    in_source = 4 if any(entry.dtype == "F32" for entry in source.entries.values()) else 2
    modules = planned_sizes(config, schemes, kept_bytes or in_source)
    if kept_bytes is not None:
        modules.pop("vision_pooling_head", None)  # which no graph reads
    work, rate = quant.layer_work(config, schemes, method), product_rate()
    for l in range(config.language_config.num_hidden_layers if extent.tokens else 0):
        work += sum(calib.layer_work(config.language_config, l, extent.tokens).values())
    made_bytes = sum(modules.values())
    steps = {"images": extent.tiles * calib.tile_work(config.vision_config) / rate,
             "quantizing": work / rate + 3 * size_bytes / _READ_BYTES_PER_SECOND,
             "exporting": 0.0 if kept_bytes is None else _EXPORT_SECONDS + made_bytes / _EXPORT_BYTES_PER_SECOND}
    streamed = calib.disk_bytes(config.language_config, extent.tokens) if extent.tokens else 0
    disk = made_bytes + (streamed if kept_bytes is None else max(streamed, made_bytes))
    return QuantizationPlan(str(checkpoint), recipe.name, options.method, extent.tokens, modules, made_bytes,
                            peak_memory_bytes(config, options, extent), disk, steps)


def peak_memory_bytes(config: ModelConfig, options: QuantizeOptions, extent: Extent) -> int:
    """Of calibration and quantization: the stream's own peak, or a part's quantization beside the hidden states."""
    from vl2.calib import demands as calib
    from vl2.quant import demands as quant
    from vl2.quant.method import method_named
    from vl2.quant.quantizer import recipe_for
    from vl2.quant.recipe import assign_schemes

    schemes = assign_schemes(recipe_for(options, config), config)
    hidden = extent.tokens * config.language_config.hidden_size * 4
    quantizing = calib.PROCESS_BYTES + hidden + quant.peak_bytes(config, schemes, method_named(options.method))
    if not extent.tokens:
        return quantizing
    return max(quantizing, calib.peak_bytes(config.language_config, extent.tokens, extent.longest))


def check_memory(config: ModelConfig, options: QuantizeOptions, extent: Extent, limit_bytes: int | None) -> None:
    """Raises VL2Error when more is needed than the limit."""
    needed = peak_memory_bytes(config, options, extent)
    if limit_bytes is not None and needed > limit_bytes:
        raise VL2Error(f"quantizing needs about {_size(needed)} of memory, more than the limit of "
                       f"{_size(limit_bytes)}", "raise --max-ram, or calibrate on fewer --tokens")


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
