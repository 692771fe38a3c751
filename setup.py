"""Build `nudging._C` with CMake and map the folders engine/ and kernels/ to nudging and nudging.kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake project, one module; pybind11 comes from the build environment, torch is never linked."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("nudging: cmake (>= 3.25) was not found on PATH; install it, e.g. `pip install cmake`")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / ext.name
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        options = [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        if shutil.which("ninja"):
            options.append("-GNinja")
        options += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        subprocess.check_call([cmake, str(ROOT), *options], cwd=work)
        subprocess.check_call([cmake, "--build", ".", "-j", jobs], cwd=work)
        if not target.exists():
            sys.exit(f"nudging: CMake finished but {target} was not built")


PACKAGES = (
    ["nudging", "nudging.kernels"]
    + [f"nudging.{name}" for name in find_packages("engine")]
    + [f"nudging.kernels.{name}" for name in find_packages("kernels")]
)

setup(
    package_dir={"nudging": "engine", "nudging.kernels": "kernels"},
    packages=PACKAGES,
    package_data={"nudging": ["py.typed", "*.pyi"], "nudging.pocket": ["*.jsonl", "*.md", "*/*"]},
    ext_modules=[Extension("nudging._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    zip_safe=False,
)
