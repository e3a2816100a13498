"""The model card of a quantized checkpoint (README.md), from the facts of its quantization.json alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from vl2.modules import module_of
from vl2.quant.objective import signal_to_noise_db

_HEAD = """# {name}, {recipe}

`{name}` quantized by vl2 in the compressed-tensors layout `pack-quantized`: symmetric integers with float16 scales,
weights only. Activations stay in floating point.

    vl2 export THIS_FOLDER --out model.bundle

"""


def model_card(facts: Mapping[str, Any]) -> str:
    """Markdown. facts: the content of quantization.json."""
    recipe = facts["recipe"]
    text = _HEAD.format(name=facts["source"]["name"], recipe=recipe["name"])
    text += f"Method: `{facts['method']}`. {_calibration(facts['calibration'])}\n"
    if recipe["rules"]:
        text += "\n## Recipe\n\n"
        text += _table(("modules", "scheme"), ((f"`{rule['modules']}`", rule["scheme"]) for rule in recipe["rules"]))
    text += "\n## What it cost\n\n"
    if "converted" in facts:
        text += "Not known: the codes are another program's, and the original was not looked at.\n\n"
    else:
        text += "SQNR: of each matrix's output on the calibration inputs (of its weights where there were none).\n\n"
    columns = ("module", "matrices", "scheme", "bytes", "SQNR median, dB", "SQNR worst, dB", "worst matrix")
    text += _table(columns, _module_rows(facts))
    fallbacks = [] if "converted" in facts else _fallbacks(facts["matrices"])
    if "converted" in facts:
        text += _converted(facts["converted"])
    elif fallbacks:
        text += "\nMatrices whose inputs the scheme's group does not divide took a smaller one:\n\n"
        text += _table(("modules", "matrices", "group"), fallbacks)
    text += _leaning(facts["leaning_experts"])
    text += _coverage(facts.get("coverage"))
    text += "\n## Source files\n\n"
    text += _table(("file", "sha256"), ((name, f"`{digest}`") for name, digest in facts["source"]["files"].items()))
    return text


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "No calibration data."
    return "Calibration: " + ", ".join(f"{key} {value}" for key, value in calibration.items()) + "."


def _converted(converted: Mapping[str, Any]) -> str:
    """What was rewritten although no weight changed."""
    split, widened = len(converted["split_groups"]), len(converted["widened"])
    text = f"\nConverted from GPTQ's format (`{converted['format']}`, made by {converted['made_by']}), codes kept.\n"
    if split:
        text += f"\nGroups split into ones that divide the inputs: {split} matrices.\n"
    if widened:
        text += f"\nStored with 8 bits, as a negative scale turns a code −8 into 8: {widened} matrices.\n"
    return text


def _leaning(leaning: Mapping[str, list[int]]) -> str:
    """Which experts saw too few tokens to be fitted by their own alone."""
    if not leaning:
        return ""
    rows = ((layer, ", ".join(map(str, experts))) for layer, experts in leaning.items())
    return ("\nExperts that fewer tokens than inputs reached, fitted mostly by their layer's Hessian:\n\n"
            + _table(("layer", "experts"), rows))


def _coverage(coverage: Mapping[str, Any] | None) -> str:
    """How many calibration tokens reached the experts, by modality."""
    if coverage is None:
        return ""
    columns = ("layer", "tokens", "min", "median", "max", "experts with none")
    rows = ((str(row["layer"]), row["modality"], str(row["fewest"]), f"{row['median']:g}", str(row["most"]),
             f"{row['experts_without']} of {row['experts']}") for row in coverage["layers"])
    return "\nCalibration tokens that an expert got:\n\n" + _table(columns, rows)


def _module_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    by_module: dict[str, list[Mapping[str, Any]]] = {}
    for matrix in facts["matrices"]:
        by_module.setdefault(module_of(matrix["module"] + ".weight"), []).append(matrix)
    rows = []
    for module, size in facts["modules"].items():
        matrices = by_module.get(module, [])
        if not matrices:
            rows.append((module, "", "as it was", f"{size:,}", "", "", ""))
            continue
        schemes = ", ".join(sorted({matrix["scheme"] for matrix in matrices}))
        if "converted" in facts:
            rows.append((module, str(len(matrices)), schemes, f"{size:,}", "", "", ""))
            continue
        worst = max(matrices, key=lambda matrix: matrix["relative_error"])
        middle = signal_to_noise_db(median(matrix["relative_error"] for matrix in matrices))
        lowest = signal_to_noise_db(worst["relative_error"])
        rows.append((
            module, str(len(matrices)), schemes, f"{size:,}", f"{middle:.1f}", f"{lowest:.1f}", f"`{worst['module']}`"
        ))  # fmt: skip
    return rows


def _fallbacks(matrices: list[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """By kind of module, numbers replaced by `*`."""
    counts: dict[tuple[str, int | None], int] = {}
    for matrix in matrices:
        if matrix["fell_back"]:
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", matrix["module"]), matrix["group_size"]
            counts[kind] = counts.get(kind, 0) + 1
    return [
        (f"`{module}`", str(count), "one scale a row" if group is None else str(group))
        for (module, group), count in counts.items()
    ]


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
