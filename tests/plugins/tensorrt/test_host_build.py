"""Engines that TensorRT-RTX builds with the plugins of the C++ host are those of the Python host.

An engine of one node is equal byte for byte, and so are types, shapes, formats, aliases, scratch and fields. Of larger
graphs no two builds are: parts lie in another order from process to process. There sizes and plugins' fields are equal.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.plugins.tensorrt.conftest import LINEAR, LINEAR_INPUTS, published_decoder
from tests.plugins.tensorrt.played_host import compile_test_host
from tests.plugins.tensorrt.test_build import TOKENS
from tests.plugins.tensorrt.test_operators import EXPERTS
from tests.plugins.tensorrt.test_serialized_fields import INPUTS, begin_of, kinds_of, serialized_fields
from tests.plugins.tensorrt.test_serialized_fields import TOKENS as EXPERTS_TOKENS
from vl2.errors import VL2Error
from vl2.manifest import read_manifest
from vl2.plugins.tensorrt.build import EngineJob, build_apart
from vl2.plugins.tensorrt.engines import EngineSizes, profiles
from vl2.plugins.tensorrt.host import main
from vl2.plugins.tensorrt.operators import OPERATORS

NANO = Path(__file__).parents[3] / "nano/checkpoint"
SIZES = EngineSizes(context=512, prefill_chunk=128, tiles=4)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on this machine")
    return str(compile_test_host(tmp_path_factory.mktemp("library"), "sm_89"))


def both_engines(job: EngineJob, library: str) -> tuple[bytes, bytes]:
    """Of the Python and of the C++ host."""
    build_apart(job)
    first = Path(job.out).read_bytes()
    build_apart(replace(job, plugin_library=library))
    return first, Path(job.out).read_bytes()


def plugins_in(rtx: str, engine: bytes) -> list[tuple]:
    """The fields of every plugin, in an order of their own; of attentions the bytes that hold them: what has aliased
    outputs stands in another part of an engine, as name, version, namespace, number of fields, fields."""
    found, kinds = [], kinds_of(rtx)
    for name in ("Experts", "Linear"):
        fields = OPERATORS[name].attributes
        places = [place.start() for place in re.finditer(re.escape(begin_of(next(iter(fields)))), engine)]
        given = [serialized_fields(engine, place, len(fields), kinds) for place in places]
        found += [(name, *each.items()) for each in given if each.keys() == fields.keys()]
    places = [place.start() for place in re.finditer(rb"(Latent)?Attention\x13\x80\x01\0", engine)]
    return sorted(found) + sorted(("Attention", engine[place:place + 192]) for place in places)


def test_a_layer_of_all_forms_builds_to_the_same_bytes(rtx: str, one_node, library: str) -> None:
    path = one_node("Experts", EXPERTS, INPUTS)
    python, cpp = both_engines(EngineJob(path, f"{path}.engine", rtx, ("8.9",), EXPERTS_TOKENS), library)
    assert python == cpp


def check_alike(rtx: str, python: bytes, cpp: bytes) -> None:
    plugins = plugins_in(rtx, python)
    assert len(python) == len(cpp) and plugins == plugins_in(rtx, cpp)
    assert {"Experts", "Attention"} <= {name for name, *_ in plugins}
    assert all(b"scale" in fields and b"FP32" in fields for name, fields, *_ in plugins if name == "Attention")


def test_the_decoder_of_nano_builds_with_the_same_plugins(rtx: str, bundle_of, library, tmp_path) -> None:
    bundle = bundle_of(NANO, "fp16", "trt")
    graph = read_manifest(bundle).graphs["decoder"]
    ranges = profiles("decoder", graph, SIZES)
    job = EngineJob(str(bundle / graph.file), str(tmp_path / "engine"), rtx, ("8.9",), ranges)
    python, cpp = both_engines(job, library)
    check_alike(rtx, python, cpp)


@pytest.mark.parametrize("variant", ["tiny", "small"])
def test_a_layer_of_published_size_builds_with_the_same_plugins(rtx: str, library, tmp_path, variant: str) -> None:
    python, cpp = both_engines(published_decoder(tmp_path, variant, "int4", rtx), library)
    check_alike(rtx, python, cpp)


@pytest.mark.parametrize("attributes, inputs, told", [
    ({**LINEAR, "group_size": 24}, LINEAR_INPUTS, "groups of 24 in rows of 128"),
    (LINEAR, {**LINEAR_INPUTS, "weight_scale": ("float32", [64, 4])},
     "input 2 of vl2::Linear, `weight_scale`, is float32, expected float16"),
    ({name: LINEAR[name] for name in ("N", "K", "scheme")}, LINEAR_INPUTS, "no attribute `group_size`"),
])  # fmt: skip
def test_what_the_cpp_host_refuses_ends_the_build_in_its_words(rtx, one_node, library, attributes, inputs, told):
    path = one_node("Linear", attributes, inputs)
    with pytest.raises(VL2Error) as caught:
        build_apart(EngineJob(path, f"{path}.engine", rtx, ("8.9",), TOKENS, plugin_library=library))
    assert told in caught.value.message and caught.value.hint


def test_a_library_that_is_none_is_named(rtx: str, one_node, tmp_path: Path) -> None:
    path = one_node("Linear", LINEAR, LINEAR_INPUTS)
    for library in (tmp_path / "absent.so", Path(path)):
        with pytest.raises(VL2Error, match=library.name):
            build_apart(EngineJob(path, f"{path}.engine", rtx, ("8.9",), TOKENS, plugin_library=str(library)))


def test_without_headers_the_command_says_where_it_looked(tmp_path: Path, capsys) -> None:
    assert main(["sm_87", "--headers", str(tmp_path), "--out", str(tmp_path / "made.so")]) == 1
    said = capsys.readouterr().err
    assert f"no NvInfer.h in {tmp_path}" in said and "libnvinfer-headers-dev" in said
