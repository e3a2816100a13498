"""`vl2::Experts` of the operator library against the model's router and NumPy in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException
from torch import nn

from tests.plugins.operator_session import ISAS, codes_and_scales, error_of, needs_library, node_session
from tests.tolerances import OPERATOR_EXACT, OPERATOR_ROUNDED_EXPERTS
from vl2.model.moe import Router
from vl2.plugins.native.layout import interleave, layout_for, pack, unpack

pytestmark = needs_library


@dataclass(frozen=True)
class Case:
    """A layer: sizes, the router's rule, the scheme with columns a scale (0: one a row); shared: inner size or 0."""

    hidden: int = 64
    inner: int = 32
    experts: int = 8
    top_k: int = 2
    method: str = "greedy"
    groups: tuple[int, int] = (1, 1)
    scoring: str = "softmax"
    normalize: bool = False
    factor: float = 1.0
    scheme: str = "int4"
    columns: int = 32
    shared: int = 0


# The routers of Tiny, Small and Base with few experts of their true or smaller sizes, and odd ones.
CASES = {
    "tiny": Case(1280, 896, 3, 2, shared=64),
    "small": Case(2048, 64, 8, 3, columns=128, shared=32),
    "base": Case(96, 48, 72, 6, "noaux_tc", (8, 4), "sigmoid", True, 2.5, columns=16, shared=96),
    "group limited": Case(96, 48, 16, 3, "group_limited_greedy", (4, 2), "softmax", True, 16.0),
    "group limited, all kept": Case(64, 32, 8, 2, "group_limited_greedy", (4, 4)),
    "odd sizes": Case(72, 40, 16, 4, "noaux_tc", (4, 2), "sigmoid", True, scheme="int8", columns=0, shared=33),
    "odd floats": Case(100, 36, 8, 1, "noaux_tc", (1, 1), "sigmoid", True, scheme="fp16", shared=20),
}


SIZES = ("hidden_size", "inner_size", "experts", "top_k", "n_group", "topk_group", "shared_size")


