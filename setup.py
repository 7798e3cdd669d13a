"""Build of the optional C kernels, and what ships besides code; everything else is in pyproject.toml.

They are loaded with ctypes, not imported, and without a compiler the package installs and runs on torch alone.
"""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

SHIPPED = ("recipes", "data/story-lists", "data/story-policy", "data/story-scorer", "data/formats")
"""Folders beside the package that a wheel holds as align/share; align/shipped.py finds them in either place."""


class BuildWithShipped(build_py):
    """Modules, and copies of the folders that ship; an editable install reads them in place."""

    def run(self) -> None:
        super().run()
        for folder in () if self.editable_mode else SHIPPED:
            shutil.copytree(folder, Path(self.build_lib, "align/share", folder), dirs_exist_ok=True)


setup(
    cmdclass={"build_py": BuildWithShipped},
    ext_modules=[
        Extension(
            "align.kernels.native._kernels",
            sources=["align/kernels/native/kernels.c"],
            depends=[
                "align/kernels/native/scalar.h",
                "align/kernels/native/vector.h",
                "align/kernels/rows/rows.h",
                "align/kernels/sampling/sampling.h",
                "align/kernels/head/gemm.h",
                "align/kernels/head/amx.h",
            ],
            extra_compile_args=["-O3", "-fno-math-errno", "-std=gnu11"],
            libraries=["m", "pthread"],
            optional=True,
        )
    ],
)
