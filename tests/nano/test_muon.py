"""Muon against its definition: what it orthogonalizes, what it leaves to AdamW, and what a saved state restores."""

import copy

import pytest
import torch

from vl2.nano.muon import Muon, is_hidden_matrix, orthogonal

SIZES = {
    "language.model.embed_tokens.weight": (10, 8),
    "vision.blocks.0.attn.qkv.weight": (24, 8),
    "language.model.layers.1.mlp.experts.up_proj.weight": (3, 4, 8),
    "vision.norm.bias": (8,),
}


def make_muon(seed=0, weight_decay=0.1):
    generator = torch.Generator().manual_seed(seed)
    count = sum(torch.Size(size).numel() for size in SIZES.values())
    master = torch.nn.Parameter(torch.randn(count, generator=generator))
    return Muon(master, SIZES, weight_decay), generator


def views(vector):
    parts = vector.split([torch.Size(size).numel() for size in SIZES.values()])
    return {name: part.view(size) for (name, size), part in zip(SIZES.items(), parts, strict=True)}


@pytest.mark.parametrize("size", [(2, 8, 8), (1, 32, 8), (3, 8, 32)])
def test_singular_values_come_near_one_and_directions_stay(size):
    matrices = torch.randn(size, generator=torch.Generator().manual_seed(1))
    result = orthogonal(matrices).float()
    values = torch.linalg.svdvals(result)
    # five rounds of the quintic leave values between 0.7 and 1.2 by design; bfloat16 adds a little
    assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    within = left.mT @ result @ right.mT
    off_diagonal = within - torch.diag_embed(within.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 0.05


def test_only_matrices_inside_blocks_are_hidden():
    hidden = {name for name, size in SIZES.items() if is_hidden_matrix(name, size)}
    assert hidden == {"vision.blocks.0.attn.qkv.weight", "language.model.layers.1.mlp.experts.up_proj.weight"}


def test_everything_else_moves_as_under_adamw():
    muon, generator = make_muon()
    plain = torch.nn.Parameter(muon.master.data.clone())
    adam = torch.optim.AdamW([plain], 1e-2, (0.9, 0.98), 1e-8, 0.1)
    for _ in range(3):
        plain.grad = torch.randn(plain.shape, generator=generator)
        muon.master.grad = plain.grad.clone()
        adam.step()
        muon.step(1e-2)
    ours, theirs = views(muon.master.data), views(plain.data)
    for name, size in SIZES.items():
        assert torch.allclose(ours[name], theirs[name], atol=1e-6) != is_hidden_matrix(name, size), name


def test_a_step_has_the_size_of_an_adamw_step_and_decays_the_weights():
    muon, generator = make_muon(weight_decay=0.5)
    before = views(muon.master.data.clone())["vision.blocks.0.attn.qkv.weight"]
    muon.master.grad = torch.randn(muon.master.shape, generator=generator)
    muon.step(0.01)
    moved = views(muon.master.data)["vision.blocks.0.attn.qkv.weight"] - before * (1 - 0.01 * 0.5)
    # 0.2 of the rate in root mean square, for singular values of one
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.25)


def test_a_restored_state_goes_on_as_the_first_would_have():
    first, generator = make_muon()
    gradients = [torch.randn(first.master.shape, generator=generator) for _ in range(4)]
    for gradient in gradients[:2]:
        first.master.grad = gradient
        first.step(0.01)
    second, _ = make_muon(seed=5)
    second.master.data.copy_(first.master.data)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in gradients[2:]:
        for muon in (first, second):
            muon.master.grad = gradient.clone()
            muon.step(0.01)
    assert torch.equal(first.master.data, second.master.data)
