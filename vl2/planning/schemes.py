"""How the tensors of a bundle are stored under a scheme, and their bytes: what `vl2.export` and `vl2.quant` decide,
without torch. Tests compare sizes with real exports' plans and forms with `vl2.quant.recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.planning.tensors import Tensor
from vl2.quantization import WEIGHT, Form

FLOAT_BYTES = {"fp32": 4, "fp16": 2}
# Quantized schemes → bits and group of the routed experts; the other Linears of the layers are INT8 in groups of 128.
EXPERT_FORMS = {"int8": (8, 128), "int4": (4, 32), "int4-g64": (4, 64), "int4-g128": (4, 128)}
SCHEMES = (*FLOAT_BYTES, *EXPERT_FORMS)
# As of `vl2 export`: standard operators, onnxruntime's MatMulNBits, or our operator library.
PORTABLE, ORT, CPU = LOWERINGS = ("portable", "ort", "cpu")
_PANEL_ROWS, _PANEL_COLUMNS, _ALIGNMENT = 16, 32, 64  # of the operator library's layout
_SMALLEST_GROUP = 16
_BLOCKS = (256, 128, 64, 32, 16)  # of MatMulNBits on a CPU
_SCALE_BYTES = 2
_BY_HEAD = ".kv_b_proj.weight"  # dequantized at export: it is read by head


@dataclass(frozen=True)
class Choice:
    """A scheme, and how the parts around the decoder's layers are stored under a quantized one: "fp16" or "int8"."""

    scheme: str
    vision: str = "fp16"
    lm_head: str = "fp16"
    embeddings: str = "fp16"

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise VL2Error(f"there is no scheme `{self.scheme}`", f"choose one of {', '.join(SCHEMES)}")
        for name in ("vision", "lm_head", "embeddings"):
            if getattr(self, name) not in ("fp16", "int8"):
                raise VL2Error(f"`{name}` is {getattr(self, name)!r}, expected fp16 or int8")

    @property
    def options(self) -> str:
        """As `vl2 export` takes it, such as `--scheme int4 --vision int8`."""
        given = {"vision": self.vision, "head": self.lm_head, "embeddings": self.embeddings}
        outer = [f"--{name} int8" for name, value in given.items() if value == "int8"]
        return " ".join([f"--scheme {self.scheme}", *(outer if self.scheme in EXPERT_FORMS else [])])


# What a matrix is stored as, None for floats; by tensor.
FormOf = Callable[[Tensor], Form | None]


def form_of_choice(choice: Choice, config: ModelConfig) -> FormOf:
    """The forms that the built-in recipe of a scheme gives."""
    language = config.language_config
    if choice.scheme not in EXPERT_FORMS:
        return lambda tensor: None
    experts = EXPERT_FORMS[choice.scheme]
    # all matrices of an expert share one group
    common = math.gcd(language.hidden_size, language.moe_intermediate_size)
    row_wise = {"fp16": None, "int8": Form(8, None)}

    def form(tensor: Tensor) -> Form | None:
        if not tensor.is_matrix or tensor.module in ("router", "projector"):
            return None
        if tensor.module == "experts":
            return _fitted(*experts, common)
        if tensor.module in ("vision", "embed_tokens"):
            return row_wise[choice.vision if tensor.module == "vision" else choice.embeddings]
        if tensor.module == "lm_head" and choice.lm_head == "fp16":
            return None
        return _fitted(8, 128, tensor.shape[1])

    return form


def form_of_checkpoint(config: ModelConfig) -> FormOf:
    """The forms of a quantized checkpoint, from its config.json."""
    quantization = config.quantization_config
    return lambda tensor: quantization.form_of(tensor.name.removesuffix(WEIGHT)) if tensor.is_matrix else None


def _fitted(bits: int, group: int, inputs: int) -> Form:
    """The group halved until it divides the inputs; where not even 16 does, one scale a row for INT8."""
    while inputs % group and group > _SMALLEST_GROUP:
        group //= 2
    if inputs % group == 0:
        return Form(bits, group)
    if bits == 8:
        return Form(bits, None)
    raise VL2Error(f"experts have {inputs} inputs, which no group from {group} up divides", "take the scheme int8")


