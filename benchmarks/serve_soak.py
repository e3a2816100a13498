"""A server under mixed clients for a while: right answers, leavers, malformed bodies, hostile images.

    python benchmarks/serve_soak.py nano.bundle [--minutes 3] [--clients 8]

Starts `vl2 serve` on a free port. Each client has an address of its own (127.0.0.2 and up) and does one thing after
the other, drawn at random. Answers are compared with those that the same bundle gave in this process before. Fails on
a wrong answer, an unexpected status, a server that ends, and a resident memory that grows by more than 2 % after the
first fifth of the time. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from PIL import Image

from vl2.nano.documents import make_document
from vl2.runtime import GenerationOptions, open_bundle

CHAT = "/v1/chat/completions"
QUESTION, SECOND = "Read line 1.", "Transcribe the text."
TOKENS, DOCUMENTS = 24, 12
LARGEST_GROWTH, WARM_UP = 0.02, 0.2
# Bounded so that it is full, and memory constant, after the warm-up.
SERVER = ["--port", "0", "--kv-cache", "32MB", "--max-pixels", "4000000"]


@dataclass
class Record:
    """What happened. done: actions by name and status; seconds: of whole answers; rss: (time, bytes)."""

    done: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rss: list[tuple[float, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, action: str, status: object, failure: str | None = None) -> None:
        with self.lock:
            self.done[f"{action} {status}"] += 1
            if failure:
                self.failures.append(f"{action}: {failure}")


@dataclass(frozen=True)
class Case:
    """An image as URL, and what the model says to the first and to the second question about it."""

    url: str
    first: str
    second: str


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def url_of(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def cases(bundle: Path) -> list[Case]:
    """Documents of vl2-nano with this bundle's own answers, each asked alone."""
    model, options, found = open_bundle(bundle), GenerationOptions(TOKENS), []
    for seed in range(DOCUMENTS):
        image = make_document(random.Random(seed), "lines", (1, 1)).image
        chat = model.chat()
        answers = [chat.ask(QUESTION, [image], options).text, chat.ask(SECOND, options=options).text]
        found.append(Case(url_of(encoded(image)), *answers))
    return found


def hostile() -> dict[str, tuple[str, int]]:
    """Images by name, each with the status that it must get."""
    red, frames = Image.new("RGB", (60, 40), "red"), [Image.new("RGB", (20, 20), name) for name in ("red", "blue")]
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "bomb": (url_of(encoded(Image.new("1", (30_000, 30_000)))), 400),
        "1x10000": (url_of(encoded(Image.new("RGB", (1, 10_000)))), 400),
        "animated": (url_of(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "gif"), 400),
        "16 bits": (url_of(encoded(Image.new("I;16", (60, 40), 4000))), 400),
        "truncated": (url_of(encoded(Image.effect_noise((200, 200), 90))[:9_000]), 400),
        "empty": ("data:image/png;base64,", 400),
        "text": (url_of(b"no image"), 400),
        "a file of the server": ("/etc/passwd", 400),
        "the cloud's metadata": ("https://169.254.169.254/latest", 400),
        "CMYK": (url_of(encoded(Image.new("CMYK", (60, 40)), "JPEG"), "jpeg"), 200),
        "EXIF": (url_of(encoded(red, "JPEG", exif=turned.tobytes()), "jpeg"), 200),
    }


MALFORMED = (b"", b"{", b"[1]", b'{"messages": []}', b'{"messages": [{"role": "user", "content": "x"}], "tools": []}',
             b'{"n": NaN}', b"\xff" * 100, b"[" * 50_000, b'{"messages": [{"role": "user", "content": "\\ud800"}]}')


