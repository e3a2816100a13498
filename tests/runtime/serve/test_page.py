"""The page at `/` in a real browser: Debian's chromium, driven by Playwright; the server is real, its model scripted.

Browser and driver are large, so that no extra installs them: `apt-get install chromium`, then `make test-page`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from vl2.errors import VL2Error
from vl2.image import ImageGeometry
from vl2.runtime import open_bundle
from vl2.runtime.answer import EOS, Answer, AnswerStream, Progress
from vl2.runtime.grounding import parse

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

BOXES = ("Here: ", "<|ref|>total<|/ref|>", "<|det|>[[100, 250, ", "500, 750]]<|/det|>")


class ScriptedModel:
    """Answers by keyword, in pieces; `asked` are the conversations, `going` lets a slow answer go on."""

    backend = "scripted"
    largest_batch = 1

    def __init__(self):
        geometry = ImageGeometry(384, 14, 2, ((384, 384), (768, 384), (384, 768)))
        self.engine = SimpleNamespace(processor=SimpleNamespace(geometry=geometry))
        self.manifest = SimpleNamespace(language=SimpleNamespace(max_position_embeddings=4096))
        self.asked: list = []
        self.going = threading.Event()
        self.closed = threading.Event()

    def complete(self, messages, options=None) -> AnswerStream:
        self.asked.append(messages)
        if "too long" in messages[-1].content:
            raise VL2Error("the prompt has 9,999 tokens", "shorten the text")
        return AnswerStream(self._pieces(messages), Progress([]))

    def _pieces(self, messages):
        question = messages[-1].content.rpartition("\n")[2]
        images = [image for message in messages for image in message.images]
        pieces = BOXES if "Locate" in question else ("You asked ", f"“{question}” ", f"about {len(images)} images.")
        try:
            for index, piece in enumerate(pieces):
                if "slow" in question and index == 1:
                    self.going.wait(20)
                yield piece
        except GeneratorExit:
            self.closed.set()
            raise
        text = "".join(pieces)
        found = parse(text)
        return Answer(text, tuple(range(len(pieces))), 9, 0, found.boxes, found.problems,
                      images[-1].size if images else None, EOS, 0.0, 0.0, 1.0, 2.0, 12.5, 123_000_000)


class Served:
    """A server in a thread of its own."""

    def __init__(self, model=None, **settings):
        from vl2.runtime.serve.app import Service
        from vl2.runtime.serve.settings import ServeSettings

        self.model = model or ScriptedModel()
        self._service = Service(self.model, ServeSettings("scripted-model", **settings))
        config = uvicorn.Config(self._service.app, host="127.0.0.1", port=0, lifespan="off", log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}/"
        return self

    def __exit__(self, *_):
        if isinstance(self.model, ScriptedModel):
            self.model.going.set()
        self._server.should_exit = True
        self._thread.join(20)
        self._service.worker.stop(5)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def served() -> Iterator[Served]:
    with Served() as server:
        yield server


def opened(browser, url: str, **options):
    """A tab; whatever the browser complains about fails the test at its end."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(30_000)
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda message: message.type == "error" and page.complaints.append(message.text))
    page.goto(url)
    return page


def ask(page, text: str) -> None:
    page.get_by_label("Question", exact=True).fill(text)
    page.get_by_role("button", name="Ask").click()


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "receipt.png"
    Image.new("RGB", (200, 100), (250, 250, 240)).save(path)
    return path


def finished(page, number: int = 1):
    """The `number`-th answer, once it is whole."""
    answer = page.locator("article.assistant:not([aria-busy])").nth(number - 1)
    answer.wait_for()
    return answer


