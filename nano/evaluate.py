"""Scores a checkpoint (torch) or a bundle (torch-free runtime) on question and answer pages.

`python -m vl2.nano.evaluate CHECKPOINT_OR_BUNDLE --data nano/heldout/heldout.jsonl` prints a table and one JSON line.
An answer is right when it is equal to the expected one; a grounding answer when its label is equal and each of its
boxes overlaps the expected one with an intersection over union of at least 0.5.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from vl2.errors import VL2Error
from vl2.prompt import Message, Processor
from vl2.runtime.grounding import intersection_over_union, parse

MAX_NEW_TOKENS = 160
IOU_BOUND = 0.5

# (image path, question) → answer
Ask = Callable[[Path, str], str]


def read_questions(path: Path) -> list[dict]:
    """The lines of a held-out file, each with `image` made a path beside the file; VL2Error where it is missing."""
    if not path.is_file():
        raise VL2Error(f"{path}: no such file", "the shipped set is nano/heldout/heldout.jsonl")
    # Not str.splitlines: texts hold U+2028 and the like, which end no line of JSON.
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    return [{**line, "image": path.parent / line["image"]} for line in lines]


def is_right(line: dict, answer: str) -> bool:
    """Whether `answer` counts as right for a line of the held-out file."""
    if not line["boxes"]:
        return answer.strip() == line["answer"]
    found = parse(answer).boxes
    expected = parse(line["answer"]).boxes
    if [box.label for box in found] != [box.label for box in expected]:
        return False
    return all(intersection_over_union(a.corners, b.corners) >= IOU_BOUND for a, b in zip(found, expected, strict=True))


def score(questions: Iterable[dict], ask: Ask) -> tuple[dict[str, dict], list[dict]]:
    """Task → {"right", "asked", "accuracy"} (and "all"), and the questions answered wrongly with their answers."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    wrong = []
    for line in questions:
        answer = ask(line["image"], line["question"])
        right = is_right(line, answer)
        for task in (line["task"], "all"):
            counts[task][0] += right
            counts[task][1] += 1
        if not right:
            wrong.append({**line, "image": str(line["image"]), "given": answer})
    table = {task: {"right": right, "asked": asked, "accuracy": round(right / asked, 4)}
             for task, (right, asked) in sorted(counts.items())}
    return table, wrong


def ask_checkpoint(folder: Path) -> Ask:
    """Greedy answers of a checkpoint through the PyTorch model in float32, stopping at eos."""
    import torch

    from vl2.model.checkpoint import load_model
    from vl2.model.generate import extend, prefill

    processor, model = Processor.from_folder(folder), load_model(folder)

    @torch.inference_mode()
    def ask(image: Path, question: str) -> str:
        turn = [Message("user", "<image>\n" + question, (image,)), Message("assistant", "")]
        prompt = processor.encode(turn)
        ids, mask, tiles, crops = (torch.from_numpy(a) for a in
                                   (prompt.input_ids, prompt.images_seq_mask, prompt.tiles, prompt.crops))
        seen = torch.ones(1, len(ids), dtype=torch.bool)
        logits, cache = prefill(model, model.embed(ids[None], mask[None], tiles, crops), seen)
        answer: list[int] = []
        while len(answer) < MAX_NEW_TOKENS and (token := int(logits.argmax())) != processor.eos_id:
            answer.append(token)
            seen = torch.cat([seen, seen[:, :1]], 1)
            logits, cache = extend(model, model.language.embed_tokens(torch.tensor([[token]])), seen, cache)
        return processor.tokenizer.decode(answer, skip_special_tokens=False)

    return ask


def ask_bundle(folder: Path) -> Ask:
    """Greedy answers of a bundle through the torch-free runtime."""
    from vl2.runtime import open_bundle
    from vl2.runtime.options import GenerationOptions

    model, options = open_bundle(folder), GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    return lambda image, question: model.ask(question, images=[image], options=options).text


def evaluate(folder: Path, data: Path, every: int = 1) -> tuple[dict[str, dict], list[dict]]:
    """`score` of a checkpoint or a bundle on every `every`-th question of `data`."""
    if not folder.is_dir():
        raise VL2Error(f"{folder}: no such folder", "give a checkpoint or a bundle")
    ask = ask_bundle if (folder / "manifest.json").exists() else ask_checkpoint
    return score(read_questions(data)[::every], ask(folder))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vl2.nano.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="checkpoint or bundle folder")
    parser.add_argument("--data", type=Path, required=True, help="heldout.jsonl, with its images beside it")
    parser.add_argument("--every", type=int, default=1, help="take each n-th question only")
    parser.add_argument("--wrong", type=Path, help="write the wrong answers into this JSONL file")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    table, wrong = evaluate(options.model, options.data, options.every)
    print(f"{'task':<12}{'right':>7}{'asked':>7}{'accuracy':>10}", file=sys.stderr)
    for task, row in table.items():
        print(f"{task:<12}{row['right']:>7}{row['asked']:>7}{row['accuracy']:>10.1%}", file=sys.stderr)
    if options.wrong:
        options.wrong.write_text("".join(json.dumps(line) + "\n" for line in wrong), encoding="utf-8")
    print(json.dumps({"model": str(options.model), "seconds": round(time.monotonic() - start, 1), "tasks": table}))


if __name__ == "__main__":
    main()
