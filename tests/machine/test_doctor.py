"""`vl2 doctor`: checks are performed, failures are said with their mend, the exit code follows what is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vl2.machine import gpu, jetson, packages, system
from vl2.machine.check import FAILED, MISSING, OK, Check, able
from vl2.machine.interpreter import attempt

HIDE = "import sys, importlib.abc\nclass Hide(importlib.abc.MetaPathFinder):\n def find_spec(self, name, *rest):\n" \
       "  if name.split('.')[0] == {name!r}: raise ImportError('hidden by a test')\nsys.meta_path.insert(0, Hide())\n"


def doctor(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    code = before + "import sys; from vl2.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, "doctor", *arguments], capture_output=True, text=True)


def test_here_bundles_can_be_run_and_each_line_says_how_it_is() -> None:
    done = doctor("--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["able"] and {check["status"] for check in told["checks"]} <= {OK, MISSING, FAILED}
    by_name = {check["name"]: check for check in told["checks"]}
    assert {by_name[name]["status"] for name in ("onnxruntime on the CPU", "numpy", "export")} == {OK}
    assert all(check["mend"] is None for check in told["checks"] if check["status"] == OK)
    assert {"memory", "cores", "disk"} <= by_name.keys()


@pytest.mark.parametrize("name", ["tokenizers", "onnxruntime"])
def test_a_missing_package_of_the_base_is_named_with_its_command_and_ends_in_1(name: str) -> None:
    done = doctor(before=HIDE.format(name=name))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"FAILED {name}: ImportError: hidden by a test" in done.stdout
    assert f"-m pip install -U '{name}>=" in done.stdout and done.stdout.endswith("bundles cannot be run here\n")


def test_only_what_is_required_decides() -> None:
    optional = Check("GPU", "driver", FAILED, "", None)
    assert able([Check("base", "numpy", OK, "", None, True), optional])
    assert not able([Check("base", "numpy", FAILED, "", None, True), optional])


def test_an_old_package_is_told_from_a_new_one(monkeypatch) -> None:
    monkeypatch.setattr(packages.metadata, "requires", lambda name: ["numpy>=99.1", "torch>=2.9; extra == \"export\""])
    assert packages.requirements("export") == {"torch": "2.9"}
    (check,) = packages.check_base_packages()
    assert (check.status, check.required) == (FAILED, True) and "is older than 99.1" in check.detail
    assert check.mend.endswith("'numpy>=99.1'")


def test_sources_that_are_not_installed_are_said(monkeypatch) -> None:
    monkeypatch.setattr(packages, "DISTRIBUTION", "vl2-nowhere")
    (check,) = packages.check_base_packages()
    assert (check.status, check.required) == (FAILED, True) and "pip install ." in check.mend


def test_what_crashes_or_hangs_elsewhere_is_an_answer() -> None:
    assert attempt("print('first'); print('last')") == ("last", "")
    assert attempt("raise ValueError('so')") == (None, "ValueError: so")
    assert attempt("import os; os.abort()")[1].startswith("the process ended with code")
    assert attempt("import time; time.sleep(60)", timeout_s=0.5) == (None, "no answer within 0 s")


def test_little_memory_and_disk_are_missing_not_failed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "available_bytes", lambda: 1e9)
    memory, cores, disk = system.check_system(tmp_path)
    assert (memory.status, cores.status) == (MISSING, OK) and "1.0 GB of" in memory.detail and memory.mend
    assert disk.name == "disk"


def test_a_gpu_without_a_driver_is_a_failure_and_no_gpu_is_none(monkeypatch, tmp_path: Path) -> None:
    def absent():
        raise gpu.DriverError("there is no CUDA driver")

    monkeypatch.setattr(gpu, "find_gpus", absent)
    monkeypatch.setattr(gpu, "_PCI", tmp_path)
    (check,) = gpu.check_gpu()
    assert check.status == MISSING and check.mend is None
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030000\n")
    (check,) = gpu.check_gpu()
    assert check.status == FAILED and "apt install nvidia-driver" in check.mend


def test_jetpack_follows_from_the_release_of_the_board(monkeypatch, tmp_path: Path) -> None:
    release = jetson.l4t_release("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64")
    assert release == "36.4.3" and jetson.jetpack_of(release) == "6.2"
    assert [jetson.jetpack_of(text) for text in ("36.4.0", "36.4", "39.2.0", "35.6.0", "")] == ["6.1", "6.2", "7.2",
                                                                                               None, None]
    assert list(jetson.check_jetson()) == [] or jetson.is_jetson()
    (tmp_path / "release").write_text("# R39 (release), REVISION: 2.0, GCID: 1")
    monkeypatch.setattr(jetson, "RELEASE_FILE", tmp_path / "release")
    monkeypatch.setattr(jetson, "is_jetson", lambda: True)
    monkeypatch.setattr(jetson.shutil, "which", lambda name: None)
    found = {check.name: check for check in jetson.check_jetson()}
    assert found["JetPack"].status == OK and "JetPack 7.2" in found["JetPack"].detail
    assert found["power mode"].status == MISSING and "cu130" in jetson.wheel_index()
