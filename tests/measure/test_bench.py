"""Figures of `vl2 bench` follow from its readings, and readings from what was asked; how long it took is not judged."""

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.cli.test_cli import vl2
from vl2.config import load_config
from vl2.errors import VL2Error
from vl2.image import image_crops
from vl2.manifest import read_manifest
from vl2.measure.bench import Setting, run_bench
from vl2.measure.figures import figures_of, ratios
from vl2.measure.probe import measure
from vl2.measure.text import describe
from vl2.measure.traffic import traffic_of
from vl2.measure.workload import Texts, Workload, check_contexts, fitting_contexts, noise_images
from vl2.operators import library_path
from vl2.planning.memory import cache_bytes
from vl2.prompt import Message, Processor

GOLDENS = Path(__file__).parents[1] / "goldens"
CONTEXTS, NEW_TOKENS = (128, 224), 5
WORK = Workload(CONTEXTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def pair(bundle_of) -> list[Path]:
    """A bundle with keys and values, and one with the latent cache."""
    return [bundle_of(GOLDENS / "tiny-mini"), bundle_of(GOLDENS / "base-mini")]


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def bench(pair, told):
    return run_bench(pair, Setting(WORK, rounds=2, options={"check_hashes": False, "device": "cpu"}, tell=told.append))


def test_rounds_take_the_bundles_in_turn_and_each_measurement_is_a_process_of_its_own(bench, told, pair):
    assert [line.split(": ")[1] for line in told] == [str(bundle) for bundle in pair * 2]
    readings = [reading for one in bench.measured for reading in one.readings]
    assert len(readings) == 4 == len({reading["pid"] for reading in readings})
    first, second = (one.readings for one in bench.measured)
    ends = [reading["first_token_at"] for pair in zip(first, second, strict=True) for reading in pair]
    assert ends == sorted(ends)


def test_every_prompt_token_is_counted_once_and_every_new_token_but_the_first_is_decoded(bench):
    for one in bench.measured:
        for reading in one.readings:
            kept = 0
            for row, context in zip(reading["contexts"], CONTEXTS, strict=True):
                assert context - 8 < row["prompt_tokens"] <= context  # a word has a few tokens here
                assert row["prefill_tokens"] == row["prompt_tokens"] - kept
                assert row["decode_steps"] == NEW_TOKENS - 1
                kept = row["prompt_tokens"] + row["decode_steps"]


def test_a_second_question_keeps_the_prompt_of_the_first(bench):
    for one in bench.measured:
        for reading in one.readings:
            image = reading["image"]
            assert image["again_reused_tokens"] >= image["prompt_tokens"] - 1


def test_times_contain_their_parts_and_memory_only_grows(bench):
    for one in bench.measured:
        for reading in one.readings:
            assert reading["first_token_seconds"] >= reading["open_seconds"] + reading["load_seconds"] > 0
            assert reading["image"]["first_token_seconds"] >= reading["image"]["encode_seconds"] > 0
            assert 0 < reading["peak_rss_text_bytes"] <= reading["peak_rss_bytes"]


def test_figures_are_the_medians_of_the_rounds_and_ratios_their_quotients(bench):
    for one in bench.measured:
        rates = [row["decode_steps"] / row["decode_seconds"] for row in (r["contexts"][1] for r in one.readings)]
        assert one.figures["decode_tokens_per_second_at_224"] == statistics.median(rates)
        assert set(one.figures) == {figure.key for figure in figures_of(CONTEXTS)}
    first, second = (one.figures for one in bench.measured)
    assert bench.to_dict()["ratios"]["peak_rss_bytes"] == second["peak_rss_bytes"] / first["peak_rss_bytes"]
    assert ratios({"a": 3.0}, {"a": 0.0}) == {"a": None}


def test_bytes_read_are_weights_with_the_chosen_experts_and_the_cache(bench, pair):
    for one, bundle in zip(bench.measured, pair, strict=True):
        modules, config = read_manifest(bundle).modules, load_config(bundle).language_config
        share = config.num_experts_per_tok / config.n_routed_experts
        assert one.traffic.weights["experts"] == round(modules["experts"].size_bytes * share)
        whole = {"attention", "router", "lm_head", "shared_experts", "dense_mlp", "norms"} & modules.keys()
        assert one.traffic.weights.keys() == whole | {"experts"}
        assert all(one.traffic.weights[name] == modules[name].size_bytes for name in whole)
        assert one.traffic.cache_position == cache_bytes(config)
        for reading in one.readings:
            for row in reading["contexts"]:
                positions = row["prompt_tokens"] + row["decode_steps"] / 2
                assert row["step_bytes"] == sum(one.traffic.weights.values()) + positions * cache_bytes(config)
        reading, row = one.readings[0], one.readings[0]["contexts"][0]
        share = next(figure for figure in figures_of(CONTEXTS) if figure.key == "bandwidth_share_at_128")
        rate = row["step_bytes"] * row["decode_steps"] / row["decode_seconds"]
        assert share.value(reading) == pytest.approx(rate / reading["bandwidth"])  # the same product in another order


def test_the_table_has_a_row_a_figure_and_a_column_a_bundle(bench, pair):
    text = describe(bench)
    assert all(f"{letter}: {bundle}, CPU" in text for letter, bundle in zip("AB", pair, strict=True))
    for figure in figures_of(CONTEXTS):
        row = next(line for line in text.splitlines() if line.startswith(figure.label))
        assert len(row.removeprefix(figure.label).split()) == 3
    json.loads(json.dumps(bench.to_dict()))


def test_the_verb_prints_a_table_and_one_line_of_json(pair):
    done = vl2("bench", pair[0], "--rounds", 1, "--context", 96, "--new-tokens", 2, "--image", "40x20",
               "--device", "cpu")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["contexts"] == [96] and facts["rounds"] == 1 and "ratios" not in facts
    assert done.stderr.splitlines() == [f"round 1 of 1: {pair[0]}"]
    geometry = read_manifest(pair[0]).image.geometry
    (wide, high), = image_crops([(40, 20)], geometry)
    assert facts["bundles"][0]["rounds"][0]["image"]["tiles"] == 1 + wide * high


def test_a_context_that_the_model_does_not_hold_is_refused(pair):
    manifests = [read_manifest(bundle) for bundle in pair]
    assert fitting_contexts(manifests, 32) == (128, 512, 2048)
    limit = manifests[0].language.max_position_embeddings
    assert fitting_contexts(manifests, limit - 100) == (100,)
    with pytest.raises(VL2Error, match="holds 4,096"):
        check_contexts(Workload((4090,), 8), manifests)
    with pytest.raises(VL2Error, match="ascending"):
        Workload((512, 128))


def test_an_error_of_the_measured_process_is_told_as_it_was_raised(pair):
    with pytest.raises(VL2Error, match="no question fits a prompt of 3 tokens") as raised:
        run_bench(pair[:1], Setting(Workload((3,), 2), rounds=1, options={"check_hashes": False}))
    assert "--context" in raised.value.hint


def test_a_measured_process_that_dies_is_told_with_its_last_words(pair, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'out of luck' >&2\nkill -9 $$\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(VL2Error, match="ended with code -9: out of luck"):
        run_bench(pair[:1], Setting(WORK, rounds=1))


def test_questions_have_the_wanted_length_and_repeat_with_their_seed():
    processor = Processor.from_folder(GOLDENS / "tiny-mini")
    history = [Message("user", "What is it?"), Message("assistant", "A page.")]
    question = Texts(processor, 1).question(history, 150)
    turns = [*history, Message("user", question), Message("assistant", "")]
    assert 142 < len(processor.lay_out(turns).input_ids) <= 150
    assert Texts(processor, 1).question(history, 150) == question != Texts(processor, 2).question(history, 150)


def test_images_differ_from_each_other_and_repeat_with_their_seed():
    images, same = noise_images((30, 20), 3), noise_images((30, 20), 3)
    first, second = next(images), next(images)
    assert first.size == (30, 20) and first.tobytes() != second.tobytes()
    assert (next(same).tobytes(), next(same).tobytes()) == (first.tobytes(), second.tobytes())


@pytest.mark.skipif(library_path()[0] is None, reason="the operator library was not built")
def test_bundles_of_the_operator_library_are_measured_as_well(bundle_of):
    bundle = bundle_of(GOLDENS / "small-mini", "fp16", "cpu")
    work = {"contexts": [64], "new_tokens": 3, "image_size": None, "prefill_chunk": 512, "seed": 0}
    reading = measure(bundle, {"check_hashes": False}, work)
    assert reading["contexts"][0]["decode_steps"] == 2 and traffic_of(bundle).cache_position > 0
