"""From readings to figures: one number each, its median over the rounds, and what they are of another bundle's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl2.measure.traffic import Traffic

Reading = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A row of the table. key: as in the JSON, where it ends with the unit; text: how a value is written."""

    key: str
    label: str
    text: str
    value: Callable[[Reading], float]


def _prefill_rate(reading: Reading) -> float:
    rows = reading["contexts"]
    return sum(row["prefill_tokens"] for row in rows) / sum(row["prefill_seconds"] for row in rows)


# first_token_seconds, bandwidth and step_bytes are added by the parent; the others are the probe's own.
_BEFORE = (
    Figure("cold_first_token_seconds", "first token of a new process, text, s", "{:.3f}",
           lambda reading: reading["first_token_seconds"]),
    Figure("cold_first_token_processor_seconds", "    of it processor time of all threads, s", "{:.3f}",
           lambda reading: reading["processor_seconds"]),
    Figure("warm_first_token_seconds", "first token once loaded, text, s", "{:.3f}",
           lambda reading: reading["warm_seconds"]),
    Figure("open_seconds", "open the bundle, s", "{:.3f}", lambda reading: reading["open_seconds"]),
    Figure("decoder_load_seconds", "load the decoder, s", "{:.3f}", lambda reading: reading["load_seconds"]),
    Figure("vision_load_seconds", "load the vision graph, s", "{:.3f}",
           lambda reading: reading["image"]["load_seconds"]),
    Figure("encode_seconds_per_tile", "encode an image, s a tile", "{:.3f}",
           lambda reading: reading["image"]["encode_seconds"] / reading["image"]["tiles"]),
    Figure("image_first_token_seconds", "first token about a new image, s", "{:.3f}",
           lambda reading: reading["image"]["first_token_seconds"]),
    Figure("again_first_token_seconds", "first token of a second question on it, s", "{:.3f}",
           lambda reading: reading["image"]["again_seconds"]),
    Figure("prefill_tokens_per_second", "prefill, tokens/s", "{:,.1f}", _prefill_rate),
)
_AFTER = (
    Figure("bandwidth_gb_per_second", "memory bandwidth here and now, GB/s", "{:.1f}",
           lambda reading: reading["bandwidth"] / 1e9),
    Figure("peak_rss_text_bytes", "peak memory before any image, MB", "{:,.1f}",
           lambda reading: reading["peak_rss_text_bytes"]),
    Figure("peak_rss_bytes", "peak memory, MB", "{:,.1f}", lambda reading: reading["peak_rss_bytes"]),
)


def figures_of(contexts: Sequence[int]) -> list[Figure]:
    """The rows of the table, in order."""
    rows = list(_BEFORE)
    for index, context in enumerate(contexts):
        rows += _decode_figures(index, context)
    return [*rows, *_AFTER]


def _decode_figures(index: int, context: int) -> list[Figure]:
    def rate(reading: Reading) -> float:
        row = reading["contexts"][index]
        return row["decode_steps"] / row["decode_seconds"]

    def read(reading: Reading) -> float:
        return rate(reading) * reading["contexts"][index]["step_bytes"]

    return [
        Figure(f"decode_tokens_per_second_at_{context}", f"decode at {context:,} tokens, tokens/s", "{:,.2f}", rate),
        Figure(f"read_gb_per_second_at_{context}", "    reads, GB/s", "{:.2f}", lambda reading: read(reading) / 1e9),
        Figure(f"bandwidth_share_at_{context}", "    of the bandwidth", "{:.1%}",
               lambda reading: read(reading) / reading["bandwidth"]),
    ]


def complete(reading: dict[str, Any], started: float, bandwidth: float, traffic: Traffic) -> Reading:
    """The reading with what its process could not know. started: when it was begun, on the monotonic clock, seconds;
    bandwidth: bytes a second."""
    rows = [{**row, "step_bytes": traffic.step_bytes(row["prompt_tokens"] + row["decode_steps"] / 2)}
            for row in reading["contexts"]]
    return {**reading, "contexts": rows, "bandwidth": bandwidth,
            "first_token_seconds": reading["first_token_at"] - started}


def medians(readings: Sequence[Reading], contexts: Sequence[int]) -> dict[str, float]:
    """Of each figure over the rounds, by key."""
    return {figure.key: statistics.median(figure.value(reading) for reading in readings)
            for figure in figures_of(contexts)}


def ratios(figures: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float | None]:
    """figures / reference by key; None where the reference is 0."""
    return {key: value / reference[key] if reference[key] else None for key, value in figures.items()}
