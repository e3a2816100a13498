"""Fixtures for the whole suite. Imports no torch: the runtime's tests run where it is absent."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# A shared machine stalls at times; a deadline would measure its neighbours.
settings.register_profile("vl2", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vl2")

GOLDENS = Path(__file__).parent / "goldens"
MINI_CHECKPOINTS = ("tiny-mini", "small-mini", "base-mini")
NANO = Path(__file__).parents[1] / "nano" / "checkpoint"


# Tests that export go to one worker, which traces each kind of layer once.
EXPORTING = ("test_budget.py", "test_convert_verb.py", "test_quantization_verbs.py", "test_engine_verb.py",
             "test_verb.py", "test_nano.py", "test_bench.py", "test_room.py", "test_build.py", "test_engine_answers.py",
             "test_engine_choice.py")  # fmt: skip
# Few tests, each of minutes or nearly: begun last, they would be all that a second worker waits for.
LONGEST = ("test_readme.py", "test_packaging.py", "test_calibrated.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    items.sort(key=lambda item: (not _exports(item.path), item.path.name not in LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of a file on one worker, and all that export on one. xdist's own groups (3.8) are lost in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.partition("::")[0])
            return "exports" if _exports(path) else str(path)

    return Files(config, log)


def _exports(path: Path) -> bool:
    return path.parent.name == "export" or path.name in EXPORTING


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The recorded data of the original implementation; its README tells the layout."""
    return GOLDENS


@pytest.fixture(scope="session", params=MINI_CHECKPOINTS)
def mini_folder(request: pytest.FixtureRequest) -> Path:
    """Each miniature checkpoint in turn."""
    return GOLDENS / request.param


@pytest.fixture(scope="session")
def bundle_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`bundle_of(checkpoint, scheme="fp32", lowering=None)`: the bundle, exported once for all tests and all parallel
    workers; scheme None for a quantized checkpoint."""
    root = _shared_folder(request, tmp_path_factory)

    def export_once(checkpoint: Path, scheme: str | None = "fp32", lowering: str | None = None) -> Path:
        stem = checkpoint.parent.name if checkpoint.name == "checkpoint" else checkpoint.name
        name = f"{stem}-{scheme}-{lowering}.bundle"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                from vl2.export import ExportOptions, export_checkpoint

                export_checkpoint(checkpoint, root / name, ExportOptions(scheme, lowering=lowering))
        return root / name

    return export_once


def _shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp()
    return root.parent if hasattr(request.config, "workerinput") else root


@pytest.fixture(scope="session")
def quantized_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized_of(checkpoint, recipe)`: rounded to nearest, vision, head and embeddings INT8 as well; made once."""
    root = _shared_folder(request, tmp_path_factory)

    def quantize_once(checkpoint: Path, recipe: str) -> Path:
        name = f"{checkpoint.parent.name if checkpoint.name == 'checkpoint' else checkpoint.name}-{recipe}.quantized"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / name).exists():
                from vl2.quant.quantizer import QuantizeOptions, quantize_checkpoint
                from vl2.quant.recipe import OuterParts

                outer = OuterParts(vision="int8", lm_head="int8", embeddings="int8")
                quantize_checkpoint(checkpoint, root / name, QuantizeOptions(recipe, outer, "rtn"))
        return root / name

    return quantize_once


@pytest.fixture(scope="session")
def nano_bundle(bundle_of: Callable[..., Path]) -> Path:
    """The fp32 bundle of the shipped vl2-nano."""
    return bundle_of(NANO)
