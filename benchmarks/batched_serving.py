"""What several clients get of one server together: `python benchmarks/batched_serving.py BUNDLE`.

Starts `vl2 serve` with `--batch 1` and `--batch 4`, asks each in turn with 4 clients at once, in interleaved rounds,
and prints all tokens a second, the median time to the first token, the longest answer. Sampling at a high temperature,
each with a seed of its own, makes answers long and different; all servers give the same ones, which is checked.
Tokens a second are of the clock, and of the server's processor time, which neighbours on the core change little.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx

QUESTIONS = ("Read the text.", "What is the total?", "Locate the word Total.", "What are the first and last line?")


@contextmanager
def server(bundle: Path, batch: int, threads: int):
    """URL and process id of a server of its own."""
    command = [str(Path(sys.executable).with_name("vl2")), "serve", str(bundle), "--port", "0",
               "--batch", str(batch), "--threads", str(threads), "--no-hash-check"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (found := re.search(r"serving .* at (http://\S+)", process.stderr.readline())):
            assert process.poll() is None, "the server has ended"
        yield found[1], process.pid
    finally:
        process.terminate()
        process.wait()


def processor_seconds(pid: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(url: str, number: int, tokens: int) -> tuple[str, int, float, float]:
    """Text, count of tokens, seconds to the first piece and to the last."""
    question = f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 2.0,
            "seed": number, "stream": True, "stream_options": {"include_usage": True}}
    start, first, text, count = time.perf_counter(), 0.0, "", 0
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            piece = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            first = first or (time.perf_counter() - start if piece else 0.0)
            text += piece
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
    return text, count, first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="the most of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    rates, works, firsts, longest, texts = ({batch: [] for batch in options.batches} for _ in range(5))
    with ExitStack() as stack, ThreadPoolExecutor(options.clients) as clients:
        urls = {batch: stack.enter_context(server(options.bundle, batch, options.threads)) for batch in options.batches}
        for turn in range(options.rounds + 1):
            for batch, (url, pid) in urls.items():
                numbers = range(turn * options.clients, (turn + 1) * options.clients)
                start, work = time.perf_counter(), processor_seconds(pid)
                answers = list(clients.map(lambda number, url=url: ask(url, number, options.tokens), numbers))
                seconds, work = time.perf_counter() - start, processor_seconds(pid) - work
                texts[batch] += [answer[0] for answer in answers]
                if turn:  # the first round warms up
                    tokens = sum(answer[1] for answer in answers)
                    rates[batch].append(tokens / seconds)
                    works[batch].append(tokens / work)
                    firsts[batch] += [answer[2] for answer in answers]
                    longest[batch].append(max(answer[3] for answer in answers))
    assert len({tuple(found) for found in texts.values()}) == 1, "the servers gave different answers"
    print(f"{options.bundle}, {options.clients} clients\nbatch   tokens/s   of processor   first token s   longest s")
    results = (rates, works, firsts, longest)
    found = {batch: [statistics.median(each[batch]) for each in results] for batch in options.batches}
    for batch, (rate, work, first, last) in found.items():
        print(f"{batch:5} {rate:10.1f} {work:14.1f} {first:15.2f} {last:11.2f}")
    print(json.dumps({"bundle": str(options.bundle), "clients": options.clients, "batches": found}))


if __name__ == "__main__":
    main()