def test_an_uploaded_image_is_sent_as_it_is_and_its_boxes_are_drawn_where_the_answer_says(browser, served, picture):
    page = opened(browser, served.url)
    page.get_by_label("Images", exact=True).set_input_files(picture)
    page.get_by_role("img", name="receipt.png").wait_for()
    ask(page, "Locate the word total.")
    answer = finished(page)
    (message,) = served.model.asked[0]
    assert message.content == "<image>\nLocate the word total." and message.images[0].size == (200, 100)
    assert answer.locator(".text").inner_text() == "Here: total"
    assert "total: from (20, 25) to (100, 75) pixels" in answer.inner_text()
    facts = answer.locator(".facts").inner_text()
    assert "4 tokens" in facts and "12.5 tokens/s" in facts and "memory 123 MB" in facts
    image, box = answer.locator("img").bounding_box(), answer.locator("rect").bounding_box()
    # 100…500 of 999 of the width, 250…750 of the height, as truncated pixels; the line is three pixels wide.
    for name, start, length in (("x", "x", "width"), ("y", "y", "height")):
        begin, end = {"x": (20 / 200, 100 / 200), "y": (25 / 100, 75 / 100)}[name]
        assert box[start] == pytest.approx(image[start] + begin * image[length], abs=2)
        assert box[length] == pytest.approx((end - begin) * image[length], abs=4)
    label = answer.locator(".label")
    assert label.inner_text() == "total" and label.bounding_box()["x"] == pytest.approx(box["x"], abs=2)
    assert page.complaints == []


def test_an_answer_is_shown_while_it_comes_and_can_be_stopped(browser, served):
    page = opened(browser, served.url)
    ask(page, "slow please")
    page.get_by_text("You asked").wait_for()
    assert page.locator("article.assistant").get_attribute("aria-busy") == "true"
    assert not page.get_by_role("button", name="Ask").is_visible()
    page.get_by_role("button", name="Stop").click()
    assert "stopped" in finished(page).inner_text()
    served.model.going.set()
    ask(page, "And now?")
    assert "And now?" in finished(page, 2).inner_text()
    assert [message.role for message in served.model.asked[-1]] == ["user", "assistant", "user"]
    assert served.model.asked[-1][1].content.strip() == "You asked"
    assert page.complaints == []


def test_a_conversation_keeps_its_images_until_a_new_chat(browser, served, picture):
    page = opened(browser, served.url)
    page.get_by_label("Images", exact=True).set_input_files([picture, picture])
    ask(page, "What is it?")
    assert "about 2 images" in finished(page).inner_text()
    ask(page, "And why?")
    assert "about 2 images" in finished(page, 2).inner_text()
    page.get_by_role("button", name="New chat").click()
    assert page.locator("article").count() == 0
    ask(page, "Hello?")
    assert "about 0 images" in finished(page).inner_text() and len(served.model.asked[-1]) == 1


def test_pasted_and_dropped_images_wait_with_those_picked_and_can_be_taken_away(browser, served):
    page = opened(browser, served.url)
    page.evaluate("""async () => {
        const canvas = new OffscreenCanvas(4, 4);
        canvas.getContext("2d").fillRect(0, 0, 4, 4);
        const file = new File([await canvas.convertToBlob()], "dropped.png", { type: "image/png" });
        const data = new DataTransfer();
        data.items.add(file);
        document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
    }""")
    names = page.get_by_role("img", name="dropped.png")
    page.wait_for_function("document.querySelectorAll('#tray img').length === 2")
    page.get_by_role("button", name="Remove dropped.png").first.click()
    assert names.count() == 1


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (39, 19)), (6, (19, 0)), (8, (0, 39))])
def test_a_photo_is_sent_upright_whichever_way_the_camera_was_held(browser, served, tmp_path, orientation, corner):
    photo, exif = Image.new("RGB", (40, 20), "white"), Image.Exif()
    photo.paste("black", (0, 0, 8, 8))
    exif[0x0112] = orientation
    photo.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    page = opened(browser, served.url)
    page.get_by_label("Images", exact=True).set_input_files(tmp_path / "photo.jpg")
    page.get_by_role("img", name="photo.jpg").wait_for()
    ask(page, "What is it?")
    finished(page)
    (sent,) = served.model.asked[0][0].images
    assert sent.size == ((40, 20) if orientation < 5 else (20, 40))
    opposite = (sent.width - 1 - corner[0], sent.height - 1 - corner[1])
    assert sum(sent.getpixel(corner)) < 150 and sum(sent.getpixel(opposite)) > 600


