from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.calib.reference import (
    expert_inner,
    expert_rows,
    final_states,
    observe_layer,
    reference_model,
    weighted_hessian,
)
from tests.conftest import GOLDENS
from tests.tolerances import FEATURES, assert_close
from vl2.calib.calibration_set import CalibrationSet
from vl2.calib.coverage import read_coverage
from vl2.calib.data import DataOptions, read_data
from vl2.calib.embed import embed_calibration
from vl2.calib.progress import Progress
from vl2.calib.statistics import StatisticsOptions
from vl2.calib.stream import StreamOptions, stream_layers
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.model.checkpoint import expected_tensors, parameter_sources
from vl2.prompt import Processor

TINY = GOLDENS / "tiny-mini"
ROUTED = 2  # a layer with routed experts in every mini
Set = tuple[Path, CalibrationSet]


def keep_weights(l: int, stage: str, statistics: Path) -> dict[str, Tensor]:
    return {}


def stage_tensors(folder: Path, l: int, stage: str) -> dict[str, tuple[int, ...]]:
    """Names in the file and shapes of what belongs to a stage, from the names alone."""
    shapes = expected_tensors(load_config(folder))
    layer = {name: shape for name, shape in shapes.items() if f"model.layers.{l}." in name}
    return {name: shape for name, shape in layer.items()
            if ("self_attn" in name or "input_layernorm" in name) == (stage == "attention")}


def altered(folder: Path, l: int, stage: str) -> dict[str, Tensor]:
    """Weights that differ from the checkpoint's as rounding would make them differ, the same at every call."""
    originals: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        originals |= load_file(path)
    names = sorted(stage_tensors(folder, l, stage))
    return {name: originals[name].float() * (1 + 0.05 * torch.sin(torch.arange(originals[name].numel()))).view(
        originals[name].shape) for name in names if "e_score" not in name}


def alter_reference(model, folder: Path, layers: dict[int, tuple[str, ...]]):
    """Puts the altered weights of these stages into the reference model."""
    sources, state = parameter_sources(load_config(folder)), model.state_dict()
    for l, stages in layers.items():
        replaced = {name: tensor for stage in stages for name, tensor in altered(folder, l, stage).items()}
        for parameter, names in sources.items():
            if names[0] in replaced:
                tensors = [replaced[name] for name in names]
                state[parameter] = tensors[0] if state[parameter].shape == tensors[0].shape else torch.stack(tensors)
    model.load_state_dict(state, assign=True)
    return model


