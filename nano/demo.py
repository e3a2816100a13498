"""Draws the demo image: `python -m vl2.nano.demo --out nano/demo.png`, a receipt that no training seed has drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random

from PIL import Image

from vl2.nano.pages import MARGIN, new_page

QUESTION, ANSWER = "What is the total?", "11.15"
SHOP = "Harbour"
ITEMS = (("Bread", "2.80"), ("Milk", "1.45"), ("Coffee", "6.90"))


def demo_image() -> Image.Image:
    """The receipt, 224x224 pixels: two tiles wide and two high."""
    assert sum(round(float(amount) * 100) for _, amount in ITEMS) == round(float(ANSWER) * 100), "the total is wrong"
    page = new_page(Random("demo"), (2, 2), (224, 224), inverted=0.0)
    page.font_name = "DejaVuSans"
    size, pitch = 18.0, 42.0
    y = MARGIN + 30.0
    page.text(((page.width - page.text_width(SHOP, size)) / 2, y), SHOP, size)
    for name, amount in (*ITEMS, ("Total", ANSWER)):
        y += pitch
        if name == "Total":
            page.line((MARGIN, y - size * 0.95), (page.width - MARGIN, y - size * 0.95))
        page.text((MARGIN, y), name, size)
        page.text((page.width - MARGIN, y), amount, size, right=True)
    return page.image


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    demo_image().save(options.out, optimize=True)
    print(f'{options.out}: "{QUESTION}" → "{ANSWER}"')


if __name__ == "__main__":
    main()
