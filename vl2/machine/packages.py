"""Python and the packages of vl2: installed, new enough, and really importable."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata

from vl2.machine.check import FAILED, MISSING, OK, Check
from vl2.machine.interpreter import attempt

DISTRIBUTION = "vl2-edge"
_OLDEST_PYTHON = (3, 10)
_RUNTIMES = {"onnxruntime", "onnxruntime-gpu"}
_IMPORTED = {"pillow": "PIL", "onnxruntime-gpu": "onnxruntime"}
_REQUIREMENT = re.compile(r"([\w.-]+)\s*>=\s*([\d.]+)\s*(?:;\s*extra\s*==\s*['\"](\w+)['\"])?$")
_UNKNOWN = "?"
REMOVE = "pip uninstall -y onnxruntime onnxruntime-gpu"
SWAP = f"{REMOVE} && pip install 'onnxruntime-gpu[cuda,cudnn]'"
_EXTRAS = {"export": "making bundles", "report": "the plots of `vl2 compare`", "serve": "`vl2 serve`",
           "constrained": "--boxes, --regex, --json-schema"}


def check_python() -> Iterator[Check]:
    """Version of the interpreter."""
    oldest = ".".join(map(str, _OLDEST_PYTHON))
    fits = sys.version_info[:2] >= _OLDEST_PYTHON
    yield Check("base", "Python", OK if fits else FAILED, f"{platform.python_version()} on {platform.machine()}",
                None if fits else f"install Python {oldest} or newer, and vl2-edge with it", required=True)


def check_base_packages() -> Iterator[Check]:
    """Imports each package that running a bundle needs, and compares its version with what vl2 asks for."""
    if _version(DISTRIBUTION) == _UNKNOWN:
        yield Check("base", DISTRIBUTION, FAILED, "not installed as a package, so what it needs is not known",
                    "pip install .   (in the folder of vl2's sources)", required=True)
    for name, oldest in requirements(None).items():
        provider = _provider(name)
        mend = f"{sys.executable} -m pip install -U '{provider}>={oldest}'"
        try:
            importlib.import_module(_IMPORTED.get(provider, provider))
            version = metadata.version(provider)
        except Exception as error:  # a broken package raises whatever it likes
            yield Check("base", name, FAILED, f"{type(error).__name__}: {error}", mend, required=True)
            continue
        fits = _parts(version) >= _parts(oldest)
        yield Check("base", provider, OK if fits else FAILED, version if fits else f"{version} is older than {oldest}",
                    None if fits else mend, required=True)
    if _runtimes() == _RUNTIMES:
        yield Check("base", "one onnxruntime", FAILED, "onnxruntime and onnxruntime-gpu overwrite each other",
                    SWAP, required=True)


def check_extras() -> Iterator[Check]:
    """Imports the packages of each extra in another process, as torch is large."""
    for extra, purpose in _EXTRAS.items():
        names = list(requirements(extra))
        modules = [_IMPORTED.get(name, name).replace("-", "_") for name in names]
        _, error = attempt("\n".join(f"import {module}" for module in modules))
        told = ", ".join(f"{name} {_version(name)}" for name in names)
        mend = f"{sys.executable} -m pip install '.[{extra}]'   (in the folder of vl2's sources)"
        yield Check("extras", extra, MISSING if error else OK, f"{purpose}: {error or told}",
                    mend if error else None)


def requirements(extra: str | None) -> dict[str, str]:
    """Package → oldest version, of the base or of one extra, as the installed vl2-edge says."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        lines = []
    found = (_REQUIREMENT.match(line) for line in lines)
    return {match[1]: match[2] for match in found if match and match[3] == extra}


def _provider(name: str) -> str:
    """onnxruntime-gpu gives the same module as onnxruntime."""
    return "onnxruntime-gpu" if name == "onnxruntime" and _runtimes() == {"onnxruntime-gpu"} else name


def _runtimes() -> set[str]:
    """Not `vl2.runtime.providers`: vl2.runtime cannot be imported where a package is missing."""
    return {name for name in _RUNTIMES if _version(name) != _UNKNOWN}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return _UNKNOWN


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
