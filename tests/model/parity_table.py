"""Prints the parity table of docs/results.md: `python -m tests.model.parity_table` in the repository root."""

from __future__ import annotations

from tests.conftest import GOLDENS, MINI_CHECKPOINTS
from tests.model.recorded import GENERATED_CASES, all_pairs, case_inputs, load_mini
from tests.tolerances import max_difference
from vl2.model.generate import GreedyOptions, generate_greedy


def rows() -> dict[str, dict[str, float]]:
    """Largest |ours − original| by stage and checkpoint."""
    table: dict[str, dict[str, float]] = {}
    for name in MINI_CHECKPOINTS:
        mini = load_mini(GOLDENS / name)
        for pair in all_pairs(mini):
            row = table.setdefault(pair.stage, dict.fromkeys(MINI_CHECKPOINTS, 0.0))
            row[name] = max(row[name], max_difference(pair.got, pair.want))
        row = table.setdefault("logits of 24 greedy steps", dict.fromkeys(MINI_CHECKPOINTS, 0.0))
        for case in GENERATED_CASES:
            generated = generate_greedy(mini.model, *case_inputs(mini, case), GreedyOptions())
            row[name] = max(row[name], max_difference(generated.logits, mini.generation[f"{case}/step_logits"]))
    return table


if __name__ == "__main__":
    print("| stage |", " | ".join(MINI_CHECKPOINTS), "|\n|---|" + "---|" * len(MINI_CHECKPOINTS))
    for stage, row in rows().items():
        print(f"| {stage} |", " | ".join(f"{value:.1e}" for value in row.values()), "|")
