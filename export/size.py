"""How large a bundle will be by the forms its matrices would have, before any is quantized."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from vl2.export.checkpoint import Checkpoint, open_checkpoint
from vl2.export.choice import UNPACKED_SCHEME
from vl2.export.facts import copied_contents
from vl2.export.storing import CPU, Storing, check_lowering
from vl2.quantization import WEIGHT, Form

# Bytes of graphs by expert, layer and block of the tower, and of the manifest and the rest: 6 to 8 % more than bundles
# of tiny-mini, small-mini and vl2-nano have.
_EXPERT, _WIDE_EXPERT, _LAYER, _LATENT_LAYER, _BLOCK, _REST = 4_800, 7_100, 28_000, 34_000, 12_000, 30_000
# In the lowering `cpu` attention and experts are one node a layer each.
_NATIVE_LAYER, _NATIVE_LATENT_LAYER, _NATIVE_BLOCK = 8_200, 13_000, 8_400
_PAGE, _ROW = 4096, 64  # where weights, and rows of a stack, begin in a data file
_EMBEDDINGS = ("language.embed_tokens.weight", "image_newline", "view_seperator")

_EXPERT_DOWN = re.compile(r"language\.model\.layers\.\d+\.mlp\.experts\.\d+\.down_proj")

Forms = Mapping[str, Form | None]


def bundle_sizes(folder: Path, lowering: str | None = None, kv_cache: str | None = None) -> Callable[[Forms], int]:
    """A function of the forms by module that gives the bytes of the whole bundle folder, a little too many.

    folder: the unquantized checkpoint; what has no form is stored as fp16.
    """
    checkpoint = open_checkpoint(folder)
    copies = sum(len(content) for content in copied_contents(folder).values())
    lowering = check_lowering(lowering, quantized=True, kv_cache=kv_cache)
    modules = {name: sources[0].removesuffix(WEIGHT) for name, sources in checkpoint.sources.items()}
    graphs = _native_graph_bytes if lowering == CPU else _graph_bytes

    def size(forms: Forms) -> int:
        packed = {name: form for name in checkpoint.shapes if (form := forms.get(modules[name])) is not None}
        storing = Storing(UNPACKED_SCHEME, lowering, checkpoint.shapes, packed)
        return copies + graphs(checkpoint, forms) + sum(_padded(storing, name) for name in checkpoint.shapes)

    return size


def _padded(storing: Storing, parameter: str) -> int:
    """Bytes of a parameter in its data file with the gaps behind its parts."""
    if parameter in _EMBEDDINGS:
        return storing.size_bytes(parameter)
    shape, parts = storing.shapes[parameter], storing.parts_of(parameter)
    copies = shape[0] if len(shape) == 3 and len(parts) > 1 else 1
    matrix = shape[1:] if copies > 1 else shape
    return sum(_up(copies * _up(part.size_bytes(matrix, len(matrix) - 1), _ROW), _PAGE) for part in parts)


def _graph_bytes(checkpoint: Checkpoint, forms: Forms) -> int:
    """INT8 experts are two planes with operators of their own, see `packed_storage`."""
    language, vision = checkpoint.config.language_config, checkpoint.config.vision_config
    layers = language.num_hidden_layers * (_LATENT_LAYER if language.use_mla else _LAYER)
    experts = [form for module, form in forms.items() if _EXPERT_DOWN.fullmatch(module)]
    wide = sum(form is not None and form.bits == 8 for form in experts)
    return _EXPERT * (len(experts) - wide) + _WIDE_EXPERT * wide + layers + _BLOCK * vision.layers + _REST


def _native_graph_bytes(checkpoint: Checkpoint, _: Forms) -> int:
    language, vision = checkpoint.config.language_config, checkpoint.config.vision_config
    layer = _NATIVE_LATENT_LAYER if language.use_mla else _NATIVE_LAYER
    return layer * language.num_hidden_layers + _NATIVE_BLOCK * vision.layers + _REST


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
