"""One bundle measured once, in a process of its own: `python -m vl2.measure.probe REQUEST`, both ways JSON.

Loading, memory and the first answer of a process can be measured only once in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vl2.errors import VL2Error


def main() -> int:
    """Exit code; writes a reading, or `error` and `hint`, as one line to standard output."""
    request = json.loads(sys.argv[1])
    try:
        reading = measure(Path(request["bundle"]), request["options"], request["workload"])
    except VL2Error as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return 1
    print(json.dumps(reading))
    return 0


def measure(bundle: Path, options: dict[str, Any], workload: dict[str, Any]) -> dict[str, Any]:
    """A reading; keyword arguments of BundleOptions and Workload. Times in seconds.

    first_token_at is a point of the system's monotonic clock, which whoever began this process has too.
    """
    from vl2.runtime import BundleOptions, open_bundle

    begun = time.monotonic()
    model = open_bundle(bundle, BundleOptions(**options))
    opened = time.monotonic()
    return {"pid": os.getpid(), "open_seconds": opened - begun, **Probe(model, workload).reading()}


class Probe:
    """Asks an opened bundle, in an order in which every first time is a first time."""

    def __init__(self, model: Any, workload: dict[str, Any]):
        from vl2.measure.workload import Workload

        self._model, self._work = model, Workload(**{**workload, "contexts": tuple(workload["contexts"])})

    def reading(self) -> dict[str, Any]:
        """Text first, so that its peak memory is without the vision graph."""
        text = self._text()
        contexts = self._contexts()
        image = self._image()
        before = contexts[-1]["peak_rss_bytes"]
        # Linux sums the peak up from counters that lag; it may go down by some pages.
        return {**text, "contexts": contexts, "peak_rss_text_bytes": before, "image": image,
                "peak_rss_bytes": max(before, image["peak_rss_bytes"]), "backend": self._model.backend}

    def _text(self) -> dict[str, Any]:
        """A question in the new process, and another one once everything is loaded."""
        from vl2.measure.workload import COLD, WARM

        cold, _ = self._first_token(self._model.chat(), COLD)
        at, processor_seconds = time.monotonic(), time.process_time()
        warm, seconds = self._first_token(self._model.chat(), WARM)
        return {"first_token_at": at, "processor_seconds": processor_seconds, "load_seconds": cold.load_ms / 1e3,
                "text_tokens": cold.prompt_tokens, "warm_seconds": seconds, "warm_tokens": warm.prompt_tokens}

    def _contexts(self) -> list[dict[str, Any]]:
        """One conversation that grows from context to context; its cache is kept, so each adds only what is new."""
        from vl2.measure.workload import Texts

        chat, rows = self._model.chat(), []
        texts = Texts(self._model.engine.processor, self._work.seed)
        for context in self._work.contexts:
            question = texts.question(chat.history, context)
            answer = chat.ask(question, options=self._options(self._work.new_tokens))
            rows.append({"context": context, "prompt_tokens": answer.prompt_tokens,
                         "prefill_tokens": answer.prompt_tokens - answer.reused_tokens,
                         "prefill_seconds": answer.prefill_ms / 1e3, "decode_steps": len(answer.token_ids) - 1,
                         "decode_seconds": answer.decode_ms / 1e3, "peak_rss_bytes": answer.peak_rss_bytes})
        return rows

    def _image(self) -> dict[str, Any]:
        """An image that loads the vision graph, another one once it is there, and a second question about that one."""
        from vl2.measure.workload import AGAIN, FIRST_IMAGE, SECOND_IMAGE, noise_images

        side = self._model.manifest.image.tile_size
        images = noise_images(self._work.image_size or (side, side), self._work.seed)
        first, _ = self._first_token(self._model.chat(), FIRST_IMAGE, next(images))
        chat, image = self._model.chat(), next(images)
        answer, seconds = self._first_token(chat, SECOND_IMAGE, image)
        again, again_seconds = self._first_token(chat, AGAIN)
        return {"load_seconds": first.load_ms / 1e3, "tiles": self._tiles(image), "prompt_tokens": answer.prompt_tokens,
                "encode_seconds": answer.encode_ms / 1e3, "first_token_seconds": seconds,
                "again_seconds": again_seconds, "again_encode_seconds": again.encode_ms / 1e3,
                "again_reused_tokens": again.reused_tokens, "peak_rss_bytes": again.peak_rss_bytes}

    def _first_token(self, chat: Any, question: str, image: Any = None) -> tuple[Any, float]:
        """The answer of one token, and its seconds from the question on."""
        begun = time.monotonic()
        answer = chat.ask(question, [] if image is None else [image], self._options(1))
        return answer, time.monotonic() - begun

    def _tiles(self, image: Any) -> int:
        from vl2.image import image_crops

        (wide, high), = image_crops([image.size], self._model.engine.processor.geometry)
        return 1 + int(wide) * int(high)

    def _options(self, new_tokens: int) -> Any:
        from vl2.runtime import GenerationOptions

        # What is measured may go on and on; neither an end token nor the guard may cut it.
        return GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True, repetition_guard=False,
                                 prefill_chunk=self._work.prefill_chunk)


def request_of(bundle: Path, options: dict[str, Any], workload: Any) -> str:
    """What `main` takes as its argument."""
    return json.dumps({"bundle": str(bundle), "options": options, "workload": asdict(workload)})


if __name__ == "__main__":
    sys.exit(main())
