"""Build of the optional C kernels; everything else about the package is in pyproject.toml.

They are loaded with ctypes, not imported, and without a compiler the package installs and runs on torch alone.
"""

from setuptools import Extension, setup

setup(
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
    ]
)
