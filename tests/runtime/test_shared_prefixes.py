"""Shared prefixes on exported bundles: caches that graphs return and caches written in place, MHA and MLA."""

from pathlib import Path

import pytest

from vl2 import operators
from vl2.prompt import Message
from vl2.runtime import GenerationOptions, Model, open_bundle

OPTIONS = GenerationOptions(max_new_tokens=10, ignore_eos=True, prefill_chunk=200)
SYSTEM = Message("system", "You read drawings, tables and forms. Say what stands there and nothing else.")


@pytest.fixture(scope="module", params=["tiny-mini", "small-mini", "tiny-mini cpu", "small-mini cpu"])
def bundle(request, goldens: Path, bundle_of, quantized_of) -> Path:
    """The bundles that other tests make too."""
    name, *lowering = request.param.split()
    if not lowering:
        return bundle_of(goldens / name)
    if operators.library_path()[0] is None:
        pytest.skip("the operator library was not built")
    if name == "tiny-mini":
        return bundle_of(goldens / name, "fp16", "cpu")
    return bundle_of(quantized_of(goldens / name, "int4"), None, "cpu")


def test_conversations_with_a_common_beginning_answer_as_fresh_ones(bundle: Path, goldens: Path) -> None:
    model = open_bundle(bundle)
    image = goldens / "images" / "sq_384x384.png"
    begun = [[SYSTEM, Message("user", f"<image>\n{question}", [image])]
             for question in ("What is shown on this page, and where does it stand?", "Why?")]
    first, other = (model.complete(messages, OPTIONS).read() for messages in begun)
    gone_on = [*begun[0], Message("assistant", first.text, token_ids=first.token_ids), Message("user", "And now?")]
    second = model.complete(gone_on, OPTIONS).read()
    assert other.reused_tokens > 400 and other.image_cache_hits == 1 and first.reused_tokens == 0
    assert second.reused_tokens == first.prompt_tokens + len(first.token_ids) - 1
    assert all(len(context._contents) == context.length for context in model._contexts._idle)
    fresh = Model(model.engine, 0)
    for messages, answer in ((begun[0], first), (begun[1], other), (gone_on, second)):
        expected = fresh.complete(messages, OPTIONS).read()
        assert (expected.token_ids, expected.reused_tokens) == (answer.token_ids, 0)