def stored_bytes(tensor: Tensor, form: Form | None, float_bytes: int, lowering: str) -> int:
    """Bytes of all copies in a bundle; float_bytes: of a number of a matrix that is not quantized."""
    if lowering == CPU and _is_native(tensor):
        return tensor.copies * _panel_bytes(*tensor.shape, form)
    if form is None:
        wide = len(tensor.shape) == 1 or tensor.module == "router"
        return tensor.parameters * (4 if wide else float_bytes)
    if tensor.name.endswith(_BY_HEAD) and lowering != PORTABLE:
        return tensor.parameters * 4
    rows, columns = tensor.shape
    plain = lowering == PORTABLE or tensor.module in ("vision", "projector", "embed_tokens")
    block = None if plain else _block(form, columns)
    if block is None:
        codes, scales = -(-rows * columns * form.bits // 8), rows * form.scale_columns(columns)
    else:
        blocks = -(-columns // block)
        codes, scales = rows * blocks * block * form.bits // 8, rows * blocks
    return tensor.copies * (codes + scales * _SCALE_BYTES)


def _is_native(tensor: Tensor) -> bool:
    """Whether the operator library multiplies with it."""
    return tensor.is_matrix and tensor.module not in ("embed_tokens", "router") and not tensor.name.endswith(_BY_HEAD)


def _panel_bytes(rows: int, columns: int, form: Form | None) -> int:
    """A matrix in panels of 16 rows, its columns filled to a multiple of 32, its scales to 64 bytes a panel."""
    bits, groups = 16, 0
    if form is not None:
        size = form.group_size or columns
        # groups that are no multiple of 32 columns are stored as smaller ones, but one scale a row stays one
        stored = size if size == columns or size % _PANEL_COLUMNS == 0 else math.gcd(size, _PANEL_COLUMNS)
        bits, groups = form.bits, columns // stored
    scales = -(-groups * _PANEL_ROWS * _SCALE_BYTES // _ALIGNMENT) * _ALIGNMENT
    filled = -(-columns // _PANEL_COLUMNS) * _PANEL_COLUMNS
    return -(-rows // _PANEL_ROWS) * (scales + filled * _PANEL_ROWS * bits // 8)


def _block(form: Form, columns: int) -> int | None:
    group = columns if form.group_size is None else form.group_size
    divisor = next((block for block in _BLOCKS if group % block == 0), None)
    return _BLOCKS[-1] if divisor is None and group == columns else divisor


@dataclass(frozen=True)
class Storage:
    """Bytes by module as a bundle holds them, and of them what one decode step reads.

    float_bytes: of a number that is not quantized; widened_bytes: of the largest float matrix of the decoder once
    float32, where it is stored narrower and widened at its use.
    kv_cache: how backends of onnxruntime hold it, as `vl2 export` names it.
    """

    modules: dict[str, int]
    read: dict[str, float]
    float_bytes: int
    quantized: bool
    lowering: str
    widened_bytes: int = 0
    kv_cache: str = "fp32"

    @property
    def total_bytes(self) -> int:
        return sum(self.modules.values())

    @property
    def vision_bytes(self) -> int:
        """Weights of the vision graph."""
        return sum(self.modules.get(name, 0) for name in ("vision", "projector"))

    @property
    def decoder_bytes(self) -> int:
        """Weights of the decoder graph."""
        return self.total_bytes - self.vision_bytes - self.modules.get("embed_tokens", 0)

    @property
    def read_bytes(self) -> float:
        """Weights that one decode step reads."""
        return sum(self.read.values())


def storage_of(tensors: Iterable[Tensor], form_of: FormOf, float_bytes: int, lowering: str | None = None) -> Storage:
    """The storage of a model under the forms of its matrices; lowering: None as `vl2 export` chooses.

    Raises VL2Error for a lowering that does not hold them.
    """
    forms = {tensor: form_of(tensor) for tensor in tensors}
    quantized = any(form is not None for form in forms.values())
    lowering = lowering or (ORT if quantized else PORTABLE)
    _check_lowering(lowering, quantized, float_bytes)
    modules: dict[str, int] = {}
    read: dict[str, float] = {}
    widened = 0
    for tensor, form in forms.items():
        size = stored_bytes(tensor, form, float_bytes, lowering)
        modules[tensor.module] = modules.get(tensor.module, 0) + size
        read[tensor.module] = read.get(tensor.module, 0.0) + size * tensor.share
        narrow = form is None and tensor.is_matrix and float_bytes < 4 and tensor.module != "router"
        if narrow and tensor.share and not (lowering == CPU and _is_native(tensor)):
            widened = max(widened, 4 * math.prod(tensor.shape))
    read = {name: size for name, size in read.items() if size}
    return Storage(modules, read, float_bytes, quantized, lowering, widened)


def _check_lowering(lowering: str, quantized: bool, float_bytes: int) -> None:
    if lowering not in LOWERINGS:
        raise VL2Error(f"there is no lowering `{lowering}`", f"choose one of {', '.join(LOWERINGS)}")
    if lowering == ORT and not quantized:
        raise VL2Error("the lowering `ort` is for quantized checkpoints", "leave it out, or take int8 or int4")
    if lowering == CPU and float_bytes == 4:
        raise VL2Error("the lowering `cpu` holds codes and float16, not float32", "take --scheme fp16, int8 or int4")