@pytest.fixture(scope="module")
def streamed(mini_folder: Path, mini_set: Set, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run with the checkpoint's own weights, all tokens counting alike, statistics kept."""
    work_dir = tmp_path_factory.mktemp("work") / mini_folder.name
    options = StreamOptions(StatisticsOptions(balance="none"), keep_statistics=True)
    stream_layers(mini_folder, mini_set[0], work_dir, keep_weights, options)
    return work_dir


def test_with_the_checkpoints_weights_the_states_are_the_reference_models(
    mini_folder: Path, mini_set: Set, streamed: Path
) -> None:
    model = reference_model(mini_folder)
    layers = len(model.language.layers)
    hidden = load_file(streamed / f"hidden_{layers:03}.safetensors")["hidden"]
    with torch.inference_mode():
        assert_close(model.language.norm(hidden), final_states(model, mini_set[0]), FEATURES)


@pytest.mark.parametrize("l", [0, ROUTED])
def test_hessians_are_those_of_the_reference_models_inputs(
    mini_folder: Path, mini_set: Set, streamed: Path, l: int
) -> None:
    layer = observe_layer(reference_model(mini_folder), l, mini_set[0])
    found = {**load_file(streamed / f"layer_{l:03}.attention.safetensors"),
             **load_file(streamed / f"layer_{l:03}.mlp.safetensors")}
    modality = load_file(mini_set[0] / "embeddings.safetensors")["modality"]
    sites = {name.removesuffix(".hessian") for name in found if name.endswith(".hessian") and "expert." not in name}
    assert sites == set(layer.inputs)
    for site, x in layer.inputs.items():
        assert_close(found[f"{site}.hessian"], weighted_hessian(x, torch.ones(len(x))), FEATURES, site)
        assert_close(found[f"{site}.abs_mean"], x.double().abs().mean(0), FEATURES, site)
        assert found[f"{site}.tokens"].tolist() == modality.bincount().tolist()


def test_experts_see_the_tokens_that_the_reference_model_routes_to_them(
    mini_folder: Path, mini_set: Set, streamed: Path
) -> None:
    model = reference_model(mini_folder)
    layer = observe_layer(model, ROUTED, mini_set[0])
    found = load_file(streamed / f"layer_{ROUTED:03}.mlp.safetensors")
    modality = load_file(mini_set[0] / "embeddings.safetensors")["modality"]
    counts = torch.zeros(layer.logits.shape[1], 2, dtype=torch.long)
    for e in range(len(counts)):
        rows = expert_rows(layer, e)
        counts[e] = torch.tensor([(modality[rows] == kind).sum() for kind in (0, 1)])
        x = layer.inputs["mlp.input"][rows]
        inner = expert_inner(model, ROUTED, e, x)
        for site, values in ((f"expert.{e}.input", x), (f"expert.{e}.down", inner)):
            assert_close(found[f"{site}.hessian"], weighted_hessian(values, torch.ones(len(x))), FEATURES, site)
            assert_close(found[f"{site}.abs_mean"], values.double().abs().mean(0), FEATURES, site)
            assert found[f"{site}.tokens"].equal(counts[e])
    assert found["router.counts"].equal(counts)
    assert read_coverage(streamed).counts[ROUTED].equal(counts)


def test_weights_of_modality_and_router_enter_an_experts_hessian(
    mini_folder: Path, mini_set: Set, tmp_path: Path
) -> None:
    options = StreamOptions(StatisticsOptions("modality", "router"), keep_statistics=True)
    stream_layers(mini_folder, mini_set[0], tmp_path / "work", keep_weights, options)
    path = tmp_path / f"work/layer_{ROUTED:03}.mlp.safetensors"
    found, layer = load_file(path), observe_layer(reference_model(mini_folder), ROUTED, mini_set[0])
    modality = load_file(mini_set[0] / "embeddings.safetensors")["modality"].long()
    a = (0.5 / modality.bincount().double())[modality]
    assert_close(found["mlp.input.hessian"], weighted_hessian(layer.inputs["mlp.input"], a), FEATURES)
    rows = expert_rows(layer, 1)
    p = layer.weights[rows][layer.idx[rows] == 1]
    want = weighted_hessian(layer.inputs["mlp.input"][rows], a[rows] * p.double() ** 2)
    assert_close(found["expert.1.input.hessian"], want, FEATURES)
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["vl2"])
    assert (facts["layer"], facts["stage"], facts["token_weight"]) == (ROUTED, "mlp", "router")
    assert facts["modality_weights"] == pytest.approx((len(modality) / 2 / modality.bincount()).tolist())


def test_quantized_weights_flow_on_to_statistics_and_states(mini_folder: Path, mini_set: Set, tmp_path: Path) -> None:
    def quantize(l: int, stage: str, statistics: Path) -> dict[str, Tensor]:
        shutil.copy(statistics, tmp_path / statistics.name)
        return altered(mini_folder, l, stage)

    result = stream_layers(mini_folder, mini_set[0], tmp_path / "work", quantize,
                           StreamOptions(StatisticsOptions(balance="none")))
    both = ("attention", "mlp")
    layers = load_config(mini_folder).language_config.num_hidden_layers
    whole = alter_reference(reference_model(mini_folder), mini_folder, dict.fromkeys(range(layers), both))
    with torch.inference_mode():
        states = whole.language.norm(load_file(result.hidden)["hidden"])
        want = final_states(whole, mini_set[0])
    assert_close(states, want, FEATURES)
    assert_close(load_file(result.head_statistics)["lm_head.input.hessian"],
                 weighted_hessian(want, torch.ones(len(want))), FEATURES)
    before = dict.fromkeys(range(ROUTED), both)
    for stage, done in (("attention", before), ("mlp", {**before, ROUTED: ("attention",)})):
        model = alter_reference(reference_model(mini_folder), mini_folder, done)
        found = load_file(tmp_path / f"layer_{ROUTED:03}.{stage}.safetensors")
        x = observe_layer(model, ROUTED, mini_set[0]).inputs[f"{stage}.input"]
        assert_close(found[f"{stage}.input.hessian"], weighted_hessian(x, torch.ones(len(x))), FEATURES, stage)


