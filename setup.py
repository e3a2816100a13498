"""Builds the operator library of `plugins/` where a C++ compiler is at hand; everything else is in pyproject.toml.

The library holds no Python: it is one file for all Python versions, so the wheel is tagged py3-none-PLATFORM. Without a
compiler the wheel is py3-none-any and the runtime says that the library is absent.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "vl2.libvl2_ops"
SOURCES = sorted(path.as_posix() for path in Path("plugins").glob("*/*.cc"))
HEADERS = sorted(path.as_posix() for path in Path("plugins").glob("*/*.h"))
SUPPORTED = platform.system() == "Linux" and platform.machine() in ("x86_64", "aarch64")
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-math-errno",
         "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
         *os.environ.get("CXXFLAGS", "").split()]  # the last word is the user's


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        """Compiles the sources side by side: one after another they take about a minute."""
        compile_one = self.compiler.compile

        def compile_all(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return sum(pool.map(lambda source: compile_one([source], **options), sources), [])

        self.compiler.compile = compile_all
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = Path(self.get_finalized_command("build_ext").get_ext_fullpath(NAME)).is_file() if SUPPORTED else False
        if not built:
            return "py3", "none", "any"
        return "py3", "none", super().get_tag()[2]


library = Extension(NAME, SOURCES, include_dirs=["plugins"], depends=HEADERS, extra_compile_args=FLAGS,
                    extra_link_args=["-Wl,--gc-sections", "-Wl,-z,defs"], language="c++", optional=True)
setup(ext_modules=[library] if SUPPORTED and SOURCES else [],
      cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
