"""The facts of config.json, under the checkpoint's own names.

The published files omit every key that equals a default of the original classes, so the defaults live here
(specification, section 1.1). Reading refuses what it does not know: see `config_keys`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl2.config_keys import check_choice, check_type, read_section
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.quantization import QuantizationConfig


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP tower. `global_pool` "map" means that the file also holds the unused pooling head, "" that it does not."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    global_pool: str = "map"

    def __post_init__(self) -> None:
        _check_positive("vision_config", self, "image_size", "patch_size", "width", "layers", "heads", "mlp_ratio")
        check_choice("vision_config.global_pool", self.global_pool, ("map", ""))
        _check_divides("vision_config.heads", self.heads, "width", self.width)

    @property
    def grid(self) -> int:
        """Patches on a side; pixels beyond grid · patch_size are not seen."""
        return self.image_size // self.patch_size

    @property
    def mlp_hidden(self) -> int:
        """Truncated, not rounded: 1152 · 3.7362 gives 4304."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class ProjectorConfig:
    """Two or more linear layers on blocks of downsample_ratio² neighbouring tokens."""

    input_dim: int = 1152
    n_embed: int = 2048
    depth: int = 2
    mlp_ratio: int = 1
    downsample_ratio: int = 2

    def __post_init__(self) -> None:
        _check_positive("projector_config", self, "input_dim", "n_embed", "mlp_ratio", "downsample_ratio")
        if self.depth < 2:
            raise VL2Error(f"`projector_config.depth` is {self.depth}, expected 2 or more")


@dataclass(frozen=True)
class RopeScaling:
    """`rope_scaling` of the language part (specification, section 8.1); the last five fields belong to yarn."""

    type: str
    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @staticmethod
    def from_dict(values: Any, use_mla: bool) -> RopeScaling:
        name = "language_config.rope_scaling"
        if not isinstance(values, dict) or not {"type", "factor"} <= values.keys():
            raise VL2Error(f"`{name}` is {values!r}, expected null or an object with `type` and `factor`")
        check_choice(f"{name}.type", values["type"], ("linear", "dynamic", *(("yarn",) if use_mla else ())))
        known = set(RopeScaling.__dataclass_fields__) if values["type"] == "yarn" else {"type", "factor"}
        for key, value in values.items():
            if key not in known:
                raise VL2Error(f"config.json has the unknown key `{name}.{key}` (type {values['type']!r})")
            if key == "original_max_position_embeddings":
                check_type(f"{name}.{key}", value, int)
            elif key != "type":
                check_type(f"{name}.{key}", value, float)
        if values["factor"] < 1:
            raise VL2Error(f"`{name}.factor` is {values['factor']}, expected 1 or more")
        return RopeScaling(**values)


@dataclass(frozen=True)
class LanguageConfig:
    """The DeepSeek-V2/V3 decoder with plain attention (use_mla false) or latent attention."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    routed_scaling_factor: float = 1.0
    kv_lora_rank: int | None = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    topk_method: str = "gready"  # (sic) the original's default, which selects nothing
    n_group: int | None = None
    topk_group: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = None
    bos_token_id: int = 100000
    eos_token_id: int = 100001
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    use_mla: bool = True

    def __post_init__(self) -> None:
        _check_positive("language_config", self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        _check_positive("language_config", self, "num_attention_heads", "moe_layer_freq", "max_position_embeddings")
        _check_positive("language_config", self, "rope_theta", "rms_norm_eps")
        if self.use_mla:
            _check_latent(self)
        else:
            _check_plain(self)
        if self.n_routed_experts is not None:
            _check_experts(self)

    @property
    def head_dim(self) -> int:
        """Width of one query and key head: plain H / heads, latent nope + rope."""
        if self.use_mla:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    def is_moe(self, l: int) -> bool:
        """Whether decoder layer l routes to experts (specification, end of section 2)."""
        return self.n_routed_experts is not None and l >= self.first_k_dense_replace and l % self.moe_layer_freq == 0


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint. `candidate_resolutions` are (width, height) in pixels, in the file's order."""

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    projector_config: ProjectorConfig = field(default_factory=ProjectorConfig)
    language_config: LanguageConfig = field(default_factory=LanguageConfig)
    tile_tag: str = "2D"
    global_view_pos: str = "head"
    candidate_resolutions: tuple[tuple[int, int], ...] = ((384, 384),)
    quantization_config: QuantizationConfig | None = None  # None: no matrix is packed

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """Raises VL2Error naming the first key that is unknown, unsupported or inconsistent with another."""
        sections = ("vision_config", "projector_config", "language_config")
        found = read_section(ModelConfig, "config", values, (*sections, "candidate_resolutions", "quantization_config"))
        for section, cls in zip(sections, (VisionConfig, ProjectorConfig, LanguageConfig), strict=True):
            given = read_section(cls, section, found.get(section, {}), ("rope_scaling",))
            if given.get("rope_scaling") is not None:
                given["rope_scaling"] = RopeScaling.from_dict(given["rope_scaling"], given.get("use_mla", True))
            found[section] = cls(**given)
        if "tile_tag" not in found:
            raise VL2Error('config.json lacks `tile_tag`, expected "2D"')
        if "candidate_resolutions" in found:
            found["candidate_resolutions"] = _resolutions(found["candidate_resolutions"])
        if found.get("quantization_config") is not None:
            found["quantization_config"] = QuantizationConfig.from_dict(found["quantization_config"])
        return ModelConfig(**found)

    def __post_init__(self) -> None:
        check_choice("tile_tag", self.tile_tag, ("2D",))
        check_choice("global_view_pos", self.global_view_pos, ("head", "tail"))
        vision, projector, language = self.vision_config, self.projector_config, self.language_config
        _check_same("projector_config.input_dim", projector.input_dim, "vision_config.width", vision.width)
        _check_same("projector_config.n_embed", projector.n_embed, "language_config.hidden_size", language.hidden_size)
        _check_same("candidate_resolutions[0][0]", self.tile_size, "vision_config.image_size", vision.image_size)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        return self.candidate_resolutions[0][0]

    @property
    def tokens_per_side(self) -> int:
        """Projected tokens on a side of a tile."""
        return math.ceil(self.vision_config.grid / self.projector_config.downsample_ratio)

    @property
    def variant(self) -> str:
        """One of "tiny", "small", "base" by the structure of attention and router, not the sizes; else "custom"."""
        language = self.language_config
        structure = (language.use_mla, language.scoring_func, language.topk_method)
        named = {
            (False, "softmax", "greedy"): "tiny",
            (True, "softmax", "greedy"): "small",
            (True, "sigmoid", "noaux_tc"): "base",
        }
        return named.get(structure, "custom") if language.n_routed_experts is not None else "custom"


