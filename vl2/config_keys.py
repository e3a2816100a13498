"""Reading one section of config.json: every key is used, is on a written list with a reason, or is refused by name."""

from __future__ import annotations

import math
import types
import typing
from dataclasses import fields
from typing import Any

from vl2.errors import VL2Error

_PROVENANCE = "says where the file came from, not what is computed"
_DTYPE = "the dtype of the files is read from their headers; the dtype of a run is an option"
_GENERATION = "default of the original generate(); vl2's generation options are explicit"
_OUTPUT = "chooses what the original's Python call returns"
_TRAINING = "has an effect in the original's training only"
_NO_HEAD = "names labels of a classification head, which this family does not have"
_EXTRA = "extra key of the published files that the original code never reads"

_GENERATION_KEYS = (
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k "
    "top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids "
    "num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens "
    "exponential_decay_length_penalty begin_suppress_tokens decoder_start_token_id"
).split()
_OUTPUT_KEYS = (
    "return_dict output_hidden_states output_attentions output_scores return_dict_in_generate use_cache"
).split()
_NO_HEAD_KEYS = "finetuning_task id2label label2id problem_type task_specific_params".split()

# Keys of the Hugging Face base configuration that any section may carry and that change no result.
BASE_KEYS: dict[str, str] = {
    "_name_or_path": _PROVENANCE,
    "_commit_hash": _PROVENANCE,
    "architectures": _PROVENANCE,
    "auto_map": _PROVENANCE,
    "transformers_version": _PROVENANCE,
    "tokenizer_class": "the tokenizer is read from tokenizer.json",
    "prefix": "the prompt is built by vl2.prompt",
    "sep_token_id": "this family has no separator token",
    "torch_dtype": _DTYPE,
    "dtype": _DTYPE,
    "_attn_implementation_autoset": "which kernel the original uses for the same attention",
    "attn_implementation": "which kernel the original uses for the same attention",
    "_attn_implementation": "which kernel the original uses for the same attention",
    "chunk_size_feed_forward": "splits the original's feed-forward in time, with the same result",
    "torchscript": "how the original is traced",
    "use_bfloat16": _DTYPE,
    "tf_legacy_loss": _TRAINING,
    "tie_encoder_decoder": "there is no encoder-decoder pair to tie",
    "cross_attention_hidden_size": "there is no cross attention",
    "is_decoder": "the original's decoder is causal whatever this says",
    **dict.fromkeys(_GENERATION_KEYS, _GENERATION),
    **dict.fromkeys(_OUTPUT_KEYS, _OUTPUT),
    **dict.fromkeys(_NO_HEAD_KEYS, _NO_HEAD),
}

# Base keys that would change the computation: only the value with no effect is accepted.
BASE_VALUES: dict[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

_LANGUAGE_DECIDES = dict.fromkeys(
    ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    "base keys of every section; the original reads those of language_config",
)

# Per section: keys without effect here, beside the base keys.
SECTION_KEYS: dict[str, dict[str, str]] = {
    "config": _LANGUAGE_DECIDES,
    "vision_config": {
        **_LANGUAGE_DECIDES,
        "model_name": "names the tower; its sizes are separate keys",
        "use_checkpoint": _TRAINING,
    },
    "projector_config": _LANGUAGE_DECIDES,
    "language_config": {
        "lm_head": _EXTRA,
        "rm_head": _EXTRA,
        "aux_loss_alpha": _TRAINING,
        "seq_aux": _TRAINING,
        "attention_dropout": _TRAINING,
    },
}

# Per section: keys of which one value (or a few) is supported, and nothing depends on which.
SECTION_VALUES: dict[str, dict[str, tuple[Any, ...]]] = {
    "config": {"model_type": ("deepseek_vl_v2",)},
    "vision_config": {
        "model_type": ("vision",),
        "class_token": (False,),
        "ignore_head": (True,),
        "num_classes": (0,),
    },
    "projector_config": {
        "model_type": ("mlp_projector",),
        "projector_type": ("downsample_mlp_gelu",),
        "token_pooling": (False,),
    },
    "language_config": {
        "model_type": ("deepseek_v2",),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "ep_size": (1,),
        "pretraining_tp": (1,),
    },
}


def read_section(cls: type, section: str, values: Any, special: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keyword arguments of `cls` found in one section of config.json, checked for type.

    `special` names fields that the caller parses himself. Raises VL2Error naming the first unknown key, unsupported
    value or wrong type.
    """
    if not isinstance(values, dict):
        raise VL2Error(f"`{section}` is {type(values).__name__}, expected a JSON object")
    kinds = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    allowed = BASE_VALUES | SECTION_VALUES[section]
    found = {}
    for key, value in values.items():
        if key in known:
            if key not in special:
                check_type(f"{section}.{key}", value, kinds[key])
            found[key] = float(value) if kinds[key] is float else value
        elif key in allowed:
            check_choice(f"{section}.{key}", value, allowed[key])
        elif key not in BASE_KEYS and key not in SECTION_KEYS[section]:
            raise VL2Error(
                f"config.json has the unknown key `{section}.{key}` (value {value!r})",
                "vl2 refuses keys it does not know, since they may change what the model computes; "
                "if this one does not, remove it from a copy of the file",
            )
    return found


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raises VL2Error naming the key unless `value` is one of `choices` (True is not 1)."""
    if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in choices):
        expected = " or ".join(repr(c) for c in choices)
        raise VL2Error(f"`{name}` is {value!r}, which is not supported; expected {expected}")


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raises VL2Error unless `value` is of the annotated kind: int, float, bool, str or one of them or None."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    accepted = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if isinstance(value, bool):
        accepted = bool in kinds
    elif isinstance(value, float):
        accepted = accepted and math.isfinite(value)
    if not accepted:
        expected = " or ".join("null" if k is types.NoneType else k.__name__ for k in kinds)
        raise VL2Error(f"`{name}` is {value!r}, expected {expected}")
