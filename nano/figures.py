"""Documents that are drawings: bar charts, and coloured shapes to count and name."""

from __future__ import annotations

from collections import Counter

from vl2.nano import words
from vl2.nano.pages import COLOURS, KINDS, MARGIN, Page
from vl2.nano.questions import Question, ask

MOST_SHAPES = 8
_BAR_COLOURS = ("red", "green", "blue", "purple", "orange", "black")


def draw_chart(page: Page) -> list[Question]:
    """Vertical bars with names below; values above the bars (70 %) or read off an axis with ticks."""
    rng, size = page.rng, page.rng.uniform(12, 13)
    labelled = rng.random() < 0.7
    left = MARGIN + (0 if labelled else 22)
    room = page.width - MARGIN - left
    count = max(2, min(rng.randint(2, 7), int(room / 32)))
    step = room / count
    source = rng.choice((words.MONTHS, words.DAYS, list("ABCDEFGH"), None))
    names: list[str] = []
    while len(names) < count:
        name = words.random_letters(rng, 3, 3).capitalize() if source is None else rng.choice(source)
        if name not in names and page.text_width(name, size) < step - 3:
            names.append(name)
        elif page.text_width(name, size) >= step - 3:
            source = list("ABCDEFGH")
    base, top = page.height - MARGIN - size * 1.1, MARGIN + size * 1.3
    values, levels, axis_step = _bar_values(page, count, labelled)
    if not labelled:
        _draw_axis(page, left, base, top, axis_step)
    colour = None if rng.random() < 0.4 else COLOURS[rng.choice(_BAR_COLOURS)]
    for i, (name, value, level) in enumerate(zip(names, values, levels, strict=True)):
        centre, half = left + step * (i + 0.5), step * 0.32
        height = max(2.0, (base - top) * level)
        page.rectangle((centre - half, base - height, centre + half, base),
                       colour or COLOURS[_BAR_COLOURS[(i + count) % len(_BAR_COLOURS)]])
        page.text((centre - page.text_width(name, size) / 2, base + size * 1.05), name, size)
        if labelled:
            page.text((centre - page.text_width(value, size) / 2, base - height - size * 0.25), value, size)
    page.line((left, base), (page.width - MARGIN, base))
    questions = [ask(rng, "bar", value, name) for name, value in zip(names, values, strict=True)]
    ranked = sorted(zip(levels, names, strict=True))
    if ranked[-1][0] - ranked[-2][0] > 0.08:
        questions.append(ask(rng, "highest", ranked[-1][1]))
    if ranked[1][0] - ranked[0][0] > 0.08:
        questions.append(ask(rng, "lowest", ranked[0][1]))
    return questions


def _bar_values(page: Page, count: int, labelled: bool) -> tuple[list[str], list[float], int]:
    """Printed values, bar heights (0 to 1) and the axis step; on an axis every value is one of its ticks."""
    rng = page.rng
    if labelled:
        top = rng.choice((10, 20, 50, 100, 500))
        drawn = [rng.randint(1, top) for _ in range(count)]
        return [str(value) for value in drawn], [value / top for value in drawn], 1
    ticks, step = _tick_count(page), rng.choice((1, 2, 5, 10, 20))
    levels = [rng.randint(1, ticks) for _ in range(count)]
    return [str(level * step) for level in levels], [level / ticks for level in levels], step


def _tick_count(page: Page) -> int:
    return max(3, min(8, int((page.height - 2 * MARGIN - 30) / 17)))


def _draw_axis(page: Page, left: float, base: float, top: float, step: int) -> None:
    ticks = _tick_count(page)
    page.line((left, base), (left, top))
    for i in range(1, ticks + 1):
        y = base - (base - top) * i / ticks
        page.line((left - 2, y), (left + 2, y))
        page.text((left - 3, y + 4), str(i * step), 12, right=True)


def draw_shapes(page: Page) -> list[Question]:
    """One to eight shapes of four kinds and seven colours on a jittered grid."""
    rng = page.rng
    cell = rng.uniform(28, 40)
    wide, high = int((page.width - 2 * MARGIN) / cell), int((page.height - 2 * MARGIN) / cell)
    places = [(i, j) for i in range(wide) for j in range(high)]
    count = min(rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, MOST_SHAPES)), len(places))
    few_kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    colours = [c for c in COLOURS if c != "white" and (c != "black" or sum(page.background) > 300)]
    colours = rng.sample(colours, rng.randint(2, len(colours)))
    for i, j in rng.sample(places, count):
        radius = rng.uniform(0.3, 0.44) * cell
        slack = cell / 2 - radius
        centre = (MARGIN + (i + 0.5) * cell + rng.uniform(-slack, slack),
                  MARGIN + (j + 0.5) * cell + rng.uniform(-slack, slack))
        page.shape(rng.choice(few_kinds), rng.choice(colours), centre, radius)
    return shape_questions(page)


def shape_questions(page: Page) -> list[Question]:
    """Counts by kind, by colour, by both and of all; the colour of every kind that occurs once."""
    rng = page.rng
    labels = [mark.label for mark in page.marks]
    kinds, colours = Counter(kind for kind, _ in labels), Counter(colour for _, colour in labels)
    questions = [ask(rng, "count", str(len(labels)), "shapes")]
    absent = [kind for kind in KINDS if not kinds[kind]]
    questions += [ask(rng, "count", str(number), f"{kind}s") for kind, number in kinds.items()]
    questions += [ask(rng, "count", "0", f"{kind}s") for kind in absent[:1]]
    questions.append(ask(rng, "count", str(colours[labels[0][1]]), f"{labels[0][1]} shapes"))
    both = Counter(labels)
    kind, colour = rng.choice(labels)
    questions.append(ask(rng, "count", str(both[(kind, colour)]), f"{colour} {kind}s"))
    for (kind, colour), _ in both.items():
        if kinds[kind] == 1:
            questions.append(ask(rng, "colour", colour, kind))
    return questions
