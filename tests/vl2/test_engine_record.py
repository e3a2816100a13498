"""An engine is for one GPU, one TensorRT and one set of plugins; each other is told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vl2.engine_record import EngineHost, EngineRecord, check_engines
from vl2.errors import VL2Error
from vl2.json_file import from_json, to_json

RECORD = EngineRecord("tensorrt-rtx", "1.7.1.116", "8.6", "a" * 64, {"context": 4096}, {"vision": []},
                      {"vision": "vision.rtx-3060.engine"}, {"vision": {"seconds": 3.0}})  # fmt: skip
HOST = EngineHost("tensorrt-rtx", "1.7.1.116", "8.6", "a" * 64)


def test_engines_run_where_everything_is_as_they_were_built() -> None:
    check_engines("rtx-3060", RECORD, HOST)


@pytest.mark.parametrize("change, told", [
    ({"compute_capability": "8.9"}, "built for compute capability 8.6, and here it is 8.9"),
    ({"version": "1.6.1.0"}, "built for version 1.7.1.116, and here it is 1.6.1.0"),
    ({"backend": "tensorrt"}, "built for backend tensorrt-rtx, and here it is tensorrt"),
    ({"kernels": "b" * 64}, "need plugins of the sources aaaaaaaaaaaa, and this vl2 has bbbbbbbbbbbb"),
])  # fmt: skip
def test_an_engine_of_another_gpu_version_or_plugin_is_refused(change: dict, told: str) -> None:
    with pytest.raises(VL2Error, match=told) as caught:
        check_engines("rtx-3060", RECORD, replace(HOST, **change))
    assert "vl2 engine BUNDLE" in caught.value.hint


def test_a_record_survives_the_manifest() -> None:
    assert from_json(EngineRecord, to_json(RECORD), "record") == RECORD
