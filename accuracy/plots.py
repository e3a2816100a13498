"""The pictures of a report, drawn where matplotlib is installed."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

from vl2.accuracy.comparison import Comparison
from vl2.accuracy.walk import ANSWER
from vl2.accuracy.worst import ROUNDING

_LEAST_RANGE = 1.0  # points: without it the axis of equal models would show rounding


def draw_plots(comparison: Comparison, report: dict[str, Any]) -> list[tuple[str, str]] | None:
    """(caption, base64 of a PNG) each; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return None
    drawn = []
    for draw in (_tail_of_kld, _change_of_p, _tasks, _layers):
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        if caption := draw(figure.subplots(), comparison, report):
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110)
            drawn.append((caption, base64.b64encode(file.getvalue()).decode()))
    return drawn


def _tail_of_kld(axes: Any, comparison: Comparison, report: dict[str, Any]) -> str:
    positions = comparison.positions
    kld = np.maximum(np.sort(positions.kld[positions.kind == ANSWER]), ROUNDING)
    share = 100 * (1 - np.arange(len(kld)) / len(kld))
    axes.loglog(kld, share, drawstyle="steps-pre")
    mean = report["logits"]["answer"]["kld"]["mean"]
    if mean > ROUNDING:
        axes.axvline(mean, linestyle="--", color="grey")
        axes.annotate(f" mean {mean:.2g}", (mean, share[-1]), color="grey")
    axes.set(xlabel="KLD of an answer position, nats", ylabel="positions at or above, %",
             xlim=(ROUNDING, 2 * max(float(kld.max()), 1e-3)), ylim=(share[-1] / 1.5, 150))
    return "Share of answer positions whose KLD is at least the value on the x-axis; dashed: the mean."


def _change_of_p(axes: Any, comparison: Comparison, report: dict[str, Any]) -> str:
    positions = comparison.positions
    chosen = positions.kind == ANSWER
    p, q = np.exp(positions.log_p[chosen]), np.exp(positions.log_q[chosen])
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    axes.scatter(p, q, s=8, alpha=0.4, edgecolors="none")
    axes.set(xlabel="probability in the reference", ylabel="in the candidate", xlim=(0, 1.02), ylim=(0, 1.02))
    return "Probability of each token of the reference's answers in both models; below the line it was lost."


def _tasks(axes: Any, comparison: Comparison, report: dict[str, Any]) -> str:
    tasks = report["tasks"]
    if not tasks:
        return ""
    at = np.arange(len(tasks))[::-1]
    middle = np.array([task["difference_points"] for task in tasks])
    low, high = np.array([task["difference_95"] for task in tasks]).T
    errors = np.maximum([middle - low, high - middle], 0)  # a percentile may lie beyond the figure itself
    axes.errorbar(middle, at, xerr=errors, fmt="o", capsize=3)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(at, [f"{task['task']} ({task['questions']})" for task in tasks])
    axes.set_ylim(-0.7, len(tasks) - 0.3)
    reach = 1.05 * max(_LEAST_RANGE, float(np.abs([middle, low, high]).max()))
    axes.set(xlabel="difference to the reference, points", xlim=(-reach, reach))
    return "Change of each task's figure with its 95 % interval (paired bootstrap over images); in brackets: questions."


def _layers(axes: Any, comparison: Comparison, report: dict[str, Any]) -> str:
    if not report["layers"]:
        return ""
    blocks = [row for row in report["layers"]["blocks"] if row["own"] is not None]
    at = np.arange(len(blocks))
    for kind, colour in (("text", "tab:blue"), ("image", "tab:orange")):
        for side, style in (("stream", "-"), ("own", "o")):
            axes.plot(at, [_decibels(row[side][kind]) for row in blocks], style, color=colour, markersize=4,
                      label=f"{kind}, {'as both run' if side == 'stream' else 'the block alone'}")
    axes.set_xticks(at, [row["block"] for row in blocks], rotation=90, fontsize=6)
    axes.set(ylabel="SQNR, dB")
    axes.legend(fontsize=7)
    changed = {f"layers.{row['layer']}.mlp": row["all"]["changed_percent"] for row in report["layers"]["routers"]}
    bars = [changed.get(row["block"], 0.0) for row in blocks]
    if any(bars):
        right = axes.twinx()
        right.bar(at, bars, color="grey", alpha=0.3)
        right.set(ylabel="positions with other experts, %", ylim=(0, 4 * max(bars)))
    return ("Signal to quantization noise behind each block as both models run, and of each block alone on the "
            "reference's input; no mark where nothing is lost. Bars: positions whose set of experts changed.")


def _decibels(figure: dict[str, Any] | None) -> float:
    return np.nan if figure is None or figure["sqnr_db"] is None else figure["sqnr_db"]
