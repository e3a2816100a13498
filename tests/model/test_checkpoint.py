from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import GOLDENS
from vl2.config import ModelConfig, load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import (
    check_checkpoint,
    expected_tensors,
    iter_tensors,
    load_model,
    parameter_shapes,
    parameter_sources,
    read_tensor,
    unused_tensors,
)
from vl2.safetensors_file import checkpoint_entries

PUBLISHED = {"tiny": 2582, "small": 5639, "base": 6973}
BIAS = "language.model.layers.1.mlp.gate.e_score_correction_bias"
EXPERT = "language.model.layers.2.mlp.experts.7.up_proj.weight"

Tensors = dict[str, tuple[str, list[int], bytes]]


def read_file(path: Path) -> Tensors:
    """A safetensors file, by hand: the tests must not trust the code they test."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        name: (value["dtype"], value["shape"], raw[slice(*(start + offset for offset in value["data_offsets"]))])
        for name, value in header.items()
    }


def write_file(path: Path, tensors: Tensors) -> None:
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of tiny-mini with one tensor changed or, given None, left out."""

    def make(name: str, edit: Callable | None) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(GOLDENS / "tiny-mini", folder, ignore=shutil.ignore_patterns("golden"))
        tensors = read_file(folder / "model.safetensors")
        old = tensors.pop(name, None)
        if edit is not None:
            tensors[name] = edit(old)
        write_file(folder / "model.safetensors", tensors)
        return folder

    return make


