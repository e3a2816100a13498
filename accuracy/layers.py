"""The layer report of `vl2 layers`: read, checked against a bundle, and shown as tables, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vl2.accuracy.table import NOTHING, Table, number, with_error
from vl2.errors import VL2Error
from vl2.json_file import read_json
from vl2.manifest import Manifest

SCHEMA_VERSION = 1
_KEYS = ("vl2_version", "reference", "quantized", "data", "scales_taken_out", "blocks", "routers", "logits", "matrices",
         "unchanged_tensors", "seconds")
# Of quantization.json: what a quantized checkpoint's codes follow from, beside the checkpoint it was made from.
MADE_BY = ("recipe", "method", "calibration")
_SHOWN = 20
_ALWAYS_SHOWN = ("projector", "logits")


def read_layers(path: Path) -> dict[str, Any]:
    """The report in `path`. Raises VL2Error for another file and another version."""
    content = read_json(path)
    missing = [key for key in _KEYS if key not in content]
    if missing or "schema_version" not in content:
        raise VL2Error(f"{path} is no layer report: it has no {(missing or ['schema_version'])[0]!r}",
                       "give a file that `vl2 layers --out` wrote")
    if content["schema_version"] != SCHEMA_VERSION:
        raise VL2Error(f"{path}: schema_version is {content['schema_version']!r}, this vl2 reads {SCHEMA_VERSION}",
                       "measure again with this version")
    return content


def to_text(layers: Mapping[str, Any]) -> str:
    """The report as the text of its file."""
    return json.dumps(layers, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def refuse_other_checkpoint(path: Path, layers: Mapping[str, Any], manifest: Manifest) -> None:
    """Raises VL2Error unless the report `path` is of the quantized checkpoint that a bundle holds.

    A bundle made in one command names the checkpoint it began with; then recipe, method and calibration tell, from
    which the codes follow.
    """
    quantized, made = layers["quantized"], manifest.quantization or {}
    is_its_source = _holds_weights(manifest, quantized)
    is_made_alike = quantized["recipe"] is not None and _holds_weights(manifest, layers["reference"]) and all(
        made.get(name) == quantized[name] for name in MADE_BY)
    if not (is_its_source or is_made_alike):
        raise VL2Error(f"{path} measured {quantized['name']}, which is not the quantized checkpoint that the bundle "
                       f"({manifest.source.name}, {manifest.scheme}) was made from",
                       "export that checkpoint, or measure the layers of the one that was exported")


def _holds_weights(manifest: Manifest, source: Mapping[str, Any]) -> bool:
    return all(manifest.source.files.get(name) == digest for name, digest in source["files"].items()
               if name.endswith(".safetensors"))


def rank(figure: Mapping[str, Any] | None) -> float:
    """The relative error by which figures are ordered: ∞ for noise without a signal, 0 where nothing was measured."""
    if figure is None:
        return 0.0
    return math.inf if figure["error"] is None else figure["error"]


def decibels(figure: Mapping[str, Any] | None) -> str:
    """An SQNR: ∞ without noise, −∞ for noise without a signal."""
    if figure is None:
        return NOTHING
    if figure["sqnr_db"] is None:
        return "∞" if figure["error"] == 0 else "−∞"
    return f"{figure['sqnr_db']:.1f}"


def layer_tables(layers: Mapping[str, Any]) -> list[Table]:
    """Every table of a layer report, worst rows first."""
    found = [_blocks(layers), _routers(layers), _matrices(layers), _modules(layers), _logits(layers), _facts(layers)]
    return [table for table in found if table.rows]


def _blocks(layers: Mapping[str, Any]) -> Table:
    header = ("block", "own SQNR, dB: text", "image", "own cosine: text", "image", "as both run, dB: text", "image",
              "cosine: text", "image")
    shown = [row for row in layers["blocks"] if row["block"] in _ALWAYS_SHOWN or _lost(row["own"]) or
             _lost(row["stream"])]
    shown.sort(key=lambda row: (row["own"] is None, -_lost(row["own"])))
    rows = tuple((row["block"], *_of_kinds(row["own"]), *_of_kinds(row["stream"])) for row in shown)
    same = len(layers["blocks"]) - len(shown)
    return Table("Where it was lost: blocks", header, rows,
                 "Worst first, by what the block alone loses: both models' block on the reference's input, measured on "
                 "what it adds to the residual stream (where it adds nothing, on its output). As both run: what flows "
                 "behind the block, with all that was lost before. The projector's row is what the decoder sees of an "
                 "image, the row logits what comes out." + (f" {same} other blocks lose nothing." if same else ""))


def _lost(figures: Mapping[str, Any] | None) -> float:
    return 0.0 if figures is None else rank(figures["all"])


def _of_kinds(figures: Mapping[str, Any] | None) -> tuple[str, ...]:
    """SQNR of text and image, cosine of text and image."""
    if figures is None:
        return (NOTHING,) * 4
    sides = figures["text"], figures["image"]
    return (*map(decibels, sides), *(NOTHING if side is None else f"{side['cosine']:.6f}" for side in sides))


def _routers(layers: Mapping[str, Any]) -> Table:
    header = ("router of layer", "changed: text", "image", "by itself: text", "image", "positions")
    ordered = sorted(layers["routers"], key=lambda row: (-row["all"]["changed_percent"], row["layer"]))
    rows = tuple((str(row["layer"]), *(NOTHING if row[kind] is None else f"{row[kind][key]:.2f} %"
                                       for key in ("changed_percent", "own_percent") for kind in ("text", "image")),
                  str(row["all"]["positions"])) for row in ordered)
    return Table("Where it was lost: routers", header, rows,
                 "Worst first: share of positions whose set of experts is another one, as both models run; by itself: "
                 "of the same input.")


def _matrices(layers: Mapping[str, Any]) -> Table:
    header = ("tensor", "stored as", "output SQNR, dB: text", "image", "cosine: text", "image", "weights, dB", "cosine",
              "positions")
    rows = []
    for row in layers["matrices"][:_SHOWN]:
        output = row["output"]
        positions = NOTHING if output is None or output["all"] is None else str(output["all"]["positions"])
        rows.append((row["tensor"], row["form"] or "float", *_of_kinds(output), decibels(row["weights"]),
                     f"{row['weights']['cosine']:.6f}", positions))
    scales = " The method's scales (AWQ) are taken out of the matrices first." if layers["scales_taken_out"] else ""
    return Table("Where it was lost: matrices", header, tuple(rows),
                 f"The worst {len(rows)} of {len(layers['matrices'])} tensors that are packed or differ, by their "
                 f"output on the reference's inputs; {layers['unchanged_tensors']} others are equal.{scales}")


def _modules(layers: Mapping[str, Any]) -> Table:
    header = ("module", "stored as", "matrices", "output SQNR median, dB", "worst", "weights median, dB",
              "worst matrix")
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in layers["matrices"]:
        groups.setdefault((row["module"], row["form"] or "float"), []).append(row)
    rows = []
    for (module, form), found in groups.items():
        outputs = [row["output"]["all"] for row in found if row["output"] and row["output"]["all"]]
        rows.append((module, form, str(len(found)), _median(outputs), decibels(max(outputs, key=rank, default=None)),
                     _median([row["weights"] for row in found]), found[0]["tensor"]))
    return Table("Matrices by module", header, tuple(rows))


def _median(figures: Sequence[Mapping[str, Any]]) -> str:
    if not figures:
        return NOTHING
    middle = median(rank(figure) for figure in figures)
    if middle in (0, math.inf):
        return "∞" if middle == 0 else "−∞"
    return f"{-10 * math.log10(middle):.1f}"


def _logits(layers: Mapping[str, Any]) -> Table:
    header = ("positions", "count", "KLD mean ± SE", "median", "90 %", "99 %", "99.9 %", "max", "same top-1")
    rows = []
    for name, found in layers["logits"].items():
        if found is None:
            continue
        kld, agreement = found["kld"], found["same_top1_percent"]
        rows.append((name, str(found["positions"]), with_error(kld["mean"], kld["se"]),
                     *(number(kld[key]) for key in ("median", "p90", "p99", "p99_9", "max")),
                     with_error(agreement["mean"], agreement["se"], " %")))
    return Table("Distributions at the positions of the prompt", header, tuple(rows),
                 "In one pass over prompts and the data's own answers; KLD in nats over the whole vocabulary. answer: "
                 "positions whose next token is of an answer; text: the other text; standard errors are clustered by "
                 "image. What follows in a prompt is no prediction that anyone waits for: the answers' row counts.")


def _facts(layers: Mapping[str, Any]) -> Table:
    data, sides = layers["data"], (layers["reference"], layers["quantized"])
    rows = (("checkpoint", *(side["name"] for side in sides)),
            ("recipe", NOTHING, (sides[1]["recipe"] or {}).get("name", NOTHING)),
            ("method", NOTHING, sides[1]["method"] or NOTHING))
    note = (f"Data: {data['path']} ({data['format']}), {data['conversations']} conversations, {data['text_positions']} "
            f"text and {data['image_positions']} image positions, {len(data['bad_rows'])} of {data['rows']} rows bad, "
            f"sha256 {data['sha256']}. Float32 arithmetic in PyTorch on the weights as they are stored. Written by vl2 "
            f"{layers['vl2_version']} in {layers['seconds']} s.")
    if data["image_positions"] == 0:
        note += " No image was shown: the tower and projector were not measured."
    if data["sha256"] == (sides[1]["calibration"] or {}).get("sha256"):
        note += " The quantized checkpoint was calibrated on these very data: on others it loses more."
    return Table("What the layers were measured on", ("", "reference", "quantized"), rows, note)