def test_every_tensor_of_a_layer_belongs_to_one_stage_and_is_looked_up_once(
    mini_folder: Path, mini_set: Set, tmp_path: Path
) -> None:
    class Lazy(dict):
        def __getitem__(self, name: str) -> Tensor:
            asked.append(name)
            return super().__getitem__(name)

    asked: list[str] = []
    stream_layers(mini_folder, mini_set[0], tmp_path / "work",
                  lambda l, stage, path: Lazy(altered(mini_folder, l, stage)))
    layers = load_config(mini_folder).language_config.num_hidden_layers
    stages = [(l, stage) for l in range(layers) for stage in ("attention", "mlp")]
    names = [name for key in stages for name in stage_tensors(mini_folder, *key)]
    assert sorted(asked) == sorted(name for name in names if "e_score" not in name)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_progress(reports: list[Progress], begun: bool) -> None:
    assert (reports[0].done > reports[0].total * 0.4) == begun
    assert [p.done for p in reports] == sorted(p.done for p in reports)
    assert reports[-1].done == pytest.approx(reports[-1].total)
    assert all(p.remaining_seconds is not None and p.remaining_seconds >= 0 for p in reports)


def make_text_set(checkpoint: Path, folder: Path) -> Path:
    """A handful of text tokens."""
    (folder / "q.jsonl").write_text('{"question": "Two and two?", "answer": "4"}\n')
    data = read_data(folder / "q.jsonl", Processor.from_folder(checkpoint), DataOptions())
    embed_calibration(checkpoint, data, folder / "set")
    return folder / "set"


