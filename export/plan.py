"""What an export will make and need, from headers alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vl2.export.checkpoint import Checkpoint, open_checkpoint
from vl2.export.choice import bundle_scheme, choose_storing
from vl2.export.facts import copied_contents
from vl2.export.storing import Storing
from vl2.manifest import ModuleFacts
from vl2.modules import module_of

if TYPE_CHECKING:
    from vl2.export.bundle import ExportOptions

# Measured with benchmarks/export_fullsize.py; docs/results.md has the runs.
_PYTHON_BYTES = 700 << 20  # torch, onnx, a traced graph and one block of a tensor
_BYTES_PER_SECOND = 150e6  # read, converted, hashed twice and written, on 2 cores
_SECONDS_PER_LAYER = 2.5  # tracing a layer of the decoder; a block of the tower takes a third


@dataclass(frozen=True)
class ExportPlan:
    """Sizes in bytes. verify_memory_bytes: of the parity run, which maps the new weights and may drop these pages."""

    source: str
    variant: str
    scheme: str
    lowering: str
    checkpoint_bytes: int
    graphs: dict[str, int]
    modules: dict[str, ModuleFacts]
    bundle_bytes: int
    peak_memory_bytes: int
    verify_memory_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)

    def describe(self) -> str:
        """The plan as text for a person."""
        lines = [
            f"{self.source}: {self.variant}, {_size(self.checkpoint_bytes)} → {self.scheme} bundle of "
            f"{_size(self.bundle_bytes)}, lowering {self.lowering}",
            "",
            "graphs",
            *(f"  {name:20} {_size(size_bytes):>10}" for name, size_bytes in self.graphs.items()),
            "",
            "modules",
            *(
                f"  {name:20} {facts.parameters:>16,} {_size(facts.size_bytes):>10}"
                for name, facts in self.modules.items()
            ),
            "",
            f"peak memory about {_size(self.peak_memory_bytes)}, with verification {_size(self.verify_memory_bytes)}",
            f"time about {_time(self.seconds)}, without verification",
        ]
        return "\n".join(lines)


def plan_export(source: Path, options: ExportOptions) -> ExportPlan:
    """The plan of `export_checkpoint(source, …, options)`; writes nothing. Raises VL2Error on a bad checkpoint."""
    checkpoint = open_checkpoint(Path(source))
    return plan_checkpoint(checkpoint, choose_storing(checkpoint, options))


def plan_checkpoint(checkpoint: Checkpoint, storing: Storing) -> ExportPlan:
    """As `plan_export`, of an opened checkpoint."""
    graphs = dict.fromkeys(("vision", "decoder", "embeddings"), 0)
    modules: dict[str, ModuleFacts] = {}
    for parameter, shape in checkpoint.shapes.items():
        elements = math.prod(shape)
        size_bytes = storing.size_bytes(parameter)
        graphs[_graph_of(parameter)] += size_bytes
        module = module_of(checkpoint.sources[parameter][0])
        old = modules.get(module, ModuleFacts(0, 0))
        modules[module] = ModuleFacts(old.parameters + elements, old.size_bytes + size_bytes)
    copies = sum(len(content) for content in copied_contents(checkpoint.folder).values())
    checkpoint_bytes = sum(path.stat().st_size for path in checkpoint.weight_files)
    config = checkpoint.config
    layers = config.language_config.num_hidden_layers + config.vision_config.layers / 3
    return ExportPlan(
        source=str(checkpoint.folder),
        variant=config.variant,
        scheme=bundle_scheme(checkpoint, storing),
        lowering=storing.lowering,
        checkpoint_bytes=checkpoint_bytes,
        graphs=graphs,
        modules=modules,
        bundle_bytes=sum(graphs.values()) + copies,
        peak_memory_bytes=_PYTHON_BYTES,
        verify_memory_bytes=_PYTHON_BYTES + _largest_block_bytes(checkpoint),
        seconds=(checkpoint_bytes + sum(graphs.values())) / _BYTES_PER_SECOND + layers * _SECONDS_PER_LAYER,
    )


def _graph_of(parameter: str) -> str:
    if parameter.startswith(("vision.", "projector.")):
        return "vision"
    in_decoder = parameter.startswith("language.") and not parameter.startswith("language.embed_tokens.")
    return "decoder" if in_decoder else "embeddings"


def _largest_block_bytes(checkpoint: Checkpoint) -> int:
    """The biggest layer (or head) as float32: what the parity run holds at a time."""
    blocks: dict[str, int] = {}
    for parameter, shape in checkpoint.shapes.items():
        block = ".".join(parameter.split(".")[:3])
        blocks[block] = blocks.get(block, 0) + 4 * math.prod(shape)
    return max(blocks.values())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
