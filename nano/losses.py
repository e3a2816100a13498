"""Losses of one batch: answer tokens, dense tower labels, expert balance; and which questions were answered exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vl2.nano.batches import IMAGE_START, Batch
from vl2.nano.geometry import CELLS
from vl2.nano.ideal import ideal_distance, ideal_views
from vl2.nano.labels import BLANK, CLASSES, SLOTS
from vl2.nano.network import Shape, SideLosses, Weights, assemble, decoder, project, tower
from vl2.nano.parameters import placed

BALANCE_WEIGHT = 0.01
POINTING_WEIGHT = 1.0
PLACING_WEIGHT = 5.0  # of a distance in shares of the image's sides, which is to come below 0.02
BLANK_WEIGHT = 0.3
IDEAL_NOISE = 0.1  # on ideal tokens, so that a decoder takes those of a real tower too
LOCAL_START = IMAGE_START + CELLS * (CELLS + 1) + 1  # behind the global view and the separator


def auxiliary_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Training-only heads on patches and on image tokens."""
    width, hidden = shape.vision["width"], shape.language["hidden_size"]
    sizes = {"patches": (CLASSES, width), "slots": (SLOTS * CLASSES, hidden)}
    sizes |= {"boxes": (4, hidden), "places": (4, hidden)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outs, ins) in sizes.items():
        shapes |= {f"auxiliary.{name}.weight": (outs, ins), f"auxiliary.{name}.bias": (outs,)}
    return shapes


@dataclass(frozen=True)
class Aims:
    """language: answers count, else the tower's labels alone. tower: weight of these labels beside answers.

    ideal: weight of the distance of image tokens from ideal ones, whose variance is about one.
    """

    language: bool
    tower: float = 1.0
    ideal: float = 0.0


@dataclass
class Outcome:
    """The loss with its parts as plain numbers, and exact-match counts: task → (right, asked)."""

    loss: Tensor
    parts: dict[str, float]
    exact: dict[str, tuple[int, int]]


def tower_loss(w: Weights, tokens: Tensor, features: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Glyph classes of patches and image tokens, and word boxes; tokens and features of the local tiles, flattened."""
    weight = torch.ones(CLASSES)
    weight[BLANK] = BLANK_WEIGHT
    total, parts = 0.0, {}
    for name, x in (("patches", tokens), ("slots", features)):
        target = placed(getattr(batch, name)).long().flatten()
        logits = F.linear(x, w[f"auxiliary.{name}.weight"], w[f"auxiliary.{name}.bias"]).float().view(-1, CLASSES)
        total = total + F.cross_entropy(logits, target, weight=weight)
        inked = target != BLANK
        parts[name] = (logits.detach().argmax(-1) == target)[inked].float().mean().item()
    boxes = placed(batch.boxes).float().flatten(0, -2)
    known = ~boxes[:, 0].isnan()
    guess = F.linear(features.flatten(0, -2), w["auxiliary.boxes.weight"], w["auxiliary.boxes.bias"]).float()
    distance = (guess[known] - boxes[known]).abs().mean()
    parts["boxes"] = distance.item()
    parts["tower"] = total.item()
    return total + 2 * distance, parts


def decoder_loss(w: Weights, shape: Shape, batch: Batch) -> Outcome:
    """The decoder's losses on ideal image tokens; no tower runs."""
    views = ideal_views(batch, shape.language["hidden_size"])
    dtype = w["image_newline"].dtype
    noisy = [(view + IDEAL_NOISE * torch.randn(view.shape)).to(dtype) for view in views]
    answers, exact, side = _answer_loss(w, shape, batch, assemble(w, *noisy))
    return Outcome(_language_loss(answers, side), _language_parts(answers, side), exact)


def batch_loss(w: Weights, shape: Shape, batch: Batch, aims: Aims) -> Outcome:
    """All losses of a batch that `aims` asks for."""
    wide, high = batch.crop
    pages, views = batch.tiles.shape[:2]
    if not aims.language and views > 1:
        batch_tiles = batch.tiles[:, 1:]
    else:
        batch_tiles = batch.tiles
    tokens = tower(w, shape, placed(batch_tiles).flatten(0, 1))
    features = project(w, tokens)
    tokens = tokens.unflatten(0, (pages, -1))
    features = features.unflatten(0, (pages, -1))
    local = slice(1, None) if aims.language and views > 1 else slice(None)
    loss, parts = tower_loss(w, tokens[:, local].flatten(0, 1), features[:, local].flatten(0, 3), batch)
    if aims.ideal:
        off = ideal_distance(features[:, local].flatten(2, 3), batch)
        loss, parts = loss + aims.ideal * off, parts | {"ideal": off.item()}
    if not aims.language:
        return Outcome(loss, parts, {})
    grid = features[:, local].unflatten(1, (high, wide))
    answers, exact, side = _answer_loss(w, shape, batch, assemble(w, features[:, 0], grid))
    return Outcome(_language_loss(answers, side) + aims.tower * loss, parts | _language_parts(answers, side), exact)


def _language_loss(answers: Tensor, side: SideLosses) -> Tensor:
    return (answers + BALANCE_WEIGHT * side.balance + POINTING_WEIGHT * side.pointing
            + PLACING_WEIGHT * side.placing)


def _language_parts(answers: Tensor, side: SideLosses) -> dict[str, float]:
    return {"answers": answers.item(), "balance": side.balance.item(), "pointing": side.pointing.item(),
            "pointed": side.pointed, "found": side.found, "placing": float(torch.as_tensor(side.placing).detach())}


def _answer_loss(w: Weights, shape: Shape, batch: Batch, image: Tensor):
    before, text = placed(batch.before), placed(batch.text)
    table = w["language.model.embed_tokens.weight"]
    x = torch.cat([F.embedding(before, table), image, F.embedding(text, table)], 1)
    pointer = placed(batch.pointer)
    # The state before a token predicts it, so pointers move one place to the left.
    side = SideLosses(pointer=torch.cat([pointer[:, 1:], pointer.new_full((len(pointer), 1), -1)], 1),
                      subject=placed(batch.subject), places=placed(batch.places).float(),
                      places_start=LOCAL_START)
    hidden = decoder(w, shape, x, side, text.shape[1] + 1)
    question = placed(batch.question).long()
    asked = question >= 0
    states = hidden[:, :-1][asked]
    logits = F.linear(states, w["language.lm_head.weight"]).float()
    target, owner = text[asked], question[asked]
    wrong = torch.zeros(len(batch.questions))
    wrong.index_add_(0, owner, (logits.detach().argmax(-1) != target).float())
    exact: dict[str, tuple[int, int]] = {}
    for item, mistakes in zip(batch.questions, wrong.tolist(), strict=True):
        right, count = exact.get(item.task, (0, 0))
        exact[item.task] = (right + (mistakes == 0), count + 1)
    # Long answers weigh less a token: the square root keeps transcriptions from drowning counts and colours.
    weight = owner.bincount(minlength=len(batch.questions)).float().rsqrt()[owner]
    loss = (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()
    return loss, exact, side
