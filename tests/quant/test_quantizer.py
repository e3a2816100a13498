"""The uncalibrated job from a checkpoint folder to a compressed-tensors one, and reading it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from vl2.errors import VL2Error
from vl2.model.checkpoint import iter_tensors
from vl2.quant.checkpoint import QuantizedCheckpoint, is_quantized
from vl2.quant.imatrix import imatrix
from vl2.quant.parts import Part, split_parts
from vl2.quant.quantizer import QuantizeOptions, Quantizer, quantize_checkpoint
from vl2.quant.recipe import OuterParts, assign_schemes, builtin_recipe
from vl2.quant.scheme import Scheme

ALL_INT8 = OuterParts(vision="int8", lm_head="int8", embeddings="int8")
EXPERT = "language.model.layers.2.mlp.experts.5.down_proj"


@pytest.fixture(scope="session", params=["tiny-mini", "base-mini"])
def source(request: pytest.FixtureRequest, goldens: Path) -> Path:
    return goldens / request.param


@pytest.fixture(scope="session")
def quantized_folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int4"
    return quantize_checkpoint(source, out, QuantizeOptions(outer=ALL_INT8))


@pytest.fixture(scope="session")
def tiny_int8(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "int8"
    return quantize_checkpoint(goldens / "tiny-mini", out, QuantizeOptions(recipe="int8", method="rtn"))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def set_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.chmod(0o644)
    path.write_text(json.dumps(config))


def test_every_tensor_reads_back_quantized_by_its_scheme_or_unchanged(source: Path, quantized_folder: Path) -> None:
    made = QuantizedCheckpoint(quantized_folder)
    schemes = assign_schemes(builtin_recipe("int4", made.config, ALL_INT8), made.config)
    read = dict(made.iter_dequantized())
    originals = dict(iter_tensors(source))
    assert read.keys() == originals.keys()
    for name, original in originals.items():
        scheme: Scheme | None = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scheme is None:
            assert torch.equal(read[name], original) and read[name].dtype == original.dtype, name
        else:
            assert torch.equal(read[name], imatrix(original.float(), None, scheme).dequantize()), name


def test_codes_read_back_as_they_were_made(source: Path, quantized_folder: Path) -> None:
    made = QuantizedCheckpoint(quantized_folder)
    scheme = assign_schemes(builtin_recipe("int4", made.config), made.config)[EXPERT]
    weight = dict(iter_tensors(source))[EXPERT + ".weight"].float()
    want, got = imatrix(weight, None, scheme), made.quantized(EXPERT)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales) and got.bits == 4


def test_tokenizer_and_processor_files_are_those_of_the_source(source: Path, quantized_folder: Path) -> None:
    for name in ("tokenizer.json", "processor_config.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (quantized_folder / name).read_bytes() == (source / name).read_bytes()


def test_the_folder_says_what_it_is(quantized_folder: Path, source: Path) -> None:
    assert is_quantized(quantized_folder) and not is_quantized(source)
    facts = json.loads((quantized_folder / "quantization.json").read_text())
    assert facts["recipe"]["name"] == "int4" and facts["method"] == "search" and facts["calibration"] is None
    assert all(matrix["over_rtn"] <= 1 for matrix in facts["matrices"])
    card = (quantized_folder / "README.md").read_text()
    assert "No calibration data" in card and "| experts |" in card
    index = json.loads((quantized_folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(facts["modules"].values())


def test_nothing_but_the_checkpoint_is_left(quantized_folder: Path) -> None:
    assert not quantized_folder.with_name("int4.partial").exists()
    suffixes = {path.suffix for path in quantized_folder.iterdir()}
    assert suffixes == {".json", ".md", ".safetensors"} and not (quantized_folder / "job.json").exists()


def test_the_quantized_checkpoint_answers_nearly_as_the_original(goldens: Path, tiny_int8: Path) -> None:
    from vl2.model.checkpoint import load_model

    model = load_model(goldens / "tiny-mini")
    hidden = torch.randn(1, 12, model.config.language_config.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = hidden, torch.arange(12)[None], torch.ones(1, 12, dtype=torch.bool)
    with torch.no_grad():
        want = model(*inputs)[0].log_softmax(-1)
        _load_dequantized(model, tiny_int8)
        got = model(*inputs)[0].log_softmax(-1)
    divergence = (want.exp() * (want - got)).sum(-1).mean()
    assert 0 < divergence < 2e-3  # the guide's bar for INT8; 0 would mean that nothing was quantized


def _load_dequantized(model, folder: Path) -> None:
    from vl2.model.checkpoint import parameter_sources

    tensors = QuantizedCheckpoint(folder).tensors
    for name, sources in parameter_sources(model.config).items():
        parameter = model.get_parameter(name)
        parts = [tensors[source].float() for source in sources]
        parameter.copy_(torch.stack(parts) if parameter.dim() > parts[0].dim() else parts[0])


def test_an_interrupted_job_resumes_at_the_finished_parts_with_the_same_bytes(goldens: Path, tmp_path: Path) -> None:
    source, options = goldens / "tiny-mini", QuantizeOptions(method="rtn")
    whole = quantize_checkpoint(source, tmp_path / "whole", options)

    class Killed(Exception):
        pass

    told: list[str] = []

    def kill(module: str, done: int, total: int) -> None:
        told.append(module)
        if len(told) == 60:
            raise Killed

    with pytest.raises(Killed):
        quantize_checkpoint(source, tmp_path / "resumed", options, kill)
    assert not (tmp_path / "resumed").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resumed.partial").glob("*.safetensors")}
    counts: list[int] = []
    resumed = quantize_checkpoint(source, tmp_path / "resumed", options, lambda _, done, total: counts.append(done))
    assert finished and all((resumed / name).stat().st_mtime_ns == time for name, time in finished.items())
    assert counts == sorted(set(counts))
    for path in whole.iterdir():
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


def test_resuming_with_other_options_is_refused(goldens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(method="rtn"))
    quantizer.quantize_part(Part("head"))
    with pytest.raises(VL2Error, match="other options"):
        quantize_checkpoint(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(method="search"))


def test_an_existing_output_is_replaced_only_when_forced(goldens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(goldens / "tiny-mini", out, QuantizeOptions(method="rtn"))
    (out / "note").touch()
    with pytest.raises(VL2Error, match="exists"):
        quantize_checkpoint(goldens / "tiny-mini", out, QuantizeOptions(method="rtn"))
    quantize_checkpoint(goldens / "tiny-mini", out, QuantizeOptions(method="rtn", force=True))
    assert is_quantized(out) and not (out / "note").exists() and not (tmp_path / "out.replaced").exists()


def test_a_method_that_needs_calibration_is_refused_without(goldens: Path, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="`gptq` needs calibration"):
        quantize_checkpoint(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(method="gptq"))


def test_finishing_names_the_first_layer_that_was_not_quantized(goldens: Path, tmp_path: Path) -> None:
    quantizer = Quantizer(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(method="rtn"))
    with pytest.raises(VL2Error, match="layer 0 attention was not quantized"):
        quantizer.finish()


def test_a_recipe_file_takes_no_outer_options(goldens: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "rules": [{"modules": "*", "scheme": "keep"}]}))
    with pytest.raises(VL2Error, match="decides on vision"):
        Quantizer(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(recipe=str(path), outer=ALL_INT8))


def test_a_quantized_checkpoint_is_not_quantized_again(tiny_int8: Path, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="quantization_config|quantized already"):
        quantize_checkpoint(tiny_int8, tmp_path / "out", QuantizeOptions())


def test_reading_an_unquantized_checkpoint_as_quantized_is_refused(goldens: Path) -> None:
    with pytest.raises(VL2Error, match="no `quantization_config`"):
        QuantizedCheckpoint(goldens / "tiny-mini")


def test_a_config_that_disagrees_with_the_tensors_is_refused_by_tensor(tiny_int8: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_int8, tmp_path)
    set_config(folder, lambda config: config["quantization_config"]["ignore"].append("re:.*o_proj$"))
    with pytest.raises(VL2Error, match=r"asks for, first `.*o_proj\.weight`"):
        QuantizedCheckpoint(folder)


def test_a_group_size_that_disagrees_with_the_scales_is_refused(tiny_int8: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_int8, tmp_path)

    def halve(config) -> None:
        for group in config["quantization_config"]["config_groups"].values():
            group["weights"] |= {"group_size": 16, "strategy": "group"}

    set_config(folder, halve)
    with pytest.raises(VL2Error, match="weight_scale` .* has the shape"):
        QuantizedCheckpoint(folder)


def test_parts_cover_a_checkpoint_in_the_order_of_the_model(goldens: Path) -> None:
    names = json.loads((goldens / "published" / "tiny.tensors.json").read_text())
    parts = split_parts(names)
    assert sum(map(len, parts.values())) == len(names)
    order = [str(part) for part in parts]
    assert order[:4] == ["vision", "embeddings", "layer 0 attention", "layer 0 mlp"] and order[-1] == "head"


def test_a_folder_that_is_no_quantized_checkpoint_is_never_replaced(goldens: Path, tmp_path: Path) -> None:
    out = tmp_path / "models"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(VL2Error, match="no quantized checkpoint"):
        quantize_checkpoint(goldens / "tiny-mini", out, QuantizeOptions(method="rtn", force=True))
    assert (out / "thesis.txt").exists() and not (tmp_path / "models.partial").exists()


def test_a_recipe_that_quantizes_nothing_is_refused_before_any_work(goldens: Path, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    path.write_text(json.dumps({"name": "none", "rules": [{"modules": "*", "scheme": "keep"}]}))
    with pytest.raises(VL2Error, match="`none` quantizes nothing") as caught:
        Quantizer(goldens / "tiny-mini", tmp_path / "out", QuantizeOptions(recipe=str(path)))
    assert "--scheme fp16" in caught.value.hint and [one.name for one in tmp_path.iterdir()] == ["none.json"]
