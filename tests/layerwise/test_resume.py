"""Interrupted measurements, refused ones, and the memory they would need."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import GOLDENS
from tests.layerwise.conftest import data_for
from vl2.config import ModelConfig
from vl2.errors import VL2Error
from vl2.folder_lock import locked_folder
from vl2.json_file import read_json
from vl2.layerwise import measure
from vl2.layerwise.checkpoints import open_pair
from vl2.layerwise.demands import peak_bytes
from vl2.layerwise.measure import MeasureOptions, measure_layers

TINY = GOLDENS / "tiny-mini"


class Killed(Exception):
    pass


def test_an_interrupted_measurement_goes_on_at_its_layer_and_gives_the_same_figures(
    quantized_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized, data = quantized_of(TINY, "int4"), data_for(TINY)
    whole = measure_layers(TINY, quantized, data)
    ran, original = [], measure.run_layer

    def stopping(pair, l, *rest):
        ran.append(l)
        if l == 2 and ran.count(2) == 1:
            raise Killed
        return original(pair, l, *rest)

    monkeypatch.setattr(measure, "run_layer", stopping)
    options = MeasureOptions(tmp_path / "work")
    with pytest.raises(Killed):
        measure_layers(TINY, quantized, data, options)
    assert len(list((tmp_path / "work").glob("*.safetensors"))) == 1, "older states are gone"
    assert {**measure_layers(TINY, quantized, data, options), "seconds": 0} == {**whole, "seconds": 0}
    assert ran == [0, 1, 2, 2, 3]
    with locked_folder(options.work, "test"), pytest.raises(VL2Error, match="another measurement of layers"):
        measure_layers(TINY, quantized, data, options)
    with pytest.raises(VL2Error, match="begun with other"):
        measure_layers(TINY, quantized, replace(data, sha256="0" * 64), options)


def test_checkpoints_of_another_model_or_tokenizer_are_refused(quantized_of, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="describes another model"):
        open_pair(GOLDENS / "small-mini", TINY)
    other = tmp_path / "other"
    shutil.copytree(TINY, other, copy_function=shutil.copyfile)
    (other / "tokenizer.json").write_text((TINY / "tokenizer.json").read_text() + " ")
    with pytest.raises(VL2Error, match=r"tokenizer\.json .* differs"):
        open_pair(TINY, other)
    (other / "manifest.json").write_text("{}")
    with pytest.raises(VL2Error, match="is a bundle"):
        open_pair(TINY, other)
    with pytest.raises(VL2Error, match="quantized already"):
        open_pair(quantized_of(TINY, "int4"), TINY)


def test_a_checkpoint_that_was_made_from_another_one_is_refused(quantized_of, tmp_path: Path) -> None:
    child = tmp_path / "child"
    shutil.copytree(quantized_of(TINY, "int4"), child)
    facts = json.loads((child / "quantization.json").read_text())
    facts["source"]["files"] = dict.fromkeys(facts["source"]["files"], "0" * 64)
    (child / "quantization.json").write_text(json.dumps(facts))
    with pytest.raises(VL2Error, match=r"made from tiny-mini, whose .* differs"):
        open_pair(TINY, child)


def test_the_published_tiny_needs_less_than_4_gb_and_a_lower_limit_is_refused(quantized_of) -> None:
    config = ModelConfig.from_dict(read_json(GOLDENS / "published" / "tiny.config.json"))
    assert 1.5e9 < peak_bytes(config, 32768, 4096) < 4e9
    with pytest.raises(VL2Error, match="need about"):
        measure_layers(TINY, quantized_of(TINY, "int4"), data_for(TINY), MeasureOptions(max_ram_bytes=1 << 20))
