"""What was measured, as a table for a person."""

from __future__ import annotations

from vl2.measure.bench import Bench
from vl2.measure.figures import Figure, figures_of, ratios


def describe(bench: Bench) -> str:
    """A row a figure, a column a bundle, and the ratio of the second to the first."""
    measured, work = bench.measured, bench.workload
    reading = measured[0].readings[0]
    lines = [*(f"{letter}: {one.bundle}, {one.readings[0]['backend']}"
               for letter, one in zip("AB", measured, strict=False)),
             f"medians of {bench.rounds} rounds; {work.new_tokens} new tokens at each context, "
             f"image of {reading['image']['tiles']} tiles, text of {reading['text_tokens']} tokens", ""]
    heads = ["A", "B", "B / A"] if len(measured) == 2 else ["A"]
    lines.append(f"{'':46}" + "".join(f"{head:>12}" for head in heads))
    quotients = ratios(measured[-1].figures, measured[0].figures)
    for figure in figures_of(work.contexts):
        cells = [_cell(figure, one.figures[figure.key]) for one in measured]
        if len(measured) == 2:
            quotient = quotients[figure.key]
            cells.append("–" if quotient is None else f"{quotient:.2f}")
        lines.append(f"{figure.label:46}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([*lines, "", *_counting(bench)])


def _cell(figure: Figure, value: float) -> str:
    return figure.text.format(value / 1e6 if figure.key.endswith("_bytes") else value)


def _counting(bench: Bench) -> list[str]:
    lines = ["bytes read a token: weights as stored, of the routed experts what one token chooses, and the cache"]
    for letter, one in zip("AB", bench.measured, strict=False):
        steps = ", ".join(f"{row['step_bytes'] / 1e6:,.1f} MB at {row['context']:,}"
                          for row in one.readings[0]["contexts"])
        lines.append(f"  {letter}: {steps}; weights {sum(one.traffic.weights.values()) / 1e6:,.1f} MB, "
                     f"{one.traffic.cache_position:,} bytes a position of the cache")
    return lines
