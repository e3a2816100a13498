"""The kinds of synthetic documents: each draws on a page and returns the questions that the page answers."""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from random import Random

from PIL import Image

from vl2.nano import words
from vl2.nano.figures import draw_chart, draw_shapes
from vl2.nano.pages import MARGIN, Mark, Page, Word, finish, image_size, new_page
from vl2.nano.questions import Question, ask, locate

LEADING = 1.45  # line pitch over font size, at least; keeps two lines out of one image token
FULL_TEXT_LIMIT = 90  # longest transcription asked for, in characters
DENSE_CHARACTERS = string.ascii_letters + string.digits + ".:-"
FIELDS = {
    "Name": lambda rng: words.label(rng, words.NAMES),
    "City": lambda rng: words.label(rng, words.CITIES),
    "Job": lambda rng: words.label(rng, words.JOBS),
    "Date": words.date,
    "Time": words.time,
    "Phone": words.phone,
    "Code": words.code,
    "Order": lambda rng: str(rng.randint(100, 99999)),
    "Age": lambda rng: str(rng.randint(1, 99)),
    "Room": lambda rng: str(rng.randint(1, 999)),
    "Item": lambda rng: words.label(rng, words.ITEMS),
    "Price": words.price,
}


@dataclass(frozen=True)
class Document:
    """A finished page. marks and words carry boxes in image pixels."""

    kind: str
    image: Image.Image
    crop: tuple[int, int]
    marks: list[Mark]
    words: list[Word]
    questions: list[Question]


def fitting(page: Page, size: float, make, width: float) -> str:
    """A string of `make(rng)` no wider than `width` canvas pixels."""
    for _ in range(200):
        text = make(page.rng)
        if page.text_width(text, size) <= width:
            return text
    return page.rng.choice("ABCDEFGH")


def line_positions(page: Page, size: float, count: int) -> list[float]:
    """Baselines of at most `count` lines, placed at random in the page."""
    rng, room = page.rng, page.height - 2 * MARGIN
    pitch = max(15.0, size * LEADING) * rng.uniform(1.0, 1.25)
    count = max(1, min(count, int((room - size) / pitch) + 1))
    top = MARGIN + size * 0.8 + rng.uniform(0, max(0.0, room - size - pitch * (count - 1)))
    return [top + pitch * i for i in range(count)]


def draw_word(page: Page) -> list[Question]:
    """One string, large or small, anywhere."""
    rng = page.rng
    size = min(rng.choice((rng.uniform(12, 15), rng.uniform(15, 24))), page.height * 0.5)
    while True:
        text = words.any_word(rng)
        room = page.width - 2 * MARGIN - page.text_width(text, size)
        if room >= 0:
            break
        size = max(11.5, size * 0.95)
    y = line_positions(page, size, 1)[0]
    page.text((MARGIN + rng.uniform(0, room), y), text, size)
    return [ask(rng, "read", text)]


def draw_lines(page: Page) -> list[Question]:
    """Several lines of one to three strings."""
    rng, size = page.rng, page.rng.uniform(12, 14.5)
    baselines = line_positions(page, size, rng.randint(1, 9))
    left, room, lines = MARGIN + rng.uniform(0, 8), page.width - 2 * MARGIN - 8, []
    for y in baselines:
        parts = [fitting(page, size, words.any_word, room)]
        while rng.random() < 0.55:
            longer = " ".join((*parts, words.any_word(rng)))
            if page.text_width(longer, size) > room:
                break
            parts = longer.split(" ")
        lines.append(" ".join(parts))
        page.text((left, y), lines[-1], size)
    questions = [ask(rng, "read", "\n".join(lines))]
    if len(lines) > 1:
        questions += [ask(rng, "line", line, str(i + 1)) for i, line in enumerate(lines)]
    return questions


def draw_dense(page: Page) -> list[Question]:
    """A page full of characters, letters and digits equally often, for the tower; asked line by line."""
    rng, size = page.rng, page.rng.uniform(12, 14.5)
    lines = []
    for y in line_positions(page, size, 30):
        text = ""
        while True:
            run = "".join(rng.choice(DENSE_CHARACTERS) for _ in range(rng.randint(2, 9)))
            longer = (text + " " + (run if rng.random() < 0.6 else words.any_word(rng))).strip()
            if page.text_width(longer, size) > page.width - 2 * MARGIN:
                break
            text = longer
        if text:
            page.text((MARGIN, y), text, size)
            lines.append(text)
    return [ask(rng, "line", line, str(i + 1)) for i, line in enumerate(lines)]


def draw_receipt(page: Page) -> list[Question]:
    """A shop's name, items with prices, the total, sometimes a date."""
    rng, size = page.rng, page.rng.uniform(12, 13.5)
    baselines = line_positions(page, size, rng.randint(4, 10))
    left, right = MARGIN, page.width - MARGIN
    shop = fitting(page, size, lambda r: words.label(r, words.NAMES + words.CITIES, 0.4), right - left)
    rows = [shop]
    start = (left + right - page.text_width(shop, size)) / 2 if rng.random() < 0.5 else left
    page.text((start, baselines[0]), shop, size)
    questions, total, used, prices = [ask(rng, "shop", shop)], 0, set(), []
    body = baselines[1:-1] if len(baselines) > 2 else baselines[1:]
    for y in body:
        cost = rng.choice((rng.randrange(20, 1000), rng.randrange(100, 5000)))
        amount = f"{cost / 100:.2f}"
        item = fitting(page, size, lambda r: words.label(r, words.ITEMS),
                       right - left - page.text_width(amount, size) - 6)
        if item in used:
            item, amount = words.random_letters(rng, 3, 3).capitalize(), "9.99"
            cost = 999
        used.add(item)
        prices.append((item, amount))
        total += cost
        rows.append(f"{item} {amount}")
        page.text((left, y), item, size)
        page.text((right, y), amount, size, right=True)
    if len(baselines) > 2:
        amount, y = f"{total / 100:.2f}", baselines[-1]
        page.line((left, y - size * 0.95), (right, y - size * 0.95))
        page.text((left, y), "Total", size)
        page.text((right, y), amount, size, right=True)
        rows.append(f"Total {amount}")
        questions.append(ask(rng, "total", amount))
    questions += [ask(rng, "price", amount, item) for item, amount in prices]
    seen = Counter(amount for _, amount in prices)
    questions += [ask(rng, "item", item, amount) for item, amount in prices if seen[amount] == 1][:2]
    return [*questions, ask(rng, "read", "\n".join(rows))]


