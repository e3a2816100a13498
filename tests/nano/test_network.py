"""The training forward against the reference model on the same random weights, for both variants."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from vl2.model.checkpoint import load_model
from vl2.nano.checkpoint_files import WEIGHTS, checkpoint_tensors, training_values
from vl2.nano.geometry import config_dict, write_description
from vl2.nano.gradients import gelu, rms_norm
from vl2.nano.network import Shape, SideLosses, assemble, decoder, mixture, project, tower
from vl2.nano.parameters import initial_values, parameter_shapes

CROP = (2, 1)


@pytest.fixture(params=["mha", "mla"])
def pair(request, tmp_path):
    """(training weights, shape, reference model) with equal values."""
    shape = Shape.from_config(config_dict(request.param))
    values = initial_values(parameter_shapes(shape), seed=1)
    write_description(tmp_path, request.param)
    save_file(checkpoint_tensors(values, torch.float32), tmp_path / "model.safetensors")
    return values, shape, load_model(tmp_path)


@torch.no_grad()
def test_the_training_forward_computes_what_the_reference_model_computes(pair):
    weights, shape, model = pair
    generator = np.random.default_rng(0)
    tiles = torch.from_numpy(generator.integers(0, 256, (3, 3, 112, 112), np.uint8))
    pixels = tiles.float() / 127.5 - 1
    features = project(weights, tower(weights, shape, tiles))
    torch.testing.assert_close(features.flatten(1, 2), model.encode_tiles(pixels), atol=1e-4, rtol=1e-4)
    image = assemble(weights, features[:1], features[None, 1:].unflatten(1, CROP[::-1]))
    text = torch.from_numpy(generator.integers(0, 300, (1, 20)))
    embeds = torch.cat([image, F.embedding(text, weights["language.model.embed_tokens.weight"])], 1)
    ids = torch.cat([torch.zeros(1, image.shape[1], dtype=torch.long), text], 1)
    mask = torch.arange(ids.shape[1])[None] < image.shape[1]
    torch.testing.assert_close(embeds, model.embed(ids, mask, pixels, torch.tensor([CROP])), atol=1e-4, rtol=1e-4)
    logits = F.linear(decoder(weights, shape, embeds, SideLosses()), weights["language.lm_head.weight"])
    positions = torch.arange(ids.shape[1])[None]
    expected, _ = model(embeds, positions, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    ending = F.linear(decoder(weights, shape, embeds, SideLosses(), last=7), weights["language.lm_head.weight"])
    torch.testing.assert_close(ending, expected[:, -7:], atol=2e-4, rtol=1e-3)


def test_gradients_reach_every_parameter_but_the_unused_pooling_head():
    shape = Shape.from_config(config_dict())
    weights = {name: value.requires_grad_() for name, value in initial_values(parameter_shapes(shape), 0).items()}
    features = project(weights, tower(weights, shape, torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)))
    image = assemble(weights, features[:1], features[None, 1:].unflatten(1, (1, 1)))
    side = SideLosses()
    text = F.embedding(torch.randint(0, 300, (1, 20)), weights["language.model.embed_tokens.weight"])
    hidden = decoder(weights, shape, torch.cat([image, text], 1), side)
    loss = F.linear(hidden, weights["language.lm_head.weight"]).logsumexp(-1).mean() + side.balance
    loss.backward()
    unreached = [name for name, value in weights.items() if value.grad is None]
    assert all(name.startswith("vision.attn_pool.") for name in unreached), unreached
    assert len(unreached) == 13


def test_the_configuration_spells_out_json(tmp_path):
    write_description(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["language_config"]["use_mla"] is False


def test_training_can_go_on_from_a_checkpoint(tmp_path):
    shapes = parameter_shapes(Shape.from_config(config_dict()))
    values = initial_values(shapes, seed=2)
    save_file(checkpoint_tensors(values, torch.float32), tmp_path / WEIGHTS)
    restored = training_values(tmp_path, shapes)
    assert restored.keys() == values.keys()
    assert all(torch.equal(restored[name], value) for name, value in values.items())


def test_rms_norm_and_its_gradients_by_hand_equal_autograd_s():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(3, 5, 16, dtype=torch.float64, generator=generator)
    ours, theirs = rms_norm(weight, x), F.rms_norm(x, (16,), weight, 1e-6)
    assert torch.allclose(ours, theirs, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def mixture_weights(generator):
    sizes = {"gate": (8, 16), "experts.gate_proj": (8, 12, 16), "experts.up_proj": (8, 12, 16),
             "experts.down_proj": (8, 16, 12), "shared_experts.gate_proj": (24, 16), "shared_experts.up_proj": (24, 16),
             "shared_experts.down_proj": (16, 24)}
    return {f"m.{name}.weight": torch.randn(size, dtype=torch.float64, generator=generator, requires_grad=True)
            for name, size in sizes.items()}


def all_experts_on_every_token(w, x):
    scores = F.linear(x.float(), w["m.gate.weight"].float()).softmax(-1)
    share = (scores * torch.zeros_like(scores).scatter_(-1, scores.topk(2, -1).indices, 1.0)).double()
    gate, up, down = (w[f"m.experts.{part}_proj.weight"] for part in ("gate", "up", "down"))
    hidden = F.silu(torch.einsum("bth,eih->btei", x, gate)) * torch.einsum("bth,eih->btei", x, up)
    shared = [w[f"m.shared_experts.{part}_proj.weight"] for part in ("gate", "up", "down")]
    dense = F.linear(F.silu(F.linear(x, shared[0])) * F.linear(x, shared[1]), shared[2])
    return torch.einsum("btei,ehi,bte->bth", hidden, down, share) + dense


def test_experts_on_their_tokens_and_gradients_by_hand_equal_all_experts_on_every_token():
    generator = torch.Generator().manual_seed(0)
    w = mixture_weights(generator)
    x = torch.randn(2, 150, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    ours, theirs = mixture(w, "m", x, 2, SideLosses()), all_experts_on_every_token(w, x)
    assert torch.allclose(ours, theirs, atol=1e-9)
    for a, b in zip(*(torch.autograd.grad(y, (x, *w.values()), grad) for y in (ours, theirs)), strict=True):
        # the router works in float32, in which its gradient sums some hundred terms
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-3)


def test_gelu_s_gradient_in_bfloat16_is_within_the_rounding_of_the_exact_one():
    x = torch.linspace(-6, 6, 2001).bfloat16().requires_grad_()
    exact = x.detach().double().requires_grad_()
    ours, = torch.autograd.grad(gelu(x).sum(), x)
    theirs, = torch.autograd.grad(F.gelu(exact, approximate="tanh").sum(), exact)
    # 1e-3 between the two forms, and half the distance of two bfloat16 numbers above one
    assert (ours.double() - theirs).abs().max() < 1e-3 + 2**-8