class Client(threading.Thread):
    """One client until `end` (time.monotonic)."""

    def __init__(self, number: int, url: str, plan: tuple[list[Case], dict], record: Record, end: float):
        super().__init__(daemon=True)
        self.rng, self.record, self.end = random.Random(number), record, end
        self.cases, self.hostile = plan
        self.http = httpx.Client(base_url=url, timeout=120,
                                 transport=httpx.HTTPTransport(local_address=f"127.0.0.{number + 2}"))

    def run(self) -> None:
        actions = {self.ask: 30, self.stream: 30, self.second_turn: 12, self.leave: 12, self.malformed: 8,
                   self.odd_image: 10}
        while time.monotonic() < self.end:
            action = self.rng.choices(list(actions), actions.values())[0]
            try:
                action()
            except Exception as error:
                self.record.note(action.__name__, "failed", f"{type(error).__name__}: {error}")

    def body(self, case: Case, **more) -> dict:
        return {"messages": [question(case.url)], "max_tokens": TOKENS, **more}

    def check(self, action: str, response: httpx.Response, expected: str, text: str) -> None:
        wrong = None if response.status_code == 200 and text == expected else f"{text!r}, expected {expected!r}"
        self.record.note(action, response.status_code, wrong)

    def ask(self) -> None:
        case, began = self.rng.choice(self.cases), time.monotonic()
        response = self.http.post(CHAT, json=self.body(case))
        self.check("ask", response, case.first, content(response))
        with self.record.lock:
            self.record.seconds.append(time.monotonic() - began)

    def stream(self) -> None:
        case, text = self.rng.choice(self.cases), ""
        with self.http.stream("POST", CHAT, json=self.body(case, stream=True)) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        self.check("stream", response, case.first, text)

    def second_turn(self) -> None:
        case = self.rng.choice(self.cases)
        messages = [question(case.url), {"role": "assistant", "content": case.first},
                    {"role": "user", "content": SECOND}]
        response = self.http.post(CHAT, json={"messages": messages, "max_tokens": TOKENS})
        self.check("second turn", response, case.second, content(response))

    def leave(self) -> None:
        body = self.body(self.rng.choice(self.cases), stream=True, max_tokens=400)
        if self.rng.random() < 0.5:
            try:
                response = self.http.post(CHAT, json=body, timeout=self.rng.uniform(0.01, 1))
            except httpx.TimeoutException:
                return self.record.note("leave", "early")
            return self.record.note("leave", response.status_code)
        with self.http.stream("POST", CHAT, json=body) as response:
            for _, _ in zip(range(self.rng.randint(0, 3)), response.iter_lines(), strict=False):
                pass
        self.record.note("leave", response.status_code)

    def malformed(self) -> None:
        headers = {"Content-Type": "application/json"}
        response = self.http.post(CHAT, content=self.rng.choice(MALFORMED), headers=headers)
        self.record.note("malformed", response.status_code, None if response.status_code == 400 else response.text)

    def odd_image(self) -> None:
        name = self.rng.choice(list(self.hostile))
        url, status = self.hostile[name]
        response = self.http.post(CHAT, json={"messages": [question(url)], "max_tokens": 4})
        self.record.note("odd image", response.status_code,
                         None if response.status_code == status else f"{name}: {response.text}")


def question(url: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return {"role": "user", "content": parts}


def content(response: httpx.Response) -> str:
    found = response.json()
    return found["choices"][0]["message"]["content"] if "choices" in found else response.text


def rss_bytes(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024


def growth(rss: list[tuple[float, int]], seconds: float) -> float:
    """Median of the last tenth over the median of the tenth after the warm-up, less one."""
    tenth = seconds / 10
    early = [size for at, size in rss if WARM_UP * seconds <= at < WARM_UP * seconds + tenth]
    late = [size for at, size in rss if at >= seconds - tenth]
    return statistics.median(late) / statistics.median(early) - 1


def tenths(rss: list[tuple[float, int]]) -> list[float]:
    """MB at each tenth of the time."""
    return [round(rss[min(len(rss) - 1, len(rss) * part // 10)][1] / 1e6, 1) for part in range(11)]


def soak(options: argparse.Namespace) -> tuple[Record, int | None]:
    """What happened, and the exit code of a server that ended by itself."""
    plan, record = (cases(options.bundle), hostile()), Record()
    print(f"{len({case.first for case in plan[0]})} of {DOCUMENTS} answers differ from each other", file=sys.stderr)
    with tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False) as log:
        command = [Path(sys.executable).with_name("vl2"), "serve", options.bundle, *SERVER]
        server = subprocess.Popen(command, stderr=log, env={**os.environ, "PYTHONUNBUFFERED": "1"})
        while (found := re.search(r"serving \S+ at (\S+)", Path(log.name).read_text())) is None:
            time.sleep(0.2)
            assert server.poll() is None, Path(log.name).read_text()
        began, seconds = time.monotonic(), options.minutes * 60
        clients = [Client(number, found[1], plan, record, began + seconds) for number in range(options.clients)]
        for client in clients:
            client.start()
        while time.monotonic() < began + seconds and server.poll() is None:
            record.rss.append((time.monotonic() - began, rss_bytes(server.pid)))
            time.sleep(min(1.0, seconds / 100))
        for client in clients:
            client.join(120)
        ended = server.poll()
        server.terminate()
        if (code := server.wait(60)) != 0 and ended is None:
            record.failures.append(f"the server ended with {code} on SIGTERM")
    print(f"log of the server: {log.name}", file=sys.stderr)
    return record, ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    record, ended = soak(options)
    grown = growth(record.rss, options.minutes * 60) if ended is None else float("nan")
    for name, count in sorted(record.done.items()):
        print(f"{name:24}{count:>8,}")
    for failure in record.failures[:20]:
        print(f"FAILED {failure[:300]}")
    facts = {"minutes": options.minutes, "clients": options.clients, "requests": sum(record.done.values()),
             "failures": len(record.failures), "ended": ended, "rss_growth": round(grown, 4),
             "rss_mb_by_tenths": tenths(record.rss), "median_answer_s": round(statistics.median(record.seconds), 3),
             "slowest_answer_s": round(max(record.seconds), 3)}
    print(json.dumps(facts))
    return int(bool(record.failures) or ended is not None or not grown <= LARGEST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