def draw_form(page: Page) -> list[Question]:
    """Lines of key and value, `Name: Anna`, values aligned or not."""
    rng, size = page.rng, page.rng.uniform(12, 13.5)
    baselines = line_positions(page, size, rng.randint(2, 8))
    keys = rng.sample(sorted(FIELDS), min(len(baselines), len(FIELDS)))
    left, mark = MARGIN + rng.uniform(0, 4), rng.choice((":", ":", ""))
    column = max(page.text_width(key + mark, size) for key in keys) + 5 if rng.random() < 0.5 or not mark else None
    rows, questions = [], []
    for key, y in zip(keys, baselines, strict=False):
        x = left + (column or page.text_width(key + mark, size) + 4)
        value = fitting(page, size, FIELDS[key], page.width - MARGIN - x)
        page.text((left, y), key + mark, size)
        page.text((x, y), value, size)
        rows.append(f"{key}{mark} {value}")
        questions.append(ask(rng, "field", value, key.lower()))
    return [*questions, ask(rng, "read", "\n".join(rows))]


def _cell(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return str(rng.randrange(10 ** rng.randint(1, 3)))
    return words.price(rng, 10) if kind < 0.8 else words.random_letters(rng, 3, 4)


def draw_table(page: Page) -> list[Question]:
    """A header row, row labels in the first column, short cells; with or without rules."""
    rng, size = page.rng, page.rng.uniform(12, 13)
    baselines = line_positions(page, size, rng.randint(3, 9))
    count = max(1, min(rng.randint(1, 4), int((page.width - 2 * MARGIN - 40) / 36)))
    first = min(rng.uniform(40, 56), page.width - 2 * MARGIN - 36 * count)
    step = min((page.width - 2 * MARGIN - first) / count, 60)
    columns = [MARGIN + first + step * i for i in range(count)]
    headers: list[str] = []
    while len(headers) < count:
        text = fitting(page, size, lambda r: words.label(r, words.COLUMNS, 0.15), step - 5)
        headers += [text] if text not in headers else []
    source = rng.choice((words.ITEMS, words.NAMES, words.CITIES, words.MONTHS))
    ruled = rng.random() < 0.5
    for x, text in zip(columns, headers, strict=True):
        page.text((x, baselines[0]), text, size)
    questions, rows, used = [], [" ".join(headers)], set(headers)
    for y in baselines[1:]:
        name = fitting(page, size, lambda r: words.label(r, source), first - 5)
        if name in used:
            break
        used.add(name)
        page.text((MARGIN, y), name, size)
        cells = [fitting(page, size, _cell, step - 5) for _ in headers]
        for x, text in zip(columns, cells, strict=True):
            page.text((x, y), text, size)
        if ruled:
            page.line((MARGIN, y - size * 0.95), (columns[-1] + step - 3, y - size * 0.95))
        rows.append(" ".join((name, *cells)))
        questions += [ask(rng, "cell", text, header, name) for header, text in zip(headers, cells, strict=True)]
    return [*questions, ask(rng, "read", "\n".join(rows))]


KINDS = {
    "word": draw_word, "dense": draw_dense, "lines": draw_lines, "receipt": draw_receipt, "form": draw_form,
    "table": draw_table, "chart": draw_chart, "shapes": draw_shapes,
}


def locate_words(page: Page) -> list[Question]:
    """One grounding question for every word that occurs once on the page."""
    seen = Counter(word.text for word in page.words)
    return [locate(page.rng, word.text, [word.box], page.size) for word in page.words
            if seen[word.text] == 1 and len(word.text) > 1]


def make_document(rng: Random, kind: str, crop: tuple[int, int], largest_scale: float = 1.4) -> Document:
    """A finished document of `kind` whose image is cut into `crop` = (tw, th) local tiles.

    `largest_scale` bounds the image's size over the canvas the model sees.
    """
    page = new_page(rng, crop, image_size(rng, crop, largest_scale))
    questions = KINDS[kind](page)
    questions = [q for q in questions if q.task != "ocr" or len(q.answer) <= FULL_TEXT_LIMIT]
    finish(page)
    if kind == "shapes":
        questions += locate_shapes(page)
    else:
        questions += locate_words(page)
    return Document(kind, page.image, crop, page.marks, page.words, questions)


def locate_shapes(page: Page) -> list[Question]:
    """Grounding questions for shapes that their kind and colour, or their kind alone, identify."""
    pairs = Counter(mark.label for mark in page.marks)
    kinds = Counter(mark.label[0] for mark in page.marks)
    found = []
    for mark in page.marks:
        kind, colour = mark.label
        if pairs[mark.label] == 1:
            found.append(locate(page.rng, f"{colour} {kind}", [mark.box], page.size, "locate_shape"))
        if kinds[kind] == 1:
            found.append(locate(page.rng, kind, [mark.box], page.size, "locate_shape"))
    return found
