"""Quantizes a checkpoint by every method and recipe and tells what each cost at the positions of the answers.

    python benchmarks/quantize_ablation.py                                    # vl2-nano on its held-out questions
    python benchmarks/quantize_ablation.py CHECKPOINT DATA.jsonl --calib CALIBRATION_DATA --questions 100
    python benchmarks/quantize_ablation.py --outliers                         # the same model with loud channels
    python benchmarks/quantize_ablation.py --baselines --recipes int4 int8    # and bitsandbytes, `.[baselines]`

Reference: the checkpoint in float32 through the PyTorch model, teacher-forced on the data's answers. KLD is of the next
token's distribution, in nats. Prints a Markdown table; `--json FILE` keeps the figures. Finished rows are kept in
`--work` and not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vl2.calib.data import DataOptions
from vl2.calib.progress import silent
from vl2.calib.stream import StreamOptions
from vl2.cli.calibrated import CalibratedJob, make_calibration_set, quantize_calibrated, read_calibration_data
from vl2.config import load_config
from vl2.data.files import open_rows
from vl2.data.sample import Sample
from vl2.json_file import read_json
from vl2.model.checkpoint import load_model
from vl2.model.vl2 import DeepseekVL2
from vl2.modules import module_of
from vl2.prompt import Processor, Prompt
from vl2.quant.baselines import BASELINES, replace_matrices
from vl2.quant.linears import WEIGHT, matrices
from vl2.quant.method import METHODS
from vl2.quant.quantizer import QuantizeOptions
from vl2.quant.recipe import assign_schemes, builtin_recipe
from vl2.quant.source import Source

NANO = Path(__file__).parents[1] / "nano"
UNIFORM = "uniform int4 g32"
RECIPES = (UNIFORM, "int4", "int8")
LOUD, EVERY = 12.0, 42  # outliers: the norm's weight of every 42nd channel times this, as the guide's section 6.5


@dataclass(frozen=True)
class Question:
    """embeds: [1, T, H]; rows: positions whose next token belongs to the answer; targets: those tokens."""

    embeds: Tensor
    rows: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Cost:
    """Over all answer positions: KLD in nats with its standard error, share of equal first choices, root mean square
    of the difference of the target's probability."""

    kld: float
    kld_error: float
    kld_99: float
    agreement: float
    rms_p: float


@torch.inference_mode()
def questions_of(model: DeepseekVL2, processor: Processor, data: Path, count: int) -> list[Question]:
    """The first `count` answered questions of a data file, embedded by the unquantized tower."""
    samples = (row for row in open_rows(data)[1] if isinstance(row, Sample) and row.is_answered)
    return [_question(model, processor.encode(sample.opened(), inference=False), processor.ignore_id)
            for sample in islice(samples, count)]


def _question(model: DeepseekVL2, prompt: Prompt, ignored: int) -> Question:
    ids, mask, tiles, crops = (torch.from_numpy(part) for part in
                               (prompt.input_ids[None], prompt.images_seq_mask[None], prompt.tiles, prompt.crops))
    targets = torch.from_numpy(prompt.target_ids)
    rows = (targets[1:] != ignored).nonzero()[:, 0]
    return Question(model.embed(ids, mask, tiles, crops), rows, targets[rows + 1])


@torch.inference_mode()
def log_probabilities(model: DeepseekVL2, questions: list[Question]) -> Tensor:
    """float64 [answer positions, V]."""
    found = []
    for question in questions:
        size = question.embeds.shape[1]
        hidden, _ = model.language(question.embeds, torch.arange(size)[None], torch.ones(1, size, dtype=torch.bool))
        found.append(model.language.logits(hidden[:, question.rows])[0].double().log_softmax(dim=-1))
    return torch.cat(found)


def cost(want: Tensor, got: Tensor, targets: Tensor) -> Cost:
    """want, got: log-probabilities [n, V]; targets: [n]."""
    kld = (want.exp() * (want - got)).sum(dim=-1)
    agreement = (want.argmax(dim=-1) == got.argmax(dim=-1)).double().mean()
    delta = got.exp().gather(1, targets[:, None]) - want.exp().gather(1, targets[:, None])
    return Cost(float(kld.mean()), float(kld.std() / len(kld) ** 0.5), float(kld.quantile(0.99)), float(agreement),
                float(delta.square().mean().sqrt()))


def uniform_recipe(checkpoint: Path, path: Path) -> Path:
    """A recipe file: every Linear of the decoder's layers INT4 g32 but the router, all else as it is."""
    rules = [("language.model.layers.*.mlp.gate", "keep"), ("language.model.layers.*", "int4"), ("*", "keep")]
    assert any(".mlp.gate" in module for module in matrices(load_config(checkpoint)))
    recipe = {"name": UNIFORM, "rules": [{"modules": modules, "scheme": scheme} for modules, scheme in rules]}
    path.write_text(json.dumps(recipe, indent=1))
    return path


def with_outliers(checkpoint: Path, out: Path) -> Path:
    """The same function with loud channels: norms' weights × 12 there, the columns of all their readers ÷ 12.

    All tensors become float32, so that nothing is rounded on the way.
    """
    import shutil

    from vl2.quant.shard import write_shard

    if out.exists():
        return out
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial, ignore=shutil.ignore_patterns("*.safetensors*"))
    source = Source(checkpoint)
    tensors = {name: source.tensor(name).float() for name in source.entries}
    readers = {"input_layernorm": ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
               "post_attention_layernorm": ("gate", "gate_proj", "up_proj")}
    for norm, names in readers.items():
        for name in [name for name in tensors if name.endswith(f"{norm}.weight")]:
            tensors[name][::EVERY] *= LOUD
            layer = name.removesuffix(f"{norm}.weight")
            for other, tensor in tensors.items():
                if other.startswith(layer) and other.split(".")[-2] in names:
                    tensor[:, ::EVERY] /= LOUD
    write_shard(partial / "model.safetensors", tensors)
    partial.replace(out)
    return out


