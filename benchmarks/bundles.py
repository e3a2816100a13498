"""Bundles of one checkpoint beside each other: load, prefill, decode and memory, each run in a process of its own.

    python benchmarks/bundles.py A.bundle B.bundle [--rounds 3] [--threads N] [--words 94] [--image FILE]

Each round runs every bundle once, so that a noisy machine meets all of them; the table has medians over the rounds and
the ratio to the last bundle. Answers must be the same tokens, or the table says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

FIGURES = ("load_ms", "encode_ms", "prefill_ms", "tokens_per_second", "peak_rss_bytes")


@dataclass(frozen=True)
class Question:
    """What every bundle is asked; threads None: one a physical core."""

    words: int
    new_tokens: int
    threads: int | None
    image: str | None


def ask(bundle: str, question: Question) -> dict:
    """One answer in this process."""
    from vl2.runtime import BundleOptions, GenerationOptions, open_bundle

    model = open_bundle(bundle, BundleOptions(check_hashes=False, threads=question.threads, device="cpu"))
    options = GenerationOptions(max_new_tokens=question.new_tokens, ignore_eos=True)
    answer = model.ask("word " * question.words, [question.image] if question.image else [], options)
    figures = {name: getattr(answer, name) for name in FIGURES}
    return {**figures, "prompt_tokens": answer.prompt_tokens, "token_ids": answer.token_ids, "backend": model.backend}


def run_apart(bundle: str, question: Question) -> dict:
    """As `ask`, in a fresh process, so that memory and loading are its own."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(question)), bundle]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--words", type=int, default=94)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--image")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(ask(options.bundles[0], Question(**json.loads(options.child)))))
        return
    question = Question(options.words, options.new_tokens, options.threads, options.image)
    runs: dict[str, list[dict]] = {bundle: [] for bundle in options.bundles}
    for _ in range(options.rounds):
        for bundle, results in runs.items():
            results.append(run_apart(bundle, question))
    report(runs)


def report(runs: dict[str, list[dict]]) -> None:
    """The table, in Markdown."""
    medians = {bundle: {name: statistics.median(run[name] for run in results) for name in FIGURES}
               for bundle, results in runs.items()}  # fmt: skip
    first, last = next(iter(runs.values()))[0], list(medians.values())[-1]
    print(f"{first['prompt_tokens']} prompt tokens, {len(first['token_ids'])} new ones; {first['backend']}\n")
    print("| bundle | " + " | ".join(FIGURES) + " |\n|" + "---|" * (len(FIGURES) + 1))
    for bundle, figures in medians.items():
        cells = [f"{figures[name]:,.1f} ({figures[name] / last[name]:.2f} ×)" if last[name] else f"{figures[name]:,.1f}"
                 for name in FIGURES]  # fmt: skip
        print(f"| {bundle} | " + " | ".join(cells) + " |")
    answers = {tuple(run["token_ids"]) for results in runs.values() for run in results}
    print("\nthe same tokens in all runs" if len(answers) == 1 else f"\n{len(answers)} different answers")


if __name__ == "__main__":
    main()
