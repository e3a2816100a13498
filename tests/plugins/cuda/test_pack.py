"""The pack compiles for every architecture without spills; what stands in its way is said."""

from __future__ import annotations

import re

import pytest

from vl2.errors import VL2Error
from vl2.plugins.cuda import nvrtc, pack
from vl2.plugins.cuda.attention import AttentionProblem, attention_plan
from vl2.plugins.cuda.experts import ExpertsProblem, experts_plan
from vl2.plugins.cuda.latent import LatentProblem, latent_plan
from vl2.plugins.cuda.linear import LinearProblem, linear_plan
from vl2.plugins.cuda.routing import RoutingProblem
from vl2.plugins.cuda.storage import Storage

LOG = """ptxas info    : Compiling entry function 'vl2_sort' for 'sm_87'
ptxas info    : Function properties for vl2_sort
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 396 bytes cmem[0]
ptxas info    : Compiling entry function 'vl2_route' for 'sm_87'
ptxas info    : Function properties for vl2_route
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 39 registers, used 0 barriers, 412 bytes cmem[0]
"""


def kernels_of_plans() -> set[str]:
    """Every kernel that some plan names."""
    plans = []
    for scheme in ("int4", "int8", "fp16"):
        storage = Storage(scheme, 32)
        for tokens in (1, 64):
            problem = ExpertsProblem(RoutingProblem(tokens, 8, 2), 64, 64, 64, *[storage] * 4)
            plans += [experts_plan(problem), linear_plan(LinearProblem(tokens, 64, 64, storage))]
    plans.append(latent_plan(LatentProblem(1, 16, 1, 512, 64, 4096, 1.0)))
    plans.append(attention_plan(AttentionProblem(1, 10, 10, 1, 128, 4096, 1.0)))
    return {launch.kernel for plan in plans for launch in plan.launches}


@pytest.mark.parametrize("arch", pack.ARCHITECTURES)
def test_every_kernel_compiles_without_spills(arch: str) -> None:
    if pack.find_nvcc() is None:
        pytest.skip("nvcc is not on this machine")
    if arch != "sm_87" and not pack.is_cached(arch):
        pytest.skip(f"not compiled for {arch} yet, which takes 20 s: python -m vl2.plugins.cuda.pack {arch}")
    made = pack.load(arch)
    if arch.startswith("compute"):
        names = set(re.findall(rb"\.entry (\w+)", made.image))
        assert {name.decode() for name in names} == kernels_of_plans() and made.image.endswith(b"\0")
    else:
        assert {one.kernel for one in made.resources} == kernels_of_plans()
        assert made.image.startswith(b"\x7fELF")


def test_every_kernel_is_emulated(emulator) -> None:
    text = "".join((pack.FOLDER.parent / name).read_text() for name in pack.SOURCES)
    exported = set(re.findall(r"^(?:EXPORT\(|[A-Z_]+\(\d+, )(vl2_\w+)\)", text, re.M))
    assert exported == kernels_of_plans()


def test_registers_and_spills_are_read_from_the_compilers_words() -> None:
    assert pack.read_resources(LOG) == (pack.Resources("vl2_route", 39, 0, 0), pack.Resources("vl2_sort", 40, 8, 16))


def test_a_kernel_that_spills_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pack, "_with_nvcc", lambda *_: (b"\x7fELF", LOG))
    with pytest.raises(VL2Error, match="`vl2_sort` has 16 bytes of spills and 8 of stack on sm_90"):
        pack.load("sm_90", tmp_path, "nvcc")


def test_an_unknown_architecture_is_refused_with_what_there_is() -> None:
    with pytest.raises(VL2Error, match="`sm_75`, expected one of sm_80"):
        pack.load("sm_75")


def test_without_a_compiler_the_way_to_one_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pack, "find_nvcc", lambda: None)
    monkeypatch.setattr(nvrtc, "find_nvrtc", lambda: None)
    with pytest.raises(VL2Error, match="neither nvcc nor NVRTC"):
        pack.load("sm_87", tmp_path)


def test_the_hash_covers_every_source() -> None:
    assert {path.name for path in pack.headers()} >= {"gemv.cuh", "gemm.cuh", "attend.cuh"}
    assert re.fullmatch(r"[0-9a-f]{64}", pack.pack_hash())


def test_nvrtc_makes_a_cubin_and_ptx_and_tells_of_registers(tmp_path, monkeypatch) -> None:
    library = nvrtc.find_nvrtc()
    if library is None:
        pytest.skip("NVRTC is not on this machine (pip install nvidia-cuda-nvrtc-cu12==12.6.77)")
    monkeypatch.setattr(pack, "SOURCES", ("experts/routing.cu",))
    made = pack.load("sm_87", tmp_path, library)
    assert [one.kernel for one in made.resources] == ["vl2_route", "vl2_sort"]
    assert made.image.startswith(b"\x7fELF")
    assert b".target sm_80" in pack.load("compute_80", tmp_path, library).image
    monkeypatch.setattr(pack, "FLAGS", ("--no-such-option",))
    with pytest.raises(VL2Error, match="no-such-option"):
        pack.load("sm_87", tmp_path / "other", library)
