"""Writes the model card: `python -m vl2.nano.card RUN --scores scores.json --out nano/checkpoint/README.md`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vl2.nano.checkpoint_files import checkpoint_tensors, read_state
from vl2.nano.geometry import CELLS, CROPS, PATCH, TILE, config_dict

_CARD = """# vl2-nano{suffix}

A small DeepSeek-VL2 trained from nothing on synthetic documents, in the family's checkpoint layout and with
{structure}.
It is vl2's demo, integration test and yardstick for quantization; it knows nothing but the pages described below.

## What it reads
Text of about 12 to 24 pixels (in canvas pixels, after the image is fitted into its tiles) in DejaVu Sans, DejaVu Sans
Bold and Pillow's built-in font: single strings, lines, receipts, forms, small tables; bar charts with printed values or
an axis; up to eight coloured shapes. A fifth of the pages is rotated (up to 3 degrees), a fifth blurred, a third noisy.
Words are listed ones or random letters, numbers, codes, dates. Questions are those of `nano/questions.py`, in English;
ask close to these phrasings, for example "Read the text.", "What is the total?", "What is the price of Milk?",
"What is the Qty of Rice?", "What is the value of Mar?", "Locate the word Total.", "How many circles are there?",
"What colour is the square?".

## Scores on the held-out set
`nano/heldout` (pages of another seed), greedy decoding, exact match (boxes: right label and IoU of at least 0.5), the
bfloat16 weights of this folder computed in float32:

| task | right | asked | accuracy |
|---|---|---|---|
{scores}

## Structure
{parameters:,} parameters ({unused:,} of them the tower's pooling head, present as in the family and unused), {bytes:,}
bytes in bfloat16. Tower: {vision[layers]} blocks of width {vision[width]}, tiles of {tile} pixels, patches of {patch},
{cells}x{cells} image tokens a tile, crops up to {crops} tiles. Decoder: {language[num_hidden_layers]} layers of width
{language[hidden_size]}, the first dense, then {language[n_routed_experts]} experts of {language[moe_intermediate_size]}
(softmax, greedy top {language[num_experts_per_tok]}, not normalised) and {language[n_shared_experts]} shared ones.
Byte-level tokenizer without merges: answers are spelt byte by byte, question words are single tokens.

## Training
{minutes:.0f} minutes on a shared 2-core CPU (AMX, bfloat16, one to two threads), {pages:,} pages in {steps:,} steps,
`python -m vl2.nano.train --out DIR` (see `docs/` and `nano/train.py` for the stages):
the tower alone on glyph labels of dense pages, then everything on questions and answers, with glyph labels on the side,
three attention heads taught to point at what is being read, two to find what the question names, and image tokens
taught where on the page their word is. Final values are running averages of the weights.
{history}"""


def card(run: Path, scores: dict[str, dict], history: str = "") -> str:
    """The card's text from a run's state and the scores by task (`evaluate`'s JSON, "tasks")."""
    state, values = read_state(run)
    variant = state["plan"]["variant"]
    config, tensors = config_dict(variant), checkpoint_tensors(values)
    rows = [f"| {task} | {row['right']} | {row['asked']} | {row['accuracy']:.1%} |" for task, row in scores.items()]
    return _CARD.format(
        suffix={"mha": "", "mla": " (MLA)"}[variant],
        structure={"mha": "Tiny's structure (plain attention)", "mla": "Small's structure (latent attention)"}[variant],
        scores="\n".join(rows),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        unused=sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("vision.attn_pool.")),
        bytes=sum(tensor.nbytes for tensor in tensors.values()),
        vision=config["vision_config"], language=config["language_config"],
        tile=TILE, patch=PATCH, cells=CELLS, crops=max(wide * high for wide, high in CROPS),
        minutes=state["seconds"] / 60, pages=state["pages"], steps=state["step"], history=history,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.card", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with state.pt")
    parser.add_argument("--scores", type=Path, required=True, help="evaluate's JSON line")
    parser.add_argument("--history", default="", help="what else is to be told about the training")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    scores = json.loads(options.scores.read_text())["tasks"]
    options.out.write_text(card(options.run, scores, options.history), encoding="utf-8")


if __name__ == "__main__":
    main()
