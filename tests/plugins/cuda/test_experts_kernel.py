"""A whole MoE layer through the launch plan, emulated, against the eager operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.plugins.cuda.experts_layer import LAYERS, random_layer, stored
from tests.plugins.cuda.weights import relative_error
from tests.tolerances import CUDA_PRODUCT, CUDA_TENSOR_PRODUCT
from vl2.plugins.cuda.experts import experts_plan
from vl2.plugins.cuda.launch import workspace_bytes, workspace_offsets
from vl2.plugins.cuda.routing import RoutingProblem
from vl2.plugins.cuda.storage import Storage

SMALL = ("nano", "tiny-mini", "small-mini", "base-mini", "no shared experts", "shared of an odd width")
STORAGES = [Storage("int4", 32), Storage("int4", 64), Storage("int4", 128), Storage("int4"), Storage("int8", 128),
            Storage("int8"), Storage("fp16")]  # fmt: skip


def error(emulator, problem, order: int = 0) -> float:
    arrays, want = random_layer(np.random.default_rng(0), problem)
    emulator.run(experts_plan(problem), arrays, order)
    return relative_error(arrays["y"], want)


@pytest.mark.parametrize("name, storage", (("tiny", Storage("int4", 128)), ("small", Storage("int4", 64)),
                                           ("base", Storage("int4", 32))))  # fmt: skip
def test_a_decode_step_of_a_published_layer_equals_the_eager_operator(emulator, name: str, storage: Storage) -> None:
    """One chosen expert: `benchmarks/gpu_kernels.py --emulate --full` does the whole layers, which takes a minute."""
    layer = LAYERS[name]
    layer = replace(layer, routing=replace(layer.routing, experts=2, top_k=1), shared_size=0)
    assert error(emulator, stored(layer, storage)) < CUDA_PRODUCT


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_a_decode_step_of_a_small_layer_equals_the_eager_operator(emulator, name: str, storage: Storage) -> None:
    assert error(emulator, stored(LAYERS[name], storage), order=sum(map(ord, name)) % 8) < CUDA_PRODUCT


@pytest.mark.parametrize("storage", (Storage("int4", 32), Storage("int8", 128), Storage("fp16")), ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_a_prefill_of_a_small_layer_equals_the_eager_operator(emulator, name: str, storage: Storage) -> None:
    layer = LAYERS[name]
    layer = replace(layer, routing=replace(layer.routing, tokens=sum(map(ord, name)) % 60 + 5))
    assert error(emulator, stored(layer, storage), order=sum(map(ord, name)) % 8) < CUDA_TENSOR_PRODUCT


def test_experts_with_more_tokens_than_the_grid_holds_and_experts_without_any(emulator) -> None:
    problem = stored(replace(LAYERS["nano"], routing=RoutingProblem(200, 8, 1)), Storage("int4", 32))
    assert experts_plan(problem).launches[2].grid[2] * 64 < 200
    arrays, want = random_layer(np.random.default_rng(0), problem, favoured=5)
    emulator.run(experts_plan(problem), arrays)
    assert relative_error(arrays["y"], want) < CUDA_TENSOR_PRODUCT


def test_routed_and_shared_experts_may_be_stored_differently(emulator) -> None:
    for routed, shared in (("int4", "fp16"), ("int8", "int4"), ("fp16", "int8")):
        assert error(emulator, stored(LAYERS["nano"], Storage(routed, 32), Storage(shared, 32))) < CUDA_PRODUCT


def test_the_order_of_threads_and_blocks_changes_no_bit(emulator) -> None:
    arrays, _ = random_layer(np.random.default_rng(0), stored(LAYERS["small-mini"], Storage("int4", 32)))
    plan, results = experts_plan(stored(LAYERS["small-mini"], Storage("int4", 32))), []
    for order in range(8):
        emulator.run(plan, arrays, order)
        results.append(arrays["y"].copy())
    assert all((one == results[0]).all() for one in results)


def test_scratch_buffers_are_aligned_and_do_not_overlap() -> None:
    plan = experts_plan(stored(LAYERS["small"], Storage("int4", 64)))
    offsets = workspace_offsets(plan)
    ends = {name: offset + plan.workspace[name] for name, offset in offsets.items()}
    starts = sorted(offsets.values())
    assert all(offset % 256 == 0 for offset in starts) and max(ends.values()) <= workspace_bytes(plan)
    assert all(end <= later for end, later in zip(sorted(ends.values()), starts[1:], strict=False))


def test_memory_behind_the_weights_is_never_touched(emulator) -> None:
    problem = stored(LAYERS["nano"], Storage("int4", 32))
    arrays, _ = random_layer(np.random.default_rng(0), problem)
    arrays["down"] = arrays["down"][:4]
    with pytest.raises(Exception, match="vl2_down_int4: access outside a buffer"):
        emulator.run(experts_plan(problem), arrays)