@pytest.fixture(scope="module")
def text_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_set(TINY, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def starved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base's structure with a correction bias that keeps every token from expert 0."""
    folder = tmp_path_factory.mktemp("starved") / "base-mini"
    folder.mkdir()
    for path in (path for path in (GOLDENS / "base-mini").iterdir() if path.is_file()):
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            for name, tensor in tensors.items():
                if "e_score" in name:
                    tensor[0] = -10
            save_file(tensors, folder / path.name)
        else:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_experts_without_tokens_get_zeros_apart_from_the_nearest_tokens_and_never_nan(
    starved_folder: Path, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    options = StreamOptions(keep_statistics=True, report=reports.append)
    stream_layers(starved_folder, make_text_set(starved_folder, tmp_path), tmp_path / "work", keep_weights, options)
    found = load_file(tmp_path / "work" / f"layer_{ROUTED:03}.mlp.safetensors")
    counts, tokens = found["router.counts"].sum(dim=1).tolist(), int(found["mlp.input.tokens"].sum())
    assert counts[0] == 0 and max(counts) > 0
    for name, tensor in found.items():
        assert tensor.isfinite().all(), name
    for e, count in enumerate(counts):
        assert found[f"expert.{e}.input.hessian"].any() == (count > 0)
        assert found[f"expert.{e}.down.hessian"].any() == (count > 0)
        assert (f"expert.{e}.down.extra.hessian" in found) == (count < tokens)
        if count < tokens:
            assert int(found[f"expert.{e}.down.extra.tokens"].sum()) == tokens - count
            assert float(found[f"expert.{e}.down.extra.weight"]) > 0
            assert found[f"expert.{e}.down.extra.hessian"].any()
    assert_progress(reports, begun=False)


KILLED = """
import os, signal, sys
from pathlib import Path
from vl2.calib.stream import stream_layers
def quantize(l, stage, path):
    if (l, stage) == (2, "mlp"):
        os.kill(os.getpid(), signal.SIGKILL)
    return {}
stream_layers(*map(Path, sys.argv[1:]), quantize)
"""


def test_after_kill_9_a_run_goes_on_at_the_last_finished_layer(
    text_set: Path, tmp_path: Path
) -> None:
    whole = stream_layers(TINY, text_set, tmp_path / "whole", keep_weights)
    arguments = [sys.executable, "-c", KILLED, str(TINY), str(text_set), str(tmp_path / "work")]
    assert subprocess.run(arguments).returncode == -signal.SIGKILL
    left = names_in(tmp_path / "work")
    assert {"identity.json", "hidden_002.safetensors", "counts_001.json"} <= left
    assert "hidden_001.safetensors" not in left
    asked, reports = [], []

    def quantize(l: int, stage: str, path: Path) -> dict[str, Tensor]:
        asked.append((l, stage))
        return {}

    again = stream_layers(TINY, text_set, tmp_path / "work", quantize, StreamOptions(report=reports.append))
    assert asked == [(l, stage) for l in (2, 3) for stage in ("attention", "mlp")]
    assert again.hidden.read_bytes() == whole.hidden.read_bytes()
    assert again.head_statistics.read_bytes() == whole.head_statistics.read_bytes()
    assert names_in(tmp_path / "work") == names_in(tmp_path / "whole")
    assert read_coverage(tmp_path / "work").counts.keys() == {1, 2, 3}
    assert_progress(reports, begun=True)


def test_statistics_are_removed_once_used_unless_kept(text_set: Path, tmp_path: Path) -> None:
    stream_layers(TINY, text_set, tmp_path / "work", keep_weights)
    assert names_in(tmp_path / "work") == {"counts_001.json", "counts_002.json", "counts_003.json", "head.safetensors",
                                           "hidden_004.safetensors", "identity.json"}


def test_without_quantization_the_layers_run_as_they_are_and_only_experts_are_counted(
    text_set: Path, tmp_path: Path
) -> None:
    reports: list[Progress] = []
    whole = stream_layers(TINY, text_set, tmp_path / "whole", keep_weights)
    found = stream_layers(TINY, text_set, tmp_path / "work", None, StreamOptions(report=reports.append))
    assert found.hidden.read_bytes() == whole.hidden.read_bytes()
    counts, want = (read_coverage(tmp_path / name).counts for name in ("work", "whole"))
    assert counts.keys() == want.keys() and all(counts[l].equal(want[l]) for l in want)
    assert_progress(reports, begun=False)


def test_a_finished_run_is_not_run_again(text_set: Path, tmp_path: Path) -> None:
    first = stream_layers(TINY, text_set, tmp_path / "work", keep_weights)
    assert stream_layers(TINY, text_set, tmp_path / "work", lambda *_: pytest.fail("was asked")) == first


def test_a_work_folder_of_something_else_is_refused(text_set: Path, tmp_path: Path) -> None:
    stream_layers(TINY, text_set, tmp_path / "work", keep_weights)
    with pytest.raises(VL2Error, match="begun with another calibration set or other options"):
        stream_layers(TINY, text_set, tmp_path / "work", keep_weights, StreamOptions(StatisticsOptions("none")))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(VL2Error, match="is not empty"):
        stream_layers(TINY, text_set, tmp_path / "full", keep_weights)


def test_a_calibration_set_of_another_checkpoint_is_refused(text_set: Path, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="was made from tiny-mini"):
        stream_layers(GOLDENS / "small-mini", text_set, tmp_path / "work", keep_weights)


def test_a_limit_of_memory_that_cannot_be_kept_is_refused_before_work_begins(text_set: Path, tmp_path: Path) -> None:
    with pytest.raises(VL2Error, match="more than the limit of 0.1 GB"):
        stream_layers(TINY, text_set, tmp_path / "work", keep_weights, StreamOptions(max_ram_bytes=10**8))
    assert not (tmp_path / "work").exists()


def test_weights_that_are_not_finite_are_refused_by_layer(text_set: Path, tmp_path: Path) -> None:
    name = "language.model.layers.1.mlp.experts.0.down_proj.weight"
    broken = {key: torch.full(stage_tensors(TINY, 1, "mlp")[key], torch.nan) for key in
              (name.replace("experts.0", f"experts.{e}") for e in range(12))}
    with pytest.raises(VL2Error, match="output of decoder layer 1 is not finite"):
        stream_layers(TINY, text_set, tmp_path / "work", lambda l, s, p: broken if (l, s) == (1, "mlp") else {})


def test_a_tensor_of_another_stage_is_an_error_of_the_caller(text_set: Path, tmp_path: Path) -> None:
    name = "language.model.layers.0.mlp.up_proj.weight"
    with pytest.raises(AssertionError, match="no tensor .* in the stage attention"):
        stream_layers(TINY, text_set, tmp_path / "work", lambda *_: {name: torch.zeros(1)})
