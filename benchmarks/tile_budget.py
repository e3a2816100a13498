"""What a tile budget costs in answers: `python benchmarks/tile_budget.py BUNDLE --data nano/heldout/heldout.jsonl`.

Asks every `--every`-th question under each budget of `--max-tiles` and prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from vl2.nano.evaluate import MAX_NEW_TOKENS, read_questions, score
from vl2.runtime import BundleOptions, GenerationOptions, open_bundle


def measure(bundle: Path, questions: list[dict], limit: int | None) -> dict:
    """Right answers by task, mean prompt tokens and seconds a question under one budget."""
    model = open_bundle(bundle, BundleOptions(max_tiles=limit, check_hashes=False))
    options, answers = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS), []

    def ask(image: Path, question: str) -> str:
        answers.append(model.ask(question, images=[image], options=options))
        return answers[-1].text

    start = time.process_time()
    table, _ = score(questions, ask)
    return {
        "max_tiles": limit,
        "prompt_tokens": round(sum(answer.prompt_tokens for answer in answers) / len(answers), 1),
        "processor_seconds": round((time.process_time() - start) / len(answers), 3),
        "tasks": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="heldout.jsonl, with its images beside it")
    parser.add_argument("--every", type=int, default=4, help="take each n-th question only")
    parser.add_argument("--max-tiles", type=int, nargs="+", default=[1, 2, 3], help="the budgets beside none")
    options = parser.parse_args()
    questions = read_questions(options.data)[:: options.every]
    rows = []
    for limit in [*options.max_tiles, None]:
        rows.append(measure(options.bundle, questions, limit))
        tasks = "  ".join(f"{task} {row['right']}/{row['asked']}" for task, row in rows[-1]["tasks"].items())
        print(f"max tiles {limit or 'none'}: {rows[-1]['prompt_tokens']} tokens, {rows[-1]['processor_seconds']} s; "
              f"{tasks}", file=sys.stderr)  # fmt: skip
    print(json.dumps({"bundle": str(options.bundle), "every": options.every, "rows": rows}))


if __name__ == "__main__":
    main()