def with_value(value: float) -> Callable:
    def edit(old: tuple[str, list[int], bytes]) -> tuple[str, list[int], bytes]:
        numbers = np.frombuffer(old[2], dtype="<f4").copy()
        numbers[len(numbers) // 2] = value
        return old[0], old[1], numbers.tobytes()

    return edit


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_model_accounts_for_every_published_tensor_and_no_other(variant: str) -> None:
    published = json.loads((GOLDENS / "published" / f"{variant}.tensors.json").read_text())
    config = ModelConfig.from_dict(json.loads((GOLDENS / "published" / f"{variant}.config.json").read_text()))
    assert len(published) == PUBLISHED[variant]
    expected = expected_tensors(config)
    assert {name: list(shape) for name, shape in expected.items()} == published
    read = [name for sources in parameter_sources(config).values() for name in sources]
    assert len(read) == len(set(read)) == len(published) - 13
    assert set(read) | unused_tensors(config).keys() == published.keys()


def test_a_stacked_parameter_holds_its_experts_in_order(goldens: Path) -> None:
    folder = goldens / "base-mini"
    config, entries, model = load_config(folder), checkpoint_entries(folder), load_model(folder)
    parameters = dict(model.named_parameters())
    stacked = {name: names for name, names in parameter_sources(config).items() if len(names) > 1}
    assert len(stacked) == 3 * 3
    for name, sources in stacked.items():
        for e, source in enumerate(sources):
            assert f".experts.{e}." in source
            assert torch.equal(parameters[name][e], read_tensor(entries[source]).float())


def test_every_parameter_equals_its_tensor_in_the_file(mini_folder: Path) -> None:
    parameters = load_model(mini_folder).state_dict()
    config = load_config(mini_folder)
    sources = parameter_sources(config)
    assert parameters.keys() == sources.keys() == parameter_shapes(config).keys()
    seen = dict(iter_tensors(mini_folder))
    assert {name for names in sources.values() for name in names} == seen.keys()
    for name, (first, *others) in sources.items():
        want = torch.stack([seen[n] for n in (first, *others)]) if others else seen[first]
        assert torch.equal(parameters[name], want.float())


def test_loading_in_another_dtype_rounds_every_weight_once(goldens: Path) -> None:
    full, half = (load_model(goldens / "base-mini", dtype) for dtype in (torch.float32, torch.bfloat16))
    for (name, want), got in zip(full.state_dict().items(), half.state_dict().values(), strict=True):
        kept = name.endswith("e_score_correction_bias")
        assert got.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(got.float(), want)


def test_the_model_builds_on_the_meta_device_without_memory(goldens: Path) -> None:
    values = json.loads((goldens / "published" / "base.config.json").read_text())
    shapes = parameter_shapes(ModelConfig.from_dict(values))
    assert shapes["language.layers.29.mlp.experts.down_proj"] == (72, 2560, 1536)


def test_loading_fails_when_a_tensor_is_missing(change: Callable) -> None:
    folder = change(EXPERT, None)
    with pytest.raises(VL2Error, match=rf"lacks 1 tensors .* `{EXPERT}`") as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_loading_fails_when_a_tensor_is_left_over(change: Callable) -> None:
    folder = change("vision.blocks.9.norm1.weight", lambda _: ("F32", [64], bytes(256)))
    with pytest.raises(VL2Error, match=r"`vision.blocks.9.norm1.weight` in .*model.safetensors is not part"):
        load_model(folder)


@pytest.mark.parametrize(
    "name, shape", ((EXPERT, [96, 64]), ("vision.attn_pool.latent", [1, 64]), ("image_newline", [96, 1]))
)
def test_loading_fails_when_a_shape_differs(change: Callable, name: str, shape: list[int]) -> None:
    folder = change(name, lambda old: (old[0], shape, old[2]))
    with pytest.raises(VL2Error, match=rf"`{name}` in .*model.safetensors has the shape \{shape}, expected"):
        load_model(folder)


@pytest.mark.parametrize("dtype", ("I32", "U32"))
def test_loading_fails_when_a_dtype_is_not_a_weight_dtype(change: Callable, dtype: str) -> None:
    folder = change("image_newline", lambda old: (dtype, old[1], old[2]))
    with pytest.raises(VL2Error, match=rf"`image_newline` in .* has the dtype {dtype}, expected F32, F16, BF16"):
        check_checkpoint(folder, load_config(folder))


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("name", ("language.model.embed_tokens.weight", EXPERT))
def test_loading_fails_when_a_tensor_holds_nan_or_infinity(change: Callable, name: str, value: float) -> None:
    folder = change(name, with_value(value))
    check_checkpoint(folder, load_config(folder))
    with pytest.raises(VL2Error, match=rf"`{name}` in .*model.safetensors holds NaN or infinity"):
        load_model(folder)
    with pytest.raises(VL2Error, match=name):
        list(iter_tensors(folder))


@pytest.mark.parametrize("dtype, code", (("F16", "<f2"), ("BF16", None)))
def test_nan_is_found_in_half_precision(change: Callable, dtype: str, code: str | None) -> None:
    nan = np.full(96, np.nan, dtype=code).tobytes() if code else b"\xc0\x7f" * 96
    folder = change("image_newline", lambda old: (dtype, old[1], nan))
    with pytest.raises(VL2Error, match="`image_newline` in .* holds NaN or infinity"):
        load_model(folder)


def test_loading_fails_when_the_wanted_dtype_cannot_hold_a_weight(change: Callable) -> None:
    folder = change("language.lm_head.weight", with_value(70000.0))
    load_model(folder)
    with pytest.raises(VL2Error, match="`language.lm_head.weight` in .* holds 70000, which float16 cannot hold"):
        load_model(folder, torch.float16)


def test_a_correction_bias_in_float32_is_accepted_beside_bfloat16_weights(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "base-mini", tmp_path / "c", ignore=shutil.ignore_patterns("golden"))
    shard = tmp_path / "c" / "model-00001-of-000001.safetensors"
    tensors = read_file(shard)
    bias = np.linspace(0.1001, 0.2001, 16, dtype="<f4")
    tensors[BIAS] = ("F32", [16], bias.tobytes())
    write_file(shard, tensors)
    model = load_model(tmp_path / "c", torch.bfloat16)
    assert torch.equal(model.language.layers[1].mlp.gate.e_score_correction_bias, torch.from_numpy(bias))


def test_loading_fails_when_the_file_shrinks_after_its_header_was_read(change: Callable) -> None:
    folder = change("image_newline", lambda old: old)
    entry = checkpoint_entries(folder)["image_newline"]
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(entry.offset + 100)
    with pytest.raises(VL2Error, match=r"`image_newline` in .* is cut off after 100 of 384 bytes"):
        read_tensor(entry)
    with pytest.raises(VL2Error, match="truncated"):
        load_model(folder)


MEASURE = """
import resource, sys
from vl2.model.checkpoint import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((after - before) * 1024, weights)
"""


def test_loading_needs_the_weights_once_and_one_tensor_more(change: Callable) -> None:
    rows = 100_000
    wide = ("F32", [rows, 96], bytes(rows * 96 * 4))
    folder = change("language.model.embed_tokens.weight", lambda _: wide)
    tensors = read_file(folder / "model.safetensors") | {"language.lm_head.weight": wide}
    write_file(folder / "model.safetensors", tensors)
    values = json.loads((folder / "config.json").read_text())
    values["language_config"]["vocab_size"] = rows
    (folder / "config.json").write_text(json.dumps(values))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
    grown, weights = map(int, run.stdout.split())
    assert weights > 2 * len(wide[2])
    # 16 MB: the headers, the modules, the allocator's rest
    assert grown < weights + 16e6


def test_a_tower_without_pooling_head_needs_no_pooling_tensors(change: Callable) -> None:
    folder = change("image_newline", lambda old: old)
    values = json.loads((folder / "config.json").read_text())
    values["vision_config"]["global_pool"] = ""
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(VL2Error, match=r"`vision.attn_pool\..* is not part of the model"):
        load_model(folder)
    tensors = {n: t for n, t in read_file(folder / "model.safetensors").items() if "attn_pool" not in n}
    write_file(folder / "model.safetensors", tensors)
    load_model(folder)
