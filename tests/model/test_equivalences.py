"""Two ways to the same numbers, for every variant: absorbed and naive, chunked and whole, padded and alone, …"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.conftest import GOLDENS, MINI_CHECKPOINTS
from tests.model.recorded import load_mini
from tests.tolerances import ROPE_FAR, ROUTER_MARGIN, SAME_LOGITS, assert_close
from vl2.config import LanguageConfig, RopeScaling
from vl2.model.decoder import Decoder, append_cache, positions_from_mask
from vl2.model.generate import GreedyOptions, generate_greedy, prefill
from vl2.model.moe import MoE, Router, Routing
from vl2.model.vl2 import DeepseekVL2

each_variant = pytest.mark.parametrize("name", MINI_CHECKPOINTS)
few = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**32 - 1)


def model_of(name: str) -> DeepseekVL2:
    return load_mini(GOLDENS / name).model


def random_embeds(model: DeepseekVL2, batch: int, tokens: int, seed: int) -> Tensor:
    """Embeddings of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.language_config.vocab_size, (batch, tokens), generator=generator)
    with torch.inference_mode():
        return model.language.embed_tokens(ids)


def run(decoder: Decoder, embeds: Tensor, mask: Tensor | None = None, past: tuple[Tensor, ...] = ()):
    """Logits [B, T, V] and the new entries, positions from the mask."""
    total = embeds.shape[1] + (past[0].shape[1] if past else 0)
    mask = torch.ones(len(embeds), total, dtype=torch.bool) if mask is None else mask
    with torch.inference_mode():
        hidden, new = decoder(embeds, positions_from_mask(mask)[:, -embeds.shape[1] :], mask, past)
        return decoder.logits(hidden), new


def run_if_clear(model: DeepseekVL2, embeds: Tensor, mask: Tensor | None = None):
    """As `run`, but drops the example when rounding alone may decide between two experts."""
    margins: list[float] = []

    def keep_margin(router: Router, _: object, routing: Routing) -> None:
        softmax = router.config.scoring_func == "softmax"
        scores = routing.logits.softmax(-1) if softmax else routing.logits.sigmoid()
        values = scores + getattr(router, "e_score_correction_bias", 0.0)
        chosen, rejected = values.topk(router.config.num_experts_per_tok + 1).values[:, -2:].unbind(-1)
        margins.append(float((chosen - rejected).min()))

    hooks = [m.register_forward_hook(keep_margin) for m in model.language.modules() if isinstance(m, Router)]
    result = run(model.language, embeds, mask)
    for hook in hooks:
        hook.remove()
    assume(min(margins) > ROUTER_MARGIN)
    return result


@pytest.fixture
def naive() -> Callable[[DeepseekVL2], None]:
    """Switches a model's latent attention to its naive form until the test ends."""
    switched: list[DeepseekVL2] = []

    def switch(model: DeepseekVL2) -> None:
        model.language.use_absorbed(False)
        switched.append(model)

    yield switch
    for model in switched:
        model.language.use_absorbed(True)


@each_variant
def test_naive_latent_attention_equals_absorbed_in_prefill_and_decode(name: str, naive: Callable) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 2, 40, seed=1)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, :9] = False
    absorbed, absorbed_cache = run(model.language, embeds[:, :30], mask[:, :30])
    absorbed_next, _ = run(model.language, embeds[:, 30:], mask, absorbed_cache)
    naive(model)
    got, cache = run(model.language, embeds[:, :30], mask[:, :30])
    got_next, _ = run(model.language, embeds[:, 30:], mask, cache)
    assert_close(got[mask[:, :30]], absorbed[mask[:, :30]], SAME_LOGITS)
    assert_close(got_next, absorbed_next, SAME_LOGITS)


def test_absorbed_equals_naive_with_query_rank_biases_and_yarn() -> None:
    torch.manual_seed(0)
    config = LanguageConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=3,
        q_lora_rank=14, kv_lora_rank=12, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6, attention_bias=True,
        rope_scaling=RopeScaling("yarn", 8.0, 64, 16, 2, 0.9, 0.4),
    )  # fmt: skip
    decoder = Decoder(config)
    embeds, mask = torch.randn(2, 17, 32), torch.ones(2, 17, dtype=torch.bool)
    with torch.inference_mode():
        absorbed, _ = decoder(embeds, positions_from_mask(mask), mask)
        decoder.use_absorbed(False)
        naive, _ = decoder(embeds, positions_from_mask(mask), mask)
    assert_close(absorbed, naive, SAME_LOGITS)


