from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import GOLDENS
from tests.tolerances import UNIT, assert_close
from vl2.calib import embed
from vl2.calib.calibration_set import CalibrationSet, check_source, read_calibration_set
from vl2.calib.data import CalibrationData, DataOptions, read_data
from vl2.calib.embed import EmbedOptions, embed_calibration
from vl2.calib.progress import Progress
from vl2.calib.tiles import BLOCK_SITES
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import load_model
from vl2.prompt import Processor
from vl2.quant.linears import matrices
from vl2.quant.tower import TowerStatistics

TINY = GOLDENS / "tiny-mini"


def prompts_of(folder: Path, data: CalibrationData) -> list[dict[str, Tensor]]:
    processor = Processor.from_folder(folder)
    prompts = [processor.encode(checked.sample.conversation, inference=False) for checked in data.samples]
    return [{"input_ids": torch.from_numpy(p.input_ids)[None], "tiles": torch.from_numpy(p.tiles),
             "images_seq_mask": torch.from_numpy(p.images_seq_mask)[None], "crops": torch.from_numpy(p.crops)}
            for p in prompts]


@torch.inference_mode()
def test_streamed_embeddings_equal_the_reference_models(
    mini_folder: Path, mini_set: tuple[Path, CalibrationSet]
) -> None:
    folder, found = mini_set
    tensors = load_file(folder / "embeddings.safetensors")
    data = read_data(None, Processor.from_folder(mini_folder), DataOptions(samples=3, seed=5))
    model = load_model(mini_folder)
    for index, ((start, end), prompt) in enumerate(zip(found.spans(), prompts_of(mini_folder, data), strict=True)):
        assert_close(tensors["hidden"][start:end], model.embed(**prompt)[0], UNIT)
        assert tensors["modality"][start:end].bool().equal(prompt["images_seq_mask"][0])
        assert (tensors["sequence"][start:end] == index).all()
        assert tensors["position"][start:end].tolist() == list(range(end - start))
    assert found.tokens == len(tensors["hidden"])
    assert found.image_tokens == int(tensors["modality"].sum())


@torch.inference_mode()
def test_statistics_of_tower_and_projector_are_those_of_hooked_inputs(
    mini_folder: Path, mini_set: tuple[Path, CalibrationSet]
) -> None:
    model, inputs = load_model(mini_folder), {}
    modules = {f"vision_{i}/{site}": block.get_submodule(name) for i, block in enumerate(model.vision.blocks)
               for site, name in BLOCK_SITES.items()}
    modules |= {"projector/layers.0": model.projector.layers[0], "projector/layers.2": model.projector.layers[2]}
    for name, module in modules.items():
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2)))
    for prompt in prompts_of(mini_folder, read_data(None, Processor.from_folder(mini_folder),
                                                    DataOptions(samples=3, seed=5))):
        model.embed(**prompt)
    for name, rows in inputs.items():
        file, site = name.split("/")
        x, tensors = torch.cat(rows).double(), load_file(mini_set[0] / f"{file}.safetensors")
        assert_close(tensors[f"{site}.hessian_diag"], x.square().mean(dim=0), UNIT, name)
        assert_close(tensors[f"{site}.abs_mean"], x.abs().mean(dim=0), UNIT, name)
        assert tensors[f"{site}.tokens"].tolist() == [0, len(x)]


def test_quantization_finds_the_statistics_of_every_linear_that_runs_on_images(
    mini_folder: Path, mini_set: tuple[Path, CalibrationSet]
) -> None:
    tower, found = TowerStatistics(mini_set[0]), matrices(load_config(mini_folder))
    for module, (_, inputs) in found.items():
        if module.startswith(("vision.blocks.", "projector.layers.")):
            assert tower.of(module).importance.shape == (inputs,), module


def test_a_set_is_read_back_as_it_was_written(mini_set: tuple[Path, CalibrationSet]) -> None:
    folder, found = mini_set
    assert read_calibration_set(folder) == found
    assert sorted(path.suffix for path in folder.iterdir() if path.suffix != ".safetensors") == [".json"]


