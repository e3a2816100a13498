"""Our operators in standard ONNX against their eager bodies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.export.lowered import session_of
from tests.tolerances import ONNX_RUNTIME, assert_close
from vl2.export.lowering import linear
from vl2.manifest import Port
from vl2.plugins.experts.op import experts

EXPERTS, CHOSEN, SIZE, INNER = 6, 2, 16, 8


class ExpertsModule(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (
            ("gate_proj", (EXPERTS, INNER, SIZE)), ("up_proj", (EXPERTS, INNER, SIZE)),
            ("down_proj", (EXPERTS, SIZE, INNER)),
        ):
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(device), requires_grad=False))

    def forward(self, x: Tensor, idx: Tensor, weights: Tensor) -> Tensor:
        return experts(x, idx, weights, self.gate_proj, self.up_proj, self.down_proj)


class LinearModule(nn.Module):
    def __init__(self, device: str):
        super().__init__()
        torch.manual_seed(0)
        self.plain, self.biased = nn.Linear(SIZE, INNER, bias=False).to(device), nn.Linear(INNER, SIZE).to(device)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.biased(self.plain(x))
        return y, self.plain(y[:, -1])


@pytest.fixture(scope="module")
def experts_session():
    ports = (
        (Port("x", "float32", ("tokens", SIZE)), Port("idx", "int64", ("tokens", CHOSEN)),
         Port("weights", "float32", ("tokens", CHOSEN))),
        (Port("y", "float32", ("tokens", SIZE)),),
    )
    weights = {name: p.detach() for name, p in ExpertsModule("cpu").named_parameters()}
    return session_of(ExpertsModule("meta"), ports, weights)


def check(session, idx: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(len(idx), SIZE, generator=generator), torch.rand(idx.shape, generator=generator)
    got = session.run(None, {"x": x.numpy(), "idx": idx.numpy(), "weights": weights.numpy()})[0]
    assert_close(got, ExpertsModule("cpu")(x, idx, weights), ONNX_RUNTIME)


@pytest.mark.parametrize("tokens", [0, 1, 2, 37])
def test_lowered_experts_answer_for_any_number_of_tokens(experts_session, tokens: int) -> None:
    idx = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :CHOSEN]
    check(experts_session, idx)


def test_lowered_experts_answer_when_all_tokens_choose_the_same(experts_session) -> None:
    check(experts_session, torch.tensor([[5, 0]]).repeat(9, 1))


def test_lowered_experts_answer_when_only_one_is_never_chosen(experts_session) -> None:
    check(experts_session, torch.tensor([[0, 1], [2, 4], [4, 5], [1, 2]]))


def test_the_order_of_a_tokens_choices_changes_nothing(experts_session) -> None:
    x, weights = np.ones((1, SIZE), np.float32), np.array([[0.25, 0.75]], np.float32)
    forward = experts_session.run(None, {"x": x, "idx": np.array([[3, 1]]), "weights": weights})[0]
    backward = experts_session.run(None, {"x": x, "idx": np.array([[1, 3]]), "weights": weights[:, ::-1].copy()})[0]
    np.testing.assert_allclose(forward, backward, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_elements", [SIZE * INNER - 1, SIZE * 2])
def test_a_matrix_in_blocks_of_rows_gives_the_same(monkeypatch, max_elements: int) -> None:
    monkeypatch.setattr(linear, "MAX_ELEMENTS", max_elements)
    check_linears(2, 3)


@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 5)])
def test_lowered_linears_equal_torch_in_two_and_three_dimensions(batch: int, tokens: int) -> None:
    check_linears(batch, tokens)


def check_linears(batch: int, tokens: int) -> None:
    x = Port("x", "float32", ("batch", "tokens", SIZE))
    y, last = Port("y", "float32", ("batch", "tokens", SIZE)), Port("last", "float32", ("batch", INNER))
    module = LinearModule("cpu")
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}
    session = session_of(LinearModule("meta"), ((x,), (y, last)), weights)
    given = torch.randn(batch, tokens, SIZE)
    for got, want in zip(session.run(None, {"x": given.numpy()}), module(given), strict=True):
        assert_close(got, want.detach(), ONNX_RUNTIME)
