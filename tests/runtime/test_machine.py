"""What the runtime finds out about the machine: memory, cores, onnxruntime packages."""

import math
from pathlib import Path

import pytest

from vl2 import cgroup, memory
from vl2.errors import VL2Error
from vl2.runtime import cores
from vl2.runtime.providers import CPU, CUDA, choose

BOTH = frozenset({"onnxruntime", "onnxruntime-gpu"})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    (tmp_path / "meminfo").write_text("MemTotal:  8000 kB\nMemAvailable:    5000 kB\nHugePages_Total:  0\n")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def test_the_system_says_how_much_memory_is_available(machine: Path) -> None:
    assert memory.available_bytes() == 5000 * 1024


def test_a_containers_limit_counts_and_its_file_pages_are_free(machine: Path) -> None:
    (machine / "cgroup" / "memory.max").write_text("3000000\n")
    (machine / "cgroup" / "memory.current").write_text("2500000\n")
    (machine / "cgroup" / "memory.stat").write_text("anon 500000\nfile 1900000\n")
    assert memory.available_bytes() == 3000000 - 2500000 + 1900000


def test_the_limit_of_a_service_counts_though_the_root_has_none(machine: Path) -> None:
    folder = machine / "cgroup" / "system.slice" / "vl2.service"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("2000000\n")
    (folder / "memory.current").write_text("500000\n")
    (machine / "membership").write_text("0::/system.slice/vl2.service\n")
    assert memory.available_bytes() == 1500000
    (folder.parent / "memory.max").write_text("1000000\n")
    (folder.parent / "memory.current").write_text("600000\n")
    assert memory.available_bytes() == 400000


@pytest.mark.parametrize("membership", ["0::/\n", "0::/../other\n", "", "4:memory:/x\n"])
def test_a_group_that_is_not_visible_leaves_the_root(machine: Path, membership: str) -> None:
    (machine / "membership").write_text(membership)
    assert cgroup.folders() == [machine / "cgroup"]


def test_the_older_container_files_are_read_too(machine: Path) -> None:
    folder = machine / "cgroup" / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    (folder / "memory.usage_in_bytes").write_text("400000\n")
    (folder / "memory.stat").write_text("cache 1\ntotal_cache 300000\n")
    assert memory.available_bytes() == 900000


def test_a_container_without_limit_leaves_the_systems_word(machine: Path) -> None:
    (machine / "cgroup" / "memory.max").write_text("max\n")
    (machine / "cgroup" / "memory.current").write_text("1\n")
    assert memory.available_bytes() == 5000 * 1024


def test_a_system_that_says_nothing_refuses_nothing(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.available_bytes() == math.inf
    memory.require_memory(10 ** 15, "a planet")


def test_too_little_memory_is_told_with_both_figures(machine: Path) -> None:
    with pytest.raises(VL2Error, match=r"the weights needs 6\.00 GB of memory, 0\.01 GB are available") as error:
        memory.require_memory(6 * 10 ** 9, "loading the weights")
    assert "check_memory=False" in error.value.hint


def test_the_peak_is_read_from_the_system_or_from_the_process(machine: Path) -> None:
    (machine / "status").write_text("Name:\tpython\nVmHWM:\t    1234 kB\n")
    assert memory.peak_rss_bytes() == 1234 * 1024
    (machine / "status").unlink()
    assert memory.peak_rss_bytes() > 1 << 20


@pytest.fixture
def processor(tmp_path: Path, monkeypatch) -> Path:
    """Four logical CPUs on two cores."""
    monkeypatch.setattr(cores, "_CPUS", tmp_path)
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    return tmp_path


def test_hardware_threads_of_one_core_count_once(processor: Path) -> None:
    assert cores.physical_cores() == 2


def test_affinity_and_quota_lower_the_count(processor: Path, monkeypatch) -> None:
    (processor / "cpu.max").write_text("150000 100000\n")
    assert cores.physical_cores() == 2
    (processor / "cpu.max").write_text("50000 100000\n")
    assert cores.physical_cores() == 1
    (processor / "cpu.max").write_text("max 100000\n")
    assert cores.physical_cores() == 2
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    assert cores.physical_cores() == 1


def test_cpus_without_topology_count_each(processor: Path, monkeypatch) -> None:
    monkeypatch.setattr(cores, "_CPUS", processor / "none")
    assert cores.physical_cores() == 4


def test_cuda_is_taken_where_it_is_offered_and_not_declined() -> None:
    assert choose("auto", [CUDA, CPU], BOTH).providers == (CUDA, CPU)
    assert choose("cuda", [CUDA, CPU], frozenset({"onnxruntime-gpu"})).providers == (CUDA, CPU)
    assert choose("cpu", [CUDA, CPU], BOTH).providers == (CPU,)


def test_two_packages_that_hide_each_other_are_named() -> None:
    choice = choose("auto", [CPU], BOTH)
    assert choice.providers == (CPU,)
    assert "both installed" in choice.note and "pip uninstall onnxruntime onnxruntime-gpu" in choice.note


def test_the_cpu_package_alone_needs_no_note() -> None:
    assert choose("auto", [CPU], frozenset({"onnxruntime"})).note == ""


@pytest.mark.parametrize("installed, reason", [
    (BOTH, "both installed"), (frozenset({"onnxruntime"}), "is not installed"),
    (frozenset({"onnxruntime-gpu"}), "has no CUDA provider")])
def test_cuda_that_was_asked_for_and_is_missing_is_an_error(installed: frozenset, reason: str) -> None:
    with pytest.raises(VL2Error, match=f"CUDA was asked for, but .*{reason}") as error:
        choose("cuda", [CPU], installed)
    assert "pip install onnxruntime-gpu" in error.value.hint