@each_variant
@few
@given(seed=seeds, tokens=st.integers(2, 40), data=st.data())
def test_prefill_then_decode_equals_one_long_prefill(name: str, seed: int, tokens: int, data: st.DataObject) -> None:
    model = model_of(name)
    start = data.draw(st.integers(1, tokens - 1))
    embeds = random_embeds(model, 1, tokens, seed)
    whole, whole_cache = run_if_clear(model, embeds)
    logits, cache = run(model.language, embeds[:, :start])
    steps = [logits]
    for i in range(start, tokens):
        logits, new = run(model.language, embeds[:, i : i + 1], past=cache)
        steps.append(logits)
        cache = append_cache(cache, new)
    assert_close(torch.cat(steps, dim=1), whole, SAME_LOGITS)
    for got, want in zip(cache, whole_cache, strict=True):
        assert_close(got, want, SAME_LOGITS)


@each_variant
@few
@given(seed=seeds, tokens=st.integers(1, 48), chunk=st.integers(1, 48), padding=st.integers(0, 12))
def test_chunked_prefill_equals_whole_prefill(name: str, seed: int, tokens: int, chunk: int, padding: int) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 2, tokens + padding, seed)
    mask = torch.ones(2, tokens + padding, dtype=torch.bool)
    mask[1, :padding] = False
    whole, _ = run_if_clear(model, embeds, mask)
    with torch.inference_mode():
        chunked, cache = prefill(model, embeds, mask, chunk)
    assert_close(chunked, whole[:, -1], SAME_LOGITS)
    assert all(entry.shape[1] == tokens + padding for entry in cache)


@each_variant
@few
@given(seed=seeds, lengths=st.lists(st.integers(1, 24), min_size=2, max_size=4))
def test_left_padding_in_a_batch_changes_no_row(name: str, seed: int, lengths: list[int]) -> None:
    model = model_of(name)
    longest = max(lengths)
    embeds = random_embeds(model, len(lengths), longest, seed)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    logits, cache = run_if_clear(model, embeds, mask)
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        alone, alone_cache = run(model.language, embeds[row : row + 1, longest - length :])
        assert_close(logits[row : row + 1, longest - length :], alone, SAME_LOGITS)
        for got, want in zip(cache, alone_cache, strict=True):
            assert_close(got[row : row + 1, longest - length :], want, SAME_LOGITS)


@each_variant
def test_a_batch_generates_what_its_rows_generate_alone(name: str) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 2, 20, seed=5)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :8] = False
    both = generate_greedy(model, embeds, mask, GreedyOptions(12)).ids
    first = generate_greedy(model, embeds[:1], mask[:1], GreedyOptions(12)).ids
    second = generate_greedy(model, embeds[1:, 8:], mask[1:, 8:], GreedyOptions(12)).ids
    assert torch.equal(both, torch.cat((first, second)))


@each_variant
def test_what_padding_holds_changes_nothing(name: str) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 1, 20, seed=6)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[:, :7] = False
    other = embeds.clone()
    other[:, :7] = 1e4
    got, want = (run(model.language, x, mask)[0][:, 7:] for x in (other, embeds))
    assert_close(got, want, SAME_LOGITS)


@each_variant
def test_a_later_token_changes_no_earlier_logits(name: str) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 1, 20, seed=7)
    other = embeds.clone()
    other[:, 12:] = random_embeds(model, 1, 8, seed=8)
    assert_close(run(model.language, other)[0][:, :12], run(model.language, embeds)[0][:, :12], SAME_LOGITS)


@each_variant
def test_an_empty_past_equals_none(name: str) -> None:
    model = model_of(name)
    embeds = random_embeds(model, 2, 9, seed=9)
    empty = model.language.empty_cache(2)
    assert len(empty) == len(model.language.cache_names())
    none, new = run(model.language, embeds)
    assert torch.equal(run(model.language, embeds, past=empty)[0], none)
    assert [(e.shape[0], *e.shape[2:]) for e in empty] == [(n.shape[0], *n.shape[2:]) for n in new]