def test_the_number_of_tiles_at_once_does_not_change_the_embeddings(
    synthetic_data: CalibrationData, tmp_path: Path
) -> None:
    for tiles in (1, 4, 100):
        embed_calibration(TINY, synthetic_data, tmp_path / str(tiles), EmbedOptions(tiles_at_once=tiles))
    one, four, whole = (load_file(tmp_path / name / "embeddings.safetensors") for name in ("1", "4", "100"))
    for name in one:
        assert_close(one[name], whole[name], UNIT)
        assert_close(four[name], whole[name], UNIT)


def test_text_alone_needs_no_tower(processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "Two and two?"}\n')
    data = read_data(tmp_path / "q.jsonl", processor, DataOptions())
    found = embed_calibration(TINY, data, tmp_path / "set")
    assert (found.image_tokens, len(found.sequences)) == (0, 1)
    assert not found.sequences[0].is_answered
    ids = torch.from_numpy(processor.encode(data.samples[0].sample.conversation).input_ids)
    want = load_model(TINY).language.embed_tokens(ids)
    assert load_file(tmp_path / "set/embeddings.safetensors")["hidden"].equal(want)


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    synthetic_data: CalibrationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EmbedOptions(tiles_at_once=1)
    embed_calibration(TINY, synthetic_data, tmp_path / "whole", options)
    embedded, count = [], embed._embed_chunk

    def die_in_the_second(*args) -> None:
        if len(embedded) == 1:
            raise KeyboardInterrupt
        embedded.append(count(*args))

    monkeypatch.setattr(embed, "_embed_chunk", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        embed_calibration(TINY, synthetic_data, tmp_path / "again", options)
    assert not (tmp_path / "again").exists()
    remaining = []
    monkeypatch.setattr(embed, "_embed_chunk", lambda *args: remaining.append(count(*args)))
    embed_calibration(TINY, synthetic_data, tmp_path / "again", options)
    assert len(remaining) == 2
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (tmp_path / "again.partial").exists()


def test_an_unfinished_set_of_other_data_is_refused(
    synthetic_data: CalibrationData, tmp_path: Path
) -> None:
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "identity.json").write_text("{}")
    with pytest.raises(VL2Error, match="was begun with other data"):
        embed_calibration(TINY, synthetic_data, tmp_path / "set")


def test_an_existing_set_is_not_overwritten(synthetic_data: CalibrationData, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="exists already"):
        embed_calibration(TINY, synthetic_data, tmp_path)


def test_progress_ends_at_its_total_with_nothing_remaining(synthetic_data: CalibrationData, tmp_path: Path) -> None:
    reports: list[Progress] = []
    embed_calibration(TINY, synthetic_data, tmp_path / "set", EmbedOptions(report=reports.append))
    assert np.isclose(reports[-1].done, reports[-1].total)
    assert np.isclose(reports[-1].remaining_seconds, 0, atol=1e-3)
    assert [p.done for p in reports] == sorted(p.done for p in reports)


def test_a_set_of_another_checkpoint_is_refused(mini_set: tuple[Path, CalibrationSet], mini_folder: Path) -> None:
    check_source(mini_set[1], mini_folder)
    other = GOLDENS / ("small-mini" if mini_folder.name == "tiny-mini" else "tiny-mini")
    with pytest.raises(VL2Error, match="was made from"):
        check_source(mini_set[1], other)


def test_a_set_with_another_schema_or_length_is_refused(
    synthetic_data: CalibrationData, tmp_path: Path
) -> None:
    embed_calibration(TINY, synthetic_data, tmp_path / "set")
    path = tmp_path / "set" / "calibration.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "text_tokens": values["text_tokens"] + 1}))
    with pytest.raises(VL2Error, match="holds"):
        read_calibration_set(tmp_path / "set")
    path.write_text(json.dumps({**values, "schema_version": 2}))
    with pytest.raises(VL2Error, match="schema_version 2"):
        read_calibration_set(tmp_path / "set")
