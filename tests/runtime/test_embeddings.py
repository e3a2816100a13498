from pathlib import Path

import numpy as np
import pytest

from tests.runtime.small_bundle import HIDDEN, TABLES, VOCAB, save_tensors
from vl2.errors import VL2Error
from vl2.manifest import read_manifest
from vl2.runtime.embeddings import Embeddings


def stored(bundle: Path) -> Embeddings:
    return Embeddings(bundle, read_manifest(bundle))


def test_rows_come_back_as_they_were_stored(bundle: Path) -> None:
    embeddings, ids = stored(bundle), np.array([5, 0, 5, VOCAB - 1])
    np.testing.assert_array_equal(embeddings.lookup(ids), TABLES["embed_tokens"][ids])
    np.testing.assert_array_equal(embeddings.image_newline, TABLES["image_newline"])
    np.testing.assert_array_equal(embeddings.view_seperator, TABLES["view_seperator"])


def test_half_precision_rows_are_widened_exactly(bundle: Path) -> None:
    halves = {name: table.astype(np.float16) for name, table in TABLES.items()}
    save_tensors(bundle / "embeddings.safetensors", halves, "F16")
    rows = stored(bundle).lookup(np.arange(VOCAB))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, halves["embed_tokens"].astype(np.float32))


def test_bfloat16_rows_are_the_upper_halves_of_float32(bundle: Path) -> None:
    upper = {name: (table.view(np.uint32) >> 16).astype(np.uint16) for name, table in TABLES.items()}
    save_tensors(bundle / "embeddings.safetensors", upper, "BF16")
    rows = stored(bundle).lookup(np.arange(VOCAB))
    np.testing.assert_array_equal(rows, (TABLES["embed_tokens"].view(np.uint32) & 0xFFFF0000).view(np.float32))
    np.testing.assert_array_equal(stored(bundle).image_newline.view(np.uint32) & 0xFFFF, 0)


@pytest.mark.parametrize("groups", [1, 2, HIDDEN])
def test_packed_rows_are_codes_times_the_scale_of_their_group(bundle: Path, groups: int) -> None:
    generator = np.random.default_rng(groups)
    codes = generator.integers(-128, 128, (VOCAB, HIDDEN)).astype(np.int8)
    scales = generator.uniform(0.001, 0.01, (VOCAB, groups)).astype(np.float16)
    save_packed(bundle, codes, scales)
    ids = np.array([3, 3, 0, VOCAB - 1])
    wanted = codes[ids].astype(np.float32) * np.repeat(scales[ids].astype(np.float32), HIDDEN // groups, axis=1)
    np.testing.assert_array_equal(stored(bundle).lookup(ids), wanted)


@pytest.mark.parametrize("shape", [(VOCAB, HIDDEN - 1), (VOCAB,), None])
def test_scales_that_do_not_fit_the_table_are_refused(bundle: Path, shape: tuple[int, ...] | None) -> None:
    save_packed(bundle, np.ones((VOCAB, HIDDEN), np.int8), None if shape is None else np.ones(shape, np.float16))
    with pytest.raises(VL2Error, match="embed_tokens.scales"):
        stored(bundle)


def save_packed(bundle: Path, codes: np.ndarray, scales: np.ndarray | None) -> None:
    tensors = TABLES | {"embed_tokens": codes} | ({} if scales is None else {"embed_tokens.scales": scales})
    save_tensors(bundle / "embeddings.safetensors", tensors, {"embed_tokens": "I8", "embed_tokens.scales": "F16"})


def test_rows_are_copies_that_may_be_written_to(bundle: Path) -> None:
    embeddings = stored(bundle)
    embeddings.lookup(np.array([1]))[:] = 0
    np.testing.assert_array_equal(embeddings.lookup(np.array([1]))[0], TABLES["embed_tokens"][1])


def test_a_missing_tensor_is_named(bundle: Path) -> None:
    save_tensors(bundle / "embeddings.safetensors", {"embed_tokens": TABLES["embed_tokens"]})
    with pytest.raises(VL2Error, match="no tensor 'image_newline'"):
        stored(bundle)


@pytest.mark.parametrize("name, table, dtype", [
    ("embed_tokens", np.zeros((VOCAB, HIDDEN + 1), np.float32), "F32"),
    ("view_seperator", np.zeros((1, HIDDEN), np.float32), "F32"),
    ("image_newline", np.zeros(HIDDEN, np.int32), "I32"),
])
def test_a_tensor_of_another_shape_or_dtype_is_named(bundle: Path, name: str, table, dtype: str) -> None:
    if dtype == "F32":
        save_tensors(bundle / "embeddings.safetensors", TABLES | {name: table})
    else:
        save_tensors(bundle / "embeddings.safetensors", {key: np.zeros(value.shape, np.int32)
                                                         for key, value in TABLES.items()}, dtype)
        name = "embed_tokens"
    with pytest.raises(VL2Error, match=f"{name} is {dtype}"):
        stored(bundle)