def dense_moe(moe: MoE, x: Tensor) -> Tensor:
    """The truth of the routed sum: every expert computes every token, unchosen ones weigh zero."""
    flat = x.flatten(0, 1)
    routing = moe.gate(flat)
    weights = torch.zeros_like(routing.logits).scatter(-1, routing.idx, routing.weights.to(routing.logits))
    experts, total = moe.experts, torch.zeros_like(flat)
    for e in range(experts.gate_proj.shape[0]):
        hidden = F.silu(flat @ experts.gate_proj[e].T) * (flat @ experts.up_proj[e].T)
        total = total + weights[:, e, None] * (hidden @ experts.down_proj[e].T)
    shared = 0 if moe.shared_experts is None else moe.shared_experts(flat)
    return (total + shared).view_as(x)


def small_moe(k: int, shared: int | None = 1, **changes: object) -> MoE:
    config = LanguageConfig(
        hidden_size=12, num_attention_heads=2, moe_intermediate_size=8, n_routed_experts=6, n_shared_experts=shared,
        num_experts_per_tok=k, topk_method="greedy",
    )  # fmt: skip
    return MoE(dataclasses.replace(config, initializer_range=0.5, **changes))


@few
@given(seed=seeds, tokens=st.integers(1, 20), k=st.integers(1, 6), shared=st.sampled_from((None, 1, 2)))
def test_routing_each_token_to_its_experts_equals_the_dense_sum(
    seed: int, tokens: int, k: int, shared: int | None
) -> None:
    torch.manual_seed(seed)
    moe, x = small_moe(k, shared), torch.randn(2, tokens, 12)
    with torch.inference_mode():
        assert_close(moe(x), dense_moe(moe, x), SAME_LOGITS)


def test_gradients_through_routing_equal_those_of_the_dense_sum() -> None:
    torch.manual_seed(3)
    moe, x = small_moe(2), torch.randn(2, 3, 12)
    gradients = []
    for forward in (moe, lambda x: dense_moe(moe, x)):
        moe.zero_grad()
        x_ = x.clone().requires_grad_()
        forward(x_).square().sum().backward()
        gradients.append([x_.grad, *(p.grad.clone() for p in moe.parameters())])
    for got, want in zip(*gradients, strict=True):
        assert_close(got, want, SAME_LOGITS)


def test_the_router_computes_in_float32_under_autocast_and_in_bfloat16_models() -> None:
    torch.manual_seed(4)
    moe, x = small_moe(2), torch.randn(5, 12).bfloat16()
    want = moe.gate(x).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = moe.gate(x)
    assert got.logits.dtype == got.weights.dtype == torch.float32
    assert torch.equal(got.logits, want)
    rounded = moe.bfloat16().gate(x)
    assert rounded.logits.dtype == torch.float32


def test_no_gradient_is_nan_where_a_row_is_padded() -> None:
    model = DeepseekVL2(load_mini(GOLDENS / "small-mini").model.config)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :10] = False
    embeds = random_embeds(model, 2, 12, seed=10).clone()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(embeds, positions_from_mask(mask), mask)
    logits[mask].logsumexp(-1).mean().backward()
    gradients = [p.grad for p in model.language.parameters() if p.grad is not None]
    assert len(gradients) > 40 and all(g.isfinite().all() for g in gradients)


def test_rotary_tables_stay_float32_in_a_bfloat16_model_and_distinguish_far_positions() -> None:
    model = DeepseekVL2(load_mini(GOLDENS / "tiny-mini").model.config).bfloat16()
    assert not list(model.buffers())
    seen: list[Tensor] = []
    layer = model.language.layers[0].self_attn
    hook = layer.register_forward_pre_hook(lambda _, args: seen.extend(args[2]))
    embeds = torch.zeros(1, 4, 96, dtype=torch.bfloat16)
    model(embeds, torch.tensor([[2000, 2001, 2002, 2003]]), torch.ones(1, 4, dtype=torch.bool))
    hook.remove()
    assert all(table.dtype == torch.float32 for table in seen)
    assert len(seen[0][0].unique(dim=0)) == 4
    assert_close(seen[0][0, :, 0].double(), torch.arange(2000, 2004).double().cos(), ROPE_FAR)
