"""What the workstation half and the device half of vl2 must agree on. Imports neither torch nor a backend."""

from pathlib import Path

__version__ = "0.1.0"

# A Python started in the source tree finds this folder before what is installed; its other packages lie beside it.
_TREE = Path(__file__).parents[1]
if (_TREE / "pyproject.toml").is_file() and (_TREE / "runtime" / "__init__.py").is_file():
    __path__.append(str(_TREE))