def row_of(checkpoint: Path, calibration: Path, work: Path, which: tuple[str, str]) -> tuple[Path, dict]:
    """The folder of one quantization and what making it took, made if it is not there."""
    recipe, method = which
    out = work / f"{recipe.replace(' ', '-')}.{method}"
    started = time.monotonic()
    if not out.exists():
        path = str(uniform_recipe(checkpoint, work / "uniform.json")) if recipe == UNIFORM else recipe
        quantize_calibrated(CalibratedJob(checkpoint, calibration, out, QuantizeOptions(path, method=method),
                                          StreamOptions()))
    seconds = round(time.monotonic() - started, 1)
    return out, {"recipe": recipe, "method": method, "seconds": seconds} | bytes_of(
        read_json(out / "quantization.json")["modules"])


def bytes_of(sizes: dict[str, int]) -> dict[str, int]:
    """sizes: bytes by module (`vl2.modules`)."""
    language = sum(size for module, size in sizes.items() if not module.startswith(("vision", "projector")))
    return {"language_bytes": language, "bytes": sum(sizes.values())}


def baseline_of(checkpoint: Path, name: str) -> tuple[DeepseekVL2, dict]:
    """The model with the matrices that a baseline's recipe quantizes rounded by bitsandbytes; the facts of its row."""
    started, model, baseline = time.monotonic(), load_model(checkpoint), BASELINES[name]
    schemes = assign_schemes(builtin_recipe(baseline.recipe, model.config), model.config)
    replaced = replace_matrices(model, schemes, baseline.by_bits)
    asked = sum(scheme is not None for scheme in schemes.values())
    assert len(replaced) == asked, f"{name}: {len(replaced)} matrices replaced of {asked}"
    sizes: dict[str, int] = {}
    for tensor, entry in Source(checkpoint).entries.items():
        size = replaced.get(tensor.removesuffix(WEIGHT), entry.size_bytes)
        sizes[module_of(tensor)] = sizes.get(module_of(tensor), 0) + size
    seconds = round(time.monotonic() - started, 1)
    return model, {"recipe": baseline.recipe, "method": name, "matrices": asked, "seconds": seconds} | bytes_of(sizes)


def rows_of(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[tuple[DeepseekVL2, dict]]:
    """Every quantized model in turn with the facts of its row."""
    for recipe in arguments.recipes:
        for method in arguments.methods:
            out, facts = row_of(checkpoint, arguments.work / "calibration", arguments.work, (recipe, method))
            yield load_model(out), facts
    for name in arguments.baselines or ():
        yield baseline_of(checkpoint, name)


def calibrate(checkpoint: Path, arguments: argparse.Namespace) -> str:
    """Makes the calibration set that the methods share; says what it is."""
    options = DataOptions(samples=arguments.samples, max_tokens=arguments.tokens)
    data = read_calibration_data(checkpoint, arguments.calib, options)
    found = make_calibration_set(checkpoint, data, arguments.work / "calibration", silent)
    return f"calibrated on {found.tokens} tokens ({found.data.format})"


def main() -> None:
    arguments = _arguments()
    work, checkpoint = arguments.work, arguments.checkpoint
    work.mkdir(parents=True, exist_ok=True)
    if arguments.outliers:
        checkpoint = with_outliers(checkpoint, work / "outliers")
    calibrated = calibrate(checkpoint, arguments) if arguments.recipes else "not calibrated"
    model = load_model(checkpoint)
    questions = questions_of(model, Processor.from_folder(checkpoint), arguments.data, arguments.questions)
    want, targets = log_probabilities(model, questions), torch.cat([question.targets for question in questions])
    print(f"{checkpoint}: {len(questions)} questions, {len(targets)} answer positions, {calibrated}; the reference's "
          f"mean probability of the targets is {float(want.exp().gather(1, targets[:, None]).mean()):.3f}\n")
    print("| recipe | method | KLD mean | ± | KLD 99 % | top-1 | RMS Δp | language bytes | s |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    rows = []
    for quantized, facts in rows_of(checkpoint, arguments):
        lost = cost(want, log_probabilities(quantized, questions), targets)
        rows.append(facts | vars(lost))
        print(f"| {facts['recipe']} | {facts['method']} | {lost.kld:.5f} | {lost.kld_error:.5f} | {lost.kld_99:.4f} | "
              f"{lost.agreement:.2%} | {lost.rms_p:.2%} | {facts['language_bytes']:,} | {facts['seconds']} |",
              flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=NANO / "checkpoint")
    parser.add_argument("data", type=Path, nargs="?", default=NANO / "heldout" / "heldout.jsonl")
    parser.add_argument("--calib", type=Path, help="calibration data; synthetic documents without it")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--work", type=Path, default=Path("ablation"))
    parser.add_argument("--outliers", action="store_true", help="of a copy with loud channels, its function unchanged")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=RECIPES)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES),
                        help="rows by bitsandbytes, all if none is named; only these: --recipes --baselines")
    arguments = parser.parse_args()
    if arguments.baselines == []:
        arguments.baselines = list(BASELINES)
    return arguments


if __name__ == "__main__":
    main()
