"""Every program of `examples/` does what its first lines say, with vl2-nano, as its reader would call it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
DEMO = ROOT / "nano" / "demo.png"


def example(name: str, *arguments: object) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, EXAMPLES / name, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_every_example_is_named_in_the_readme_and_tested_here():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    readme, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    assert names == set(re.findall(r"\]\((\w+\.py)\)", readme))
    assert all(f'"{name}"' in tests for name in names)


def test_a_question_is_answered_piece_by_piece(nano_bundle):
    from vl2.runtime import open_bundle

    done = example("ask.py", nano_bundle, DEMO, "What is the total?")
    assert done.stdout == open_bundle(nano_bundle).ask("What is the total?", [DEMO]).text + "\n"
    assert " ms for the image, " in done.stderr


def test_a_conversation_keeps_what_was_computed(nano_bundle):
    word = ROOT / "nano" / "heldout" / "images" / "word-00.png"
    lines = example("chat_about_two_images.py", nano_bundle, DEMO, word).stdout.splitlines()
    counts = [tuple(map(int, re.findall(r"\d+", line))) for line in lines if line.startswith("  (")]
    assert len(counts) == 3 and counts[0][1] == 0
    for (before, _), (_, kept) in zip(counts, counts[1:], strict=False):
        assert kept >= before


def test_boxes_are_printed_and_drawn(nano_bundle, tmp_path):
    out = tmp_path / "drawn.png"
    boxes = [json.loads(line) for line in
             example("draw_boxes.py", nano_bundle, DEMO, "Locate the word Total.", out).stdout.splitlines()]
    with Image.open(DEMO) as image, Image.open(out) as drawn:
        assert drawn.size == image.size
        assert boxes and (drawn.tobytes() != image.convert("RGB").tobytes())
    assert all(len(box["box"]) == 4 == len(box["pixels"]) for box in boxes)


def test_a_batch_goes_on_where_it_was_ended_and_survives_a_broken_image(nano_bundle, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "answers.jsonl"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(DEMO, folder / name)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not an image either")
    example("batch_to_jsonl.py", nano_bundle, folder, "What is the total?", out)
    whole = out.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["image"] for row in rows] == ["a.png", "b.png", "broken.jpg"]
    assert rows[0]["text"] == rows[1]["text"] != "" and "Pillow" in rows[2]["error"]
    out.write_text(whole[: len(whole.splitlines()[0]) + 20], encoding="utf-8")
    done = example("batch_to_jsonl.py", nano_bundle, folder, "What is the total?", out)
    assert out.read_text(encoding="utf-8") == whole and "a.png" not in done.stderr


def test_openais_client_streams_from_the_server(nano_bundle, monkeypatch):
    pytest.importorskip("openai", reason="openai is not installed (extra [test])")
    monkeypatch.delenv("VL2_SERVE_TOKEN", raising=False)
    serve = "import sys; from vl2.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", serve, "serve", nano_bundle, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(match[1] for line in server.stderr if (match := re.search(r"serving .* at (http://\S+)", line)))
            asked = example("openai_client.py", f"{url}/v1", DEMO, "What is the total?")
            located = example("openai_client.py", f"{url}/v1", DEMO, "Locate the word Total.")
        finally:
            server.terminate()
            server.communicate()
    assert asked.stdout == example("ask.py", nano_bundle, DEMO, "What is the total?").stdout
    assert re.search(r"^.+: \[\d+, \d+, \d+, \d+\]$", located.stdout, flags=re.MULTILINE)
