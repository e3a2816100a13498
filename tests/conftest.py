"""Fixtures for the whole suite. Imports no torch: the runtime's tests run where it is absent."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A shared machine stalls at times; a deadline would measure its neighbours.
settings.register_profile("vl2", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vl2")

GOLDENS = Path(__file__).parent / "goldens"
MINI_CHECKPOINTS = ("tiny-mini", "small-mini", "base-mini")
NANO = Path(__file__).parents[1] / "nano" / "checkpoint"


# Begun first, in this order, each of some 30 s of a core: begun last, one would be all that a worker waits for.
LONGEST = ("test_calibrated.py", "test_readme.py", "test_budget.py", "test_packaging.py", "test_engine_answers.py",
           "test_quantized_bundle.py", "test_bundle.py", "test_cpu_lowering.py", "test_quantization_verbs.py",
           "test_cli.py", "test_family.py", "test_examples.py", "test_oldest_python.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def _traces_of_all_workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Only where the exporter is imported already: tests of the device half run without torch."""
    if hasattr(request.config, "workerinput") and "vl2.export.assemble" in sys.modules:
        from tests.shared_traces import share_traces

        share_traces(_shared_folder(request, tmp_path_factory) / "traces")


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
