"""Predicted peak memory against what runs were measured to take."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tolerances import PLANNED_MEMORY
from vl2.config import load_config
from vl2.export.graphs import KV_CACHES, declare_graphs
from vl2.manifest import read_manifest, write_manifest
from vl2.planning.demand import Demand, prompt_size
from vl2.planning.memory import cache_bytes, run_memory
from vl2.planning.models import PlannedModel, planned_model
from vl2.planning.schemes import Choice, Storage, form_of_choice, storage_of
from vl2.runtime.kv_cache import KVCache

ROOT = Path(__file__).parents[2]
_INT8 = ("int8", "int8", "int8")
# Full-size Tiny, docs/results.md and docs/planning.md: scheme, demand, peak bytes.
MEASURED = [("ort", "int4", Demand((), 472), 2.16e9), ("ort", "int4", Demand((), 2357), 2.49e9),
            ("ort", "int4", Demand((), 982, prefill_chunk=128), 2.14e9),
            ("ort", "int4", Demand(((224, 224),), 27), 2.86e9), ("ort", "int8", Demand((), 472), 3.36e9)]


def predicted(model: PlannedModel, storage: Storage, demand: Demand, answer: int) -> int:
    size = prompt_size(model, demand)
    return run_memory(model, storage, replace(size, context=size.prompt_tokens + answer), "cpu", False).peak


@pytest.mark.parametrize("lowering, scheme, demand, measured", MEASURED)
def test_the_quantized_full_size_tiny_takes_what_is_planned(lowering, scheme, demand, measured) -> None:
    model = planned_model("tiny")
    storage = storage_of(model.tensors, form_of_choice(Choice(scheme, *_INT8), model.config), 2, lowering)
    assert predicted(model, storage, demand, 8) == pytest.approx(measured, rel=PLANNED_MEMORY)


def test_float_weights_count_whole_and_measure_less_by_the_experts_that_no_token_chose() -> None:
    """The random checkpoint sends 472 tokens to some experts only; both runs agree on how many."""
    model = planned_model("tiny")
    shares = []
    for scheme, number, demand, measured in (("fp16", 2, Demand((), 472), 4.92e9),
                                             ("fp32", 4, Demand(((224, 224),), 27), 9.56e9)):
        storage = storage_of(model.tensors, form_of_choice(Choice(scheme), model.config), number)
        untouched = predicted(model, storage, demand, 8) - measured
        assert untouched > 0, "the plan is for the worst case"
        shares.append(1 - untouched / storage.modules["experts"])
    assert shares[0] == pytest.approx(shares[1], abs=0.1) and 0.5 < min(shares)


@pytest.mark.parametrize("images", [0, 1])
def test_a_run_of_nano_takes_what_is_planned(nano_bundle: Path, images: int) -> None:
    given = ["--image", str(ROOT / "nano" / "demo.png")] * images
    code = "import sys; from vl2.cli import main; sys.exit(main())"
    options = ["--prompt", "What is the total?", "--json", "--no-hash-check", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, "run", str(nano_bundle), *given, *options],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    model = planned_model(str(nano_bundle))
    demand = Demand(((224, 224),) * images, answer["prompt_tokens"] - 267 * images)
    assert prompt_size(model, demand).prompt_tokens == answer["prompt_tokens"]
    assert predicted(model, model.storage, demand, 16) == pytest.approx(answer["peak_rss_bytes"], rel=PLANNED_MEMORY)


def test_the_cache_holds_keys_and_values_or_the_latent() -> None:
    tiny, small, base = (planned_model(name).config.language_config for name in ("tiny", "small", "base"))
    assert cache_bytes(tiny) == 12 * 2 * 10 * 128 * 4
    assert cache_bytes(small) == 27 * (512 + 64) * 4 and cache_bytes(base, 2) == 30 * (512 + 64) * 2
    # codes of INT8 with a float32 scale a token and head, of a latent one and one of its rope key
    assert cache_bytes(tiny, 1) == 12 * 2 * 10 * (128 + 4) and cache_bytes(small, 1) == 27 * (512 + 64 + 2 * 4)


@pytest.mark.parametrize("name, kv_cache", [("tiny-mini", "int8"), ("small-mini", "fp16"), ("base-mini", "int8")])
def test_the_planned_cache_of_a_bundle_is_what_its_buffers_take(
    goldens: Path, nano_bundle: Path, tmp_path: Path, name: str, kv_cache: str
) -> None:
    config = load_config(goldens / name)
    graphs = declare_graphs(config, KV_CACHES[kv_cache])
    cache = KVCache(graphs["decoder"])
    cache.reserve(100)
    write_manifest(tmp_path, replace(read_manifest(nano_bundle), graphs=graphs, lowering="cpu"))
    (tmp_path / "config.json").write_bytes((goldens / name / "config.json").read_bytes())
    model = planned_model(str(tmp_path))
    planned = run_memory(model, model.storage, prompt_size(model, Demand(context=cache.capacity)), "cpu", False)
    assert planned.kv_cache == cache.size_bytes and model.storage.kv_cache == kv_cache


def test_workstation_memory_is_what_quantizing_asks_for() -> None:
    from vl2.cli.plans import Extent, peak_memory_bytes
    from vl2.planning.workstation import EXPORT_BYTES, workstation_memory
    from vl2.quant.quantizer import QuantizeOptions
    from vl2.quant.recipe import OuterParts

    for name in ("tiny", "small", "base"):
        model = planned_model(name)
        options = QuantizeOptions("int4", OuterParts(*_INT8), "awq+gptq")
        asked = peak_memory_bytes(model.config, options, Extent(32768, 4000, 100))
        planned = workstation_memory(model, Choice("int4", *_INT8), engine=True)
        # two estimates, of which the quantizer's follows its parts one by one
        assert planned.quantize == pytest.approx(asked, rel=0.05)
        assert planned.build > planned.export == EXPORT_BYTES
