"""Adds the CUDA extension as QFORMER_FAST_EXT says: "1" builds it or fails, "0" leaves it out, and without a word it is
built if torch, nvcc and CUTLASS's headers are in the build environment.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup


def extension() -> dict:
    wish = os.environ.get("QFORMER_FAST_EXT", "auto")
    if wish == "0":
        return {}
    missing = _missing()
    if missing:
        if wish == "1":
            sys.exit(f"QFORMER_FAST_EXT=1, but {missing}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    # compute capability 9.0's own instructions: wgmma and TMA
    os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0a"
    module = CUDAExtension(
        "qformer_fast._C",
        sorted(str(path) for pattern in ("*.cpp", "*.cu") for path in Path("csrc").glob(pattern)),
        include_dirs=[str(_cutlass())],
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("USE_CUDA", None)],
        extra_compile_args={
            "cxx": ["-O3"],
            "nvcc": ["-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-diag-suppress=2908"],
        },
    )
    shared = ("cudart", "c10", "c10_cuda")
    module.libraries = [name for name in module.libraries if name not in shared] + ["cudart_static", "rt", "dl"]
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def _missing() -> str | None:
    """What the extension needs and the build environment lacks."""
    home = _cuda_home()
    if home is None:
        return "there is no CUDA toolkit: put nvcc on the PATH or set CUDA_HOME"
    os.environ["CUDA_HOME"] = str(home)
    try:
        import torch
    except ImportError as error:
        return f"torch can't be imported ({error}): install with --no-build-isolation"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if _cutlass() is None:
        return "CUTLASS's headers are missing: pip install --no-deps nvidia-cutlass, or set CUTLASS_PATH"
    return None


def _cuda_home() -> Path | None:
    """The toolkit's folder; unlike torch's guess not that of a link or a script named nvcc."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    return next((Path(home) for home in homes if home and Path(home, "include/cuda_runtime.h").exists()), None)


def _cutlass() -> Path | None:
    """The include folder of CUTLASS_PATH or of the package nvidia-cutlass."""
    roots = [Path(os.environ["CUTLASS_PATH"])] if "CUTLASS_PATH" in os.environ else []
    package = importlib.util.find_spec("cutlass_library")
    if package is not None:
        roots.append(Path(package.submodule_search_locations[0]) / "source")
    return next((root / "include" for root in roots if (root / "include/cutlass/cutlass.h").exists()), None)


setup(**extension())