class Layer:
    """Random weights of a case as the operator reads them and as float32; `run` and `expected` of the same inputs."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        self.case, rng = case, np.random.default_rng(seed)
        self.routed = [self._part(case.inner, rng) for _ in range(case.experts)]
        self.shared = self._part(case.shared, rng) if case.shared else None
        self.bias = None
        if case.method == "noaux_tc":
            self.bias = (rng.standard_normal(case.experts) * 0.1).astype(np.float32)

    def _part(self, inner: int, rng) -> SimpleNamespace:
        hidden, scheme = self.case.hidden, self.case.scheme
        groups = {size: size // self.case.columns if self.case.columns and size % self.case.columns == 0 else 1
                  for size in (hidden, inner)}
        gate, up = (codes_and_scales((inner, hidden), scheme, groups[hidden], rng) for _ in "gu")
        down = codes_and_scales((hidden, inner), scheme, groups[inner], rng)
        pair = [None if a is None else interleave(a, b) for a, b in zip(gate, up, strict=True)]
        layouts = layout_for(pair[0].shape, scheme, groups[hidden]), layout_for((hidden, inner), scheme, groups[inner])
        packed = pack(layouts[0], *pair), pack(layouts[1], *down)
        turns = unpack(layouts[0], packed[0]).reshape(-1, 2, 16, hidden)
        numbers = (*(turns[:, i].reshape(-1, hidden)[:inner] for i in (0, 1)), unpack(layouts[1], packed[1]))
        return SimpleNamespace(layouts=layouts, packed=packed, numbers=[part.astype(np.float64) for part in numbers])

    def session(self, mode: str = "exact", threads: int = 1, **changes):
        case, (gate_up, down) = self.case, self.routed[0].layouts
        attributes = {
            "hidden_size": case.hidden, "inner_size": case.inner, "experts": case.experts, "top_k": case.top_k,
            "mode": mode, "topk_method": case.method, "n_group": case.groups[0], "topk_group": case.groups[1],
            "scoring_func": case.scoring, "norm_topk_prob": int(case.normalize), "routed_scaling_factor": case.factor,
            "scheme": case.scheme, "group_size": gate_up.group_size, "down_group_size": down.group_size,
        }  # fmt: skip
        stacks = [np.concatenate([part.packed[i] for part in self.routed]) for i in (0, 1)]
        tensors = {"x": True, "logits": True, "gate_up": stacks[0], "down": stacks[1], "correction_bias": self.bias}
        if self.shared:
            attributes |= {"shared_size": case.shared, "shared_down_group_size": self.shared.layouts[1].group_size}
            tensors |= {"shared_gate_up": self.shared.packed[0], "shared_down": self.shared.packed[1]}
        return node_session("Experts", tensors, attributes | changes, threads)

    def routing(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Experts and weights [N, k], by the model's own router over an identity."""
        case = self.case
        config = SimpleNamespace(num_experts_per_tok=case.top_k, topk_method=case.method, n_group=case.groups[0],
                                 topk_group=case.groups[1], scoring_func=case.scoring, norm_topk_prob=case.normalize,
                                 routed_scaling_factor=case.factor)
        router = Router.__new__(Router)
        nn.Module.__init__(router)
        router.config, router.weight = config, torch.eye(case.experts)
        router.e_score_correction_bias = None if self.bias is None else torch.from_numpy(self.bias)
        done = router(torch.from_numpy(logits))
        return done.idx.numpy(), done.weights.numpy()

    def expected(self, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
        chosen, weights = self.routing(logits)
        x, y = x.astype(np.float64), np.zeros(x.shape)
        for e, part in enumerate(self.routed):
            token, choice = np.nonzero(chosen == e)
            y[token] += feed_forward(x[token], part.numbers) * weights[token, choice][:, None]
        return y if self.shared is None else y + feed_forward(x, self.shared.numbers)


def feed_forward(x: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    gate, up, down = matrices
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def inputs_of(case: Case, tokens: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((tokens, side)).astype(np.float32) for side in (case.hidden, case.experts))


def run(session, x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x, "logits": logits})[0]


@pytest.mark.parametrize("name", CASES)
def test_layers_of_the_family_agree_with_the_models_router(name):
    layer = Layer(CASES[name])
    session = layer.session()
    for tokens in (0, 1, 3, 40):
        x, logits = inputs_of(layer.case, tokens)
        y = run(session, x, logits)
        assert y.shape == x.shape
        assert tokens == 0 or error_of(y, layer.expected(x, logits))[0] <= OPERATOR_EXACT, tokens


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_instruction_set_computes_the_same(isa, mode, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    for name in ("base", "odd sizes", "odd floats"):
        layer = Layer(CASES[name])
        session = layer.session(mode)
        for tokens in (1, 130):
            x, logits = inputs_of(layer.case, tokens)
            largest, mean = error_of(run(session, x, logits), layer.expected(x, logits))
            assert largest <= OPERATOR_EXACT if mode == "exact" else mean <= OPERATOR_ROUNDED_EXPERTS, (name, tokens)


@pytest.mark.parametrize("tokens", [1, 150])
def test_the_number_of_threads_changes_no_bit(tokens):
    layer = Layer(replace(CASES["small"], hidden=256))
    x, logits = inputs_of(layer.case, tokens)
    alone = run(layer.session(), x, logits)
    for threads in (2, 4, 64):
        np.testing.assert_array_equal(run(layer.session(threads=threads), x, logits), alone)


def test_more_tokens_than_fit_at_once_give_the_rows_of_fewer():
    layer = Layer(Case())
    x, logits = inputs_of(layer.case, 2500)
    session = layer.session()
    whole = run(session, x, logits)
    for rows in (slice(0, 700), slice(1000, 1100), slice(2400, 2500)):
        assert error_of(run(session, x[rows], logits[rows]), whole[rows])[0] <= OPERATOR_EXACT


@pytest.mark.parametrize("logits", [[0] * 8, [1, 3, 3, 0, 3, 1, 1, 0], [-200, 0] + [-200] * 6])
def test_of_equal_scores_the_lower_expert_is_taken_and_none_twice(logits):
    layer = Layer(Case(top_k=3))
    x, logits = inputs_of(layer.case, 1)[0], np.array([logits], np.float32)
    scores = np.exp(logits[0] - logits.max(), dtype=np.float32)
    order = np.argsort(-scores, kind="stable")[:3]
    want = sum(feed_forward(x.astype(np.float64), layer.routed[e].numbers) * scores[e] / scores.sum() for e in order)
    assert error_of(run(layer.session(), x, logits), want)[0] <= OPERATOR_EXACT


def test_a_dropped_groups_zero_goes_before_a_negative_choice():
    # choice = score + bias is negative in the kept group: the zeros of the dropped one are larger, as in the original
    layer = Layer(Case(experts=4, top_k=2, method="noaux_tc", groups=(2, 1), scoring="sigmoid"))
    layer.bias = np.array([-2, -2, -3, -3], np.float32)
    x, logits = inputs_of(layer.case, 1)
    scores = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
    want = sum(feed_forward(x.astype(np.float64), layer.routed[e].numbers) * scores[e] for e in (2, 3))
    assert error_of(run(layer.session(), x, logits), want)[0] <= OPERATOR_EXACT


@pytest.mark.parametrize("name", ["base", "group limited", "tiny"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_token_and_no_other(name, value):
    layer = Layer(replace(CASES[name], hidden=96, inner=32))
    session = layer.session()
    for tokens in (1, 9):
        for spoil_logits in (True, False):
            x, logits = inputs_of(layer.case, tokens)
            (logits if spoil_logits else x)[-1, 2] = value
            y = run(session, x, logits)
            # a sigmoid of infinity is 1
            harmless = spoil_logits and value == np.inf and layer.case.scoring == "sigmoid"
            assert harmless or not np.isfinite(y[-1]).all()
            assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("changes, message", [
    ({"topk_method": "best"}, '"best", expected greedy'), ({"scoring_func": "tanh"}, '"tanh", expected softmax'),
    ({"top_k": 9}, "`top_k` is 9, expected 1 to 8"), ({"experts": 0}, "`experts` is 0"),
    ({"n_group": 3}, "does not divide 8"),
    ({"topk_group": 2}, "`topk_group` is 2, expected 1 to 1"), ({"norm_topk_prob": 2}, "expected 0 or 1"),
    ({"inner_size": -1}, "an inner size is -1"), ({"shared_size": -1}, "`shared_size` is -1"),
    ({"down_scheme": "int2"}, "`down_scheme` is \"int2\""),
    ({"topk_method": "noaux_tc", "n_group": 8}, "two experts or more"),
])  # fmt: skip
def test_attributes_that_make_no_layer_are_refused_by_name(changes, message):
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match=message):
        Layer(Case()).session(**changes)


@pytest.mark.parametrize("changes, message", [
    ({"inner_size": 48}, "`gate_up` has the shape"), ({"experts": 7}, "`logits` has the shape"),
    ({"topk_method": "noaux_tc"}, "noaux_tc wants `correction_bias`"), ({"hidden_size": 96}, "`x` has the shape"),
    ({"shared_size": 32}, "`shared_gate_up` has the shape"),
])  # fmt: skip
def test_shapes_that_do_not_fit_the_attributes_are_refused(changes, message):
    layer = Layer(Case())
    with pytest.raises(InvalidArgument, match=message):
        run(layer.session(**changes), *inputs_of(layer.case, 2))


@settings(max_examples=40)
@given(st.fixed_dictionaries({name: st.sampled_from([-1, 0, 1, 2, 8, 16, 1 << 33]) for name in SIZES}),
       st.sampled_from([0, 3, 4096]), st.sampled_from(["int4", "int8", "fp16"]))
def test_no_attributes_crash(sizes, size, scheme):
    weight = np.zeros(size, np.uint8)
    tensors = {"x": True, "logits": True, "gate_up": weight, "down": weight}
    try:
        session = node_session("Experts", tensors, sizes | {"scheme": scheme, "group_size": 8})
        run(session, np.ones((2, 8), np.float32), np.ones((2, 8), np.float32))
    except (Fail, InvalidArgument, RuntimeException) as error:
        assert "vl2::Experts" in str(error)
