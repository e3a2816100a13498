"""Greedy generation with the reference model: the slow truth for the runtime and for exported graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vl2.model.attention import Cache
from vl2.model.decoder import append_cache, positions_from_mask
from vl2.model.vl2 import DeepseekVL2


@dataclass(frozen=True)
class GreedyOptions:
    """`penalised_ids` [B, n]: ids that the repetition penalty counts beside the new ones (the prompt's, or None)."""

    max_new_tokens: int = 24
    prefill_chunk: int | None = None
    repetition_penalty: float = 1.0
    penalised_ids: Tensor | None = None


class Generated(NamedTuple):
    """ids int64 [B, N] and the logits they were the argmax of, before the penalty, float32 [B, N, V]."""

    ids: Tensor
    logits: Tensor


@torch.inference_mode()
def generate_greedy(
    model: DeepseekVL2, inputs_embeds: Tensor, attention_mask: Tensor, options: GreedyOptions
) -> Generated:
    """max_new_tokens tokens, whatever they are: it does not stop at eos.

    inputs_embeds: [B, T, H], images merged in; attention_mask: [B, T] bool, false at left padding.
    """
    logits, cache = prefill(model, inputs_embeds, attention_mask, options.prefill_chunk)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    if options.penalised_ids is not None:
        seen.scatter_(1, options.penalised_ids, True)
    ids, steps = [], []
    while True:
        token = penalise(logits, seen, options.repetition_penalty).argmax(dim=-1, keepdim=True)
        seen.scatter_(1, token, True)
        ids.append(token)
        steps.append(logits)
        if len(ids) == options.max_new_tokens:
            return Generated(torch.cat(ids, dim=1), torch.stack(steps, dim=1))
        attention_mask = torch.cat((attention_mask, torch.ones_like(token, dtype=torch.bool)), dim=1)
        logits, cache = extend(model, model.language.embed_tokens(token), attention_mask, cache)


def prefill(
    model: DeepseekVL2, inputs_embeds: Tensor, attention_mask: Tensor, chunk: int | None = None
) -> tuple[Tensor, Cache]:
    """Logits of the last position [B, V] and the cache of all, computed whole or `chunk` positions at a time."""
    tokens = inputs_embeds.shape[1]
    cache: Cache = ()
    for start in range(0, tokens, chunk or tokens):
        end = min(start + (chunk or tokens), tokens)
        logits, cache = extend(model, inputs_embeds[:, start:end], attention_mask[:, :end], cache)
    return logits, cache


def extend(model: DeepseekVL2, inputs_embeds: Tensor, attention_mask: Tensor, past: Cache) -> tuple[Tensor, Cache]:
    """One step after `past`: logits of the last position [B, V] and the grown cache.

    inputs_embeds: [B, T, H]; attention_mask: [B, P + T] bool, from which the positions follow.
    """
    position_ids = positions_from_mask(attention_mask)[:, -inputs_embeds.shape[1] :]
    hidden, new = model.language(inputs_embeds, position_ids, attention_mask, past)
    return model.language.logits(hidden[:, -1]), append_cache(past, new)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits / penalty where positive, · penalty where negative, at the `seen` ids (specification 11). Both [B, V]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