def load_config(folder: Path | str) -> ModelConfig:
    """Reads `folder`/config.json. Raises VL2Error on a missing or broken file and as `ModelConfig.from_dict` does."""
    path = Path(folder) / "config.json"
    values = read_json(path)
    try:
        return ModelConfig.from_dict(values)
    except VL2Error as error:
        raise VL2Error(f"{path}: {error.message}", error.hint) from error


def _resolutions(values: Any) -> tuple[tuple[int, int], ...]:
    pairs = values if isinstance(values, list) and values else [None]
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)):
            raise VL2Error(f"`candidate_resolutions` has the entry {pair!r}, expected [width, height] in pixels")
    side = pairs[0][0]
    for width, height in pairs:
        if width % side or height % side:
            raise VL2Error(f"`candidate_resolutions` has {width}×{height}, not a multiple of the tile side {side}")
    return tuple((width, height) for width, height in pairs)


def _check_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise VL2Error(f"`{section}.{name}` is {getattr(config, name)}, expected more than 0")


def _check_divides(name: str, divisor: int, of: str, value: int) -> None:
    if value % divisor:
        raise VL2Error(f"`{name}` is {divisor}, which does not divide {of} {value}")


def _check_same(name: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise VL2Error(f"`{name}` is {value}, but `{other}` is {expected}; they must agree")


def _check_plain(config: LanguageConfig) -> None:
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    _check_divides("language_config.num_attention_heads", heads, "hidden_size", config.hidden_size)
    if kv_heads <= 0:
        raise VL2Error(f"`language_config.num_key_value_heads` is {kv_heads}, expected more than 0")
    _check_divides("language_config.num_key_value_heads", kv_heads, "num_attention_heads", heads)
    if config.head_dim % 2:
        raise VL2Error(f"`language_config.hidden_size` / num_attention_heads is {config.head_dim}, expected even")


def _check_latent(config: LanguageConfig) -> None:
    if config.kv_lora_rank is None:
        raise VL2Error("`language_config.kv_lora_rank` is null, expected a number when use_mla is true")
    _check_positive("language_config", config, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    if config.q_lora_rank is not None:
        _check_positive("language_config", config, "q_lora_rank")
    if config.qk_rope_head_dim % 2:
        raise VL2Error(f"`language_config.qk_rope_head_dim` is {config.qk_rope_head_dim}, expected an even number")


def _check_experts(config: LanguageConfig) -> None:
    _check_positive("language_config", config, "n_routed_experts", "moe_intermediate_size")
    name, experts, chosen = "language_config.num_experts_per_tok", config.n_routed_experts, config.num_experts_per_tok
    if chosen is None or not 1 <= chosen <= experts:
        raise VL2Error(f"`{name}` is {chosen}, expected 1 to n_routed_experts = {experts}")
    if config.n_shared_experts is not None:
        _check_positive("language_config", config, "n_shared_experts")
    check_choice("language_config.scoring_func", config.scoring_func, ("softmax", "sigmoid"))
    check_choice("language_config.topk_method", config.topk_method, ("greedy", "group_limited_greedy", "noaux_tc"))
    if config.topk_method != "greedy":
        _check_groups(config)


def _check_groups(config: LanguageConfig) -> None:
    groups, kept, experts = config.n_group, config.topk_group, config.n_routed_experts
    if groups is None or groups < 1 or experts % groups:
        raise VL2Error(f"`language_config.n_group` is {groups}, expected a divisor of n_routed_experts {experts}")
    if kept is None or not 1 <= kept <= groups:
        raise VL2Error(f"`language_config.topk_group` is {kept}, expected 1 to n_group = {groups}")
    if config.topk_method == "noaux_tc" and experts // groups < 2:
        raise VL2Error(f"`language_config.n_group` is {groups}: noaux_tc needs two or more experts in a group")
