"""What quantizing asks of a machine beside calibration's own needs: memory at its peak, and work.

Estimates, rather too high; `benchmarks/` and docs/results.md have the measured figures.
"""

from __future__ import annotations

from collections.abc import Mapping

from vl2.config import LanguageConfig, ModelConfig
from vl2.quant.linears import HEAD, WEIGHT, matrices
from vl2.quant.method import CHUNK_ELEMENTS, Method
from vl2.quant.parts import Part, part_of
from vl2.quant.scheme import Scheme
from vl2.quant.sites import Site, Unit, layer_units

_FLOAT = 4
_HESSIANS = {False: 3, True: 6}  # raw, blended and scaled; GPTQ: two of damped, factor, inverse and its factor, and one
_SAMPLED_HESSIANS = 20  # of experts while AWQ searches a layer's common scale
_CHUNK_COPIES = 10  # of a weight's rows while candidates are compared, float32
_FOLD_COPIES = 4  # of a weight while a fold is applied in float64
_SEARCH_STEPS, _FOLD_STEPS = 21, 82  # passes over a weight: clippings; AWQ's 41 candidates, each rounded and compared
_FOLD_ROWS = 0.25  # of a weight's rows that AWQ looks at
_STEP_WORK = 300.0  # of such a pass for one weight, in floating-point operations of a matrix product


def peak_bytes(config: ModelConfig, schemes: Mapping[str, Scheme | None], method: Method) -> int:
    """Memory of `Quantizer.quantize_part` at its peak, in its largest part, without the process itself."""
    shapes = matrices(config)
    held: dict[Part, int] = {}
    working: dict[Part, int] = {}
    for module, (rows, columns) in shapes.items():
        part, scheme = part_of(module + WEIGHT), schemes[module]
        size = 2 * rows * columns if scheme is None else rows * columns * (8 + scheme.bits) // 8
        held[part] = held.get(part, 0) + size
        alone = 0 if scheme is None else _matrix_bytes(rows * columns, 0)
        working[part] = max(working.get(part, 0), alone)
    for part in held:
        for unit in _units(config, part):
            sizes = (_site_bytes(shapes, site, method) for site in unit.sites if schemes[site.consumers[0]])
            working[part] = max(working[part], *sizes, 0)
    return max(held[part] + working[part] for part in held)


def layer_work(config: ModelConfig, schemes: Mapping[str, Scheme | None], method: Method) -> float:
    """Operations of quantizing all decoder layers, in floating-point operations of a matrix product."""
    shapes, total = matrices(config), 0.0
    for part in {part_of(module + WEIGHT) for module in shapes}:
        for unit in _units(config, part):
            total += sum(_site_work(shapes, site, method) for site in unit.sites if schemes[site.consumers[0]])
    return total


def _units(config: ModelConfig, part: Part) -> list[Unit]:
    language: LanguageConfig = config.language_config
    if part.layer is not None:
        return layer_units(language, part.layer, part.stage)
    return [Unit((Site("lm_head.input", (HEAD,)),))] if part.stage == "head" else []


def _size(shapes: Mapping[str, tuple[int, int]], site: Site) -> tuple[int, int]:
    """Rows of all consumers together, and their columns."""
    return sum(shapes[module][0] for module in site.consumers), shapes[site.consumers[0]][1]


def _site_bytes(shapes: Mapping[str, tuple[int, int]], site: Site, method: Method) -> int:
    rows, columns = _size(shapes, site)
    hessians = _HESSIANS[_uses_gptq(method)]
    if method.folds and site.norm is not None:
        hessians = max(hessians, _SAMPLED_HESSIANS)
    largest = max(shapes[module][0] for module in site.consumers) * columns
    folded = _FOLD_COPIES * largest if method.folds and (site.norm or site.row_source) else 0
    copies = folded + (rows * columns if len(site.consumers) > 1 else 0)
    return hessians * columns**2 * _FLOAT + _matrix_bytes(rows * columns, copies)


def _matrix_bytes(elements: int, copied: int) -> int:
    return (elements + copied + _CHUNK_COPIES * min(elements, CHUNK_ELEMENTS)) * _FLOAT


def _site_work(shapes: Mapping[str, tuple[int, int]], site: Site, method: Method) -> float:
    rows, columns = _size(shapes, site)
    loops = sum(name.startswith("gptq") for name in method.candidates)
    passes = 3.0 + _SEARCH_STEPS * ("search" in method.candidates) + _FOLD_STEPS * _FOLD_ROWS * method.folds
    tried = 1 + 2 * _FOLD_ROWS * method.folds
    products = 2.0 * rows * columns**2 * (2 + loops + len(method.candidates)) * tried
    return products + 1.5 * columns**3 * bool(loops) * (1 + 2 * method.folds) + passes * _STEP_WORK * rows * columns


def _uses_gptq(method: Method) -> bool:
    return any(name.startswith("gptq") for name in method.candidates)