def test_an_error_is_readable_and_nothing_typed_or_picked_is_lost(browser, served, picture):
    page = opened(browser, served.url)
    page.get_by_label("Images", exact=True).set_input_files(picture)
    ask(page, "too long")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "the prompt has 9,999 tokens (shorten the text)" in alert.inner_text()
    assert page.get_by_label("Question", exact=True).input_value() == "too long"
    assert page.get_by_role("img", name="receipt.png").is_visible() and page.locator("article").count() == 0
    ask(page, "Locate it")
    finished(page)
    assert not alert.is_visible()


def test_an_image_beyond_the_servers_limit_is_told_as_too_large(browser, picture):
    from vl2.runtime.serve.settings import Limits

    with Served(limits=Limits(body_bytes=200)) as served:
        page = opened(browser, served.url)
        page.get_by_label("Images", exact=True).set_input_files(picture)
        ask(page, "What is it?")
        page.get_by_role("alert").wait_for()
        assert "large" in page.get_by_role("alert").inner_text() and served.model.asked == []


def test_two_tabs_have_conversations_of_their_own(browser, served, picture):
    first, second = opened(browser, served.url), opened(browser, served.url)
    first.get_by_label("Images", exact=True).set_input_files(picture)
    ask(first, "slow one")
    first.get_by_text("You asked").wait_for()
    ask(second, "quick one")
    served.model.going.set()
    assert finished(first).locator(".text").inner_text() == "You asked “slow one” about 1 images."
    assert finished(second).locator(".text").inner_text() == "You asked “quick one” about 0 images."
    assert first.complaints == second.complaints == []


def test_a_token_is_asked_for_and_kept_for_the_tab_only(browser):
    with Served(tokens=("secret",)) as served:
        page = opened(browser, served.url)
        field = page.get_by_label("This server wants a token")
        field.fill("wrong")
        field.press("Enter")
        page.get_by_text("does not know this token").wait_for()
        field.fill("secret")
        field.press("Enter")
        field.wait_for(state="hidden")
        ask(page, "Hello?")
        finished(page)
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]


def test_a_phone_shows_everything_without_scrolling_sideways_and_targets_are_large(browser, served, picture):
    page = opened(browser, served.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True,
                  color_scheme="dark")
    page.get_by_label("Images", exact=True).set_input_files([picture] * 6)
    ask(page, "Locate the word total.")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("Ask", "New chat"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 44 and box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"


def test_everything_can_be_reached_and_done_by_keyboard(browser, served):
    page = opened(browser, served.url)
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("slow two")
    page.keyboard.press("Enter")
    page.get_by_text("You asked").wait_for()
    assert served.model.asked[0][0].content == "Line one\nslow two"
    page.keyboard.press("Escape")
    assert "stopped" in finished(page).inner_text()
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert {"send", "new-chat", "file", "log"} <= set(reached) | {"question"}


def test_a_real_model_answers_in_the_page_as_from_python(browser, nano_bundle):
    model, image = open_bundle(nano_bundle), Path(__file__).parents[3] / "nano" / "demo.png"
    expected = [model.ask(question, images=[image]) for question in ("What is the total?", "Locate the word Total.")]
    with Served(model) as served:
        page = opened(browser, served.url)
        page.get_by_label("Images", exact=True).set_input_files(image)
        ask(page, "What is the total?")
        assert finished(page).locator(".text").inner_text() == expected[0].text
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Images", exact=True).set_input_files(image)
        ask(page, "Locate the word Total.")
        assert finished(page).locator("rect").count() == len(expected[1].boxes)
        assert page.complaints == []
