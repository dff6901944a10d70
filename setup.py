"""Builds gradprom_ext._C with CMake and ninja. Everything declarative is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_compiler() -> str | None:
    """The C++ compiler CMake would take: $CXX, else the usual names."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name.split()[0]))), None)


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt; setuptools only says where the module goes."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # The build environment of pip is a new folder each time: a cache from the last one points nowhere.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)
        except FileNotFoundError:
            sys.exit("gradprom_ext: cmake was not found; `pip install cmake ninja`, or drop --no-build-isolation")
        except subprocess.CalledProcessError as error:
            sys.exit(f"gradprom_ext: cmake failed with status {error.returncode}; its output is above")


compiler = find_compiler()
if compiler is None:
    print(
        "gradprom_ext: no C++ compiler found, so the kernels are not built and the slow reference is used; "
        "install one (Debian, Ubuntu: apt-get install g++) and run this again",
        file=sys.stderr,
    )
setup(
    ext_modules=[Extension("gradprom_ext._C", sources=[])] if compiler else [],
    cmdclass={"build_ext": CMakeBuild},
)
