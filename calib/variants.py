"""Versions of a model side by side over one calibration set: what each of them changes in the predictions.

All versions' states lie in one tensor and go through a layer together, one part of its weights in memory at a time, so
that a checkpoint is read once for all of them and never held. A version leaves the original ("is born") at the stage
where its tensors differ, and goes on with the original's weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vl2.calib.calibration_set import check_source, embedding_entries, read_calibration_set, read_modality
from vl2.calib.demands import layer_work
from vl2.calib.experts import ExpertInputs, add_routed_output, route
from vl2.calib.layer import Replaced, Tokens, load_attention, load_dense, load_routed
from vl2.calib.statistics import TEXT, StatisticsOptions
from vl2.calib.tensor_file import read_slice
from vl2.calib.weights import Weights, load_part, open_weights
from vl2.config import LanguageConfig
from vl2.model.norm import RMSNorm

ORIGINAL = "original"
_SCORES_AT_ONCE = 1 << 23  # attention scores a head, of versions that attend together
_LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Birth:
    """A version that differs in one stage by `replaced`, tensors by the checkpoint's names; kept: goes on with it."""

    name: str
    replaced: Replaced
    kept: bool = True


@dataclass(frozen=True)
class Divergence:
    """KLD of the next token from the original's, nats: mean over text positions, standard error, positions."""

    kld: float
    error: float
    positions: int


@dataclass(frozen=True)
class Excerpt:
    """The first sequences of a calibration set. hidden: float32 [T, H]; modality: uint8 [T]; spans: rows of each."""

    hidden: Tensor
    modality: Tensor
    spans: tuple[tuple[int, int], ...]


def read_excerpt(checkpoint: Path, calibration_set: Path, tokens: int) -> Excerpt:
    """As many whole sequences as `tokens` positions hold, at least one. VL2Error where the set is not the model's."""
    found = read_calibration_set(calibration_set)
    check_source(found, checkpoint)
    spans = tuple(span for span in found.spans() if span[0] == 0 or span[1] <= tokens)
    end = spans[-1][1]
    hidden = read_slice(embedding_entries(calibration_set)["hidden"], 0, end)
    return Excerpt(hidden, read_modality(calibration_set)[:end], spans)


class Variants:
    """The original's states and those of up to `capacity` versions, float32 [1 + capacity, T, H]."""

    def __init__(self, checkpoint: Path, excerpt: Excerpt, capacity: int):
        self.weights: Weights = open_weights(checkpoint)
        self.excerpt = excerpt
        self._states = torch.empty(1 + capacity, *excerpt.hidden.shape)
        self._names: list[str] = []
        self.start(ORIGINAL, excerpt.hidden)

    def start(self, name: str, hidden: Tensor) -> None:
        """A version that differs in its embeddings [T, H]."""
        self._states[len(self._names)] = hidden
        self._names.append(name)

    @torch.no_grad()
    def advance(self, l: int, stage: str, births: Iterable[Birth] = ()) -> dict[str, float]:
        """All versions through a layer's stage, "attention" or "mlp"; then those that are born there, one by one.

        Returns the mean squared change that each of the born makes in the states behind the stage.
        """
        entered, changes = self._states[0].clone(), {}
        self._apply(l, stage, self._states[: len(self._names)], {})
        for birth in births:
            state = entered.clone()
            self._apply(l, stage, state[None], birth.replaced)
            changes[birth.name] = float((state - self._states[0]).square().mean())
            if birth.kept:
                self.start(birth.name, state)
        return changes

    @torch.no_grad()
    def advance_alone(self, name: str, l: int, stage: str, replaced: Replaced) -> None:
        """The original and the version `name`, the latter with tensors of its own."""
        assert self._names == [ORIGINAL, name]
        self._apply(l, stage, self._states[:1], {})
        self._apply(l, stage, self._states[1:2], replaced)

    @torch.no_grad()
    def divergences(self, heads: Mapping[str, tuple[str, Replaced]] | None = None) -> dict[str, Divergence]:
        """Of every version behind the last layer; heads: more versions, by name the one whose states they take and
        tensors for norm and head. One head at a time is in memory."""
        plain = {name: name for name in self._names[1:]}
        found = dict(self._compare(plain, {}))
        for name, (states, replaced) in (heads or {}).items():
            found |= dict(self._compare({name: states}, replaced))
        return found

    def _compare(self, versions: Mapping[str, str], replaced: Replaced) -> Iterator[tuple[str, Divergence]]:
        rows = (self.excerpt.modality == TEXT).nonzero()[:, 0]
        klds: dict[str, list[Tensor]] = {name: [] for name in versions}
        original, other = self._head({}), self._head(replaced) if replaced else None
        for chunk in rows.split(max(1, _LOGITS_AT_ONCE // len(original[1]))):
            want = _log_probabilities(self._states[0, chunk], original)
            for name, states in versions.items():
                got = _log_probabilities(self._states[self._names.index(states), chunk], other or original)
                klds[name].append((want.exp() * (want - got)).sum(dim=-1))
        for name, parts in klds.items():
            kld = torch.cat(parts)
            error = float(kld.std() / len(kld) ** 0.5) if len(kld) > 1 else float("inf")
            yield name, Divergence(float(kld.mean()), error, len(kld))

    def _head(self, replaced: Replaced) -> tuple[RMSNorm, Tensor]:
        config = self.weights.config.language_config
        norm = load_part(self.weights, lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), "language.norm.",
                         replaced)
        (source,) = self.weights.sources["language.lm_head.weight"]
        return norm, (replaced[source].float() if source in replaced else self.weights.read(source))

    def _apply(self, l: int, stage: str, states: Tensor, replaced: Replaced) -> None:
        """Replaces `states` [V, T, H] by the stage's output."""
        if stage == "attention":
            self._attend(load_attention(self.weights, l, replaced), states)
            return
        config, rows = self.weights.config.language_config, states.view(-1, states.shape[-1])
        everywhere = Tokens((), torch.zeros(len(rows), dtype=torch.uint8), torch.ones(len(rows)), StatisticsOptions())
        if config.is_moe(l):
            part = load_routed(self.weights, l, replaced)
            inputs = ExpertInputs(rows, part, route(part, rows, config), everywhere)
            add_routed_output(self.weights, l, inputs, replaced, lambda: None)
            return
        part = load_dense(self.weights, l, replaced)
        for chunk in everywhere.chunks():
            rows[chunk] = part(rows[chunk])

    def _attend(self, part: torch.nn.Module, states: Tensor) -> None:
        for start, stop in self.excerpt.spans:
            together = max(1, _SCORES_AT_ONCE // (stop - start) ** 2)
            for versions in states.split(together):
                versions[:, start:stop] = part(versions[:, start:stop])


def with_rows_of(excerpt: Excerpt, modality: int, hidden: Tensor) -> Tensor:
    """The excerpt's embeddings with the rows of one modality, TEXT or IMAGE, taken from `hidden` [T, H]."""
    return torch.where((excerpt.modality == modality)[:, None], hidden, excerpt.hidden)


def token_work(config: LanguageConfig) -> float:
    """Operations of one token through all layers."""
    return sum(amount for l in range(config.num_hidden_layers)
               for step, amount in layer_work(config, l, 1).items() if step.endswith("output"))


def _log_probabilities(states: Tensor, head: tuple[RMSNorm, Tensor]) -> Tensor:
    """float64 [n, V]: differences of INT8 are of the size of float32's rounding."""
    return F.linear(head[0](states), head[1]).double().log_softmax(dim=-1)
