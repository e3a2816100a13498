"""Versions of a model side by side, against the whole reference model with the same tensors in place."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.calib.reference import final_states, reference_model
from tests.quant.layer_files import put_into
from tests.tolerances import SAME_KLD, assert_close
from vl2.calib.calibration_set import CalibrationSet
from vl2.calib.statistics import TEXT
from vl2.calib.variants import Birth, Variants, read_excerpt, with_rows_of
from vl2.config import load_config


def noisy(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors whose names hold `part`, with a tenth of their size in noise."""
    from vl2.quant.source import Source

    source, generator = Source(folder), torch.Generator().manual_seed(3)
    tensors = {name: source.tensor(name).float() for name in source.entries if part in name}
    return {name: x + 0.1 * x.abs().mean() * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}


@torch.inference_mode()
def predictions(folder: Path, calibration: Path, replaced: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """Log-probabilities at these rows by the reference, the whole model in memory."""
    model = reference_model(folder)
    put_into(model, replaced)
    return model.language.lm_head(final_states(model, calibration)[rows]).double().log_softmax(dim=-1)


def test_each_version_diverges_as_the_whole_model_with_its_tensors(mini_set: tuple[Path, CalibrationSet],
                                                                   mini_folder: Path) -> None:
    calibration, _ = mini_set
    excerpt = read_excerpt(mini_folder, calibration, tokens=10**6)
    cases = {(0, "mlp"): "layers.0.mlp", (1, "attention"): "layers.1.self_attn", (2, "mlp"): "layers.2.mlp.experts"}
    tensors = {place: noisy(mini_folder, part) for place, part in cases.items()}
    tensors["head"] = noisy(mini_folder, "lm_head")
    variants = Variants(mini_folder, excerpt, capacity=len(cases))
    changes = {}
    for l in range(load_config(mini_folder).language_config.num_hidden_layers):
        for stage in ("attention", "mlp"):
            births = [Birth(cases[l, stage], tensors[l, stage])] if (l, stage) in cases else []
            changes |= variants.advance(l, stage, births)
    found = variants.divergences({"head": ("original", tensors["head"])})
    assert changes.keys() == set(cases.values()) and all(change > 0 for change in changes.values())
    rows = (excerpt.modality == TEXT).nonzero()[:, 0]
    original = predictions(mini_folder, calibration, {}, rows)
    for place, part in [*cases.items(), ("head", "head")]:
        other = predictions(mini_folder, calibration, tensors[place], rows)
        want = float((original.exp() * (original - other)).sum(dim=-1).mean())
        assert_close(found[part].kld, want, SAME_KLD, part)
        assert want > 1e-5 and found[part].positions == len(rows)


def test_a_version_may_differ_everywhere_and_from_the_beginning(mini_set: tuple[Path, CalibrationSet],
                                                                mini_folder: Path) -> None:
    calibration, _ = mini_set
    excerpt = read_excerpt(mini_folder, calibration, tokens=1)
    assert len(excerpt.spans) == 1, "the first conversation, although it is longer"
    tensors = noisy(mini_folder, "language.model.layers") | noisy(mini_folder, "lm_head")
    variants = Variants(mini_folder, excerpt, capacity=1)
    variants.start("other", with_rows_of(excerpt, TEXT, excerpt.hidden * 1.01))
    for l in range(load_config(mini_folder).language_config.num_hidden_layers):
        for stage in ("attention", "mlp"):
            variants.advance_alone("other", l, stage, tensors)
    found = variants.divergences({"other": ("other", tensors)})["other"]
    assert 0 < found.kld < 20 and found.error > 0


def test_an_unchanged_version_diverges_by_nothing(mini_set, mini_folder: Path) -> None:
    excerpt = read_excerpt(mini_folder, mini_set[0], tokens=1)
    variants = Variants(mini_folder, excerpt, capacity=1)
    for l in range(load_config(mini_folder).language_config.num_hidden_layers):
        variants.advance(l, "attention", [Birth("same", {})] if l == 0 else [])
        variants.advance(l, "mlp")
    assert_close(variants.divergences()["same"].kld, 0.0, SAME_KLD)
