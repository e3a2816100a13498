"""The hash that engines are refused by covers what they depend on."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from vl2.plugins.cuda import pack
from vl2.plugins.tensorrt import operators, plugin, sources


def changed(monkeypatch: pytest.MonkeyPatch, path: Path, folder: Path) -> str:
    """The hash if this source had one more line."""
    other = folder / path.name
    other.write_text(path.read_text() + "\n")
    monkeypatch.setattr(sources, "SOURCES", tuple(other if each == path else each for each in sources.SOURCES))
    return sources.plugin_hash.__wrapped__()


@pytest.mark.parametrize("name", ["launch.py", "attention.py", "experts.py", "operators.py", "plugin.py"])
def test_engines_of_other_launch_plans_or_fields_have_another_hash(name: str, monkeypatch, tmp_path: Path) -> None:
    path, before = next(path for path in sources.SOURCES if path.name == name), sources.plugin_hash()
    assert changed(monkeypatch, path, tmp_path) != before


def test_compiled_kernels_are_kept_when_only_a_plan_changes(monkeypatch, tmp_path: Path) -> None:
    before = pack.pack_hash(), sources.plugin_hash()
    other = changed(monkeypatch, sources.SOURCES[0], tmp_path)
    assert pack.pack_hash() == before[0] and other not in before


def test_every_module_of_the_plans_is_covered() -> None:
    """Those that the operators import, and those that these import of plugins/cuda."""
    seen: set[Path] = set()
    todo = [Path(operators.__file__), Path(plugin.__file__)]
    while todo:
        path = todo.pop().resolve()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vl2.plugins.cuda."):
                found = path.parents[1] / "cuda" / f"{node.module.rpartition('.')[2]}.py"
                todo += [found] if found.resolve() not in seen else []
    assert seen == {path.resolve() for path in sources.SOURCES}
