"""What is given to users: the sdist, the wheel without the CUDA extension, and the one with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from qformer_fast import extension

ROOT = Path(__file__).resolve().parents[1]
BUILT = next(Path(extension.__file__).parent.glob("_C*.so"), None)
OWN_FOLDERS = ("bench", "csrc", "examples", "kernels", "qformer_fast", "tests")


def build(folder: Path, *command: str, ext: str = "0") -> None:
    """Runs setuptools in ``folder``, without isolation."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=folder,
        env=os.environ | {"QFORMER_FAST_EXT": ext},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def source_files(folder: Path) -> set[str]:
    """Files of the project's folders, without what building and running leave there."""
    return {
        str(file.relative_to(folder))
        for name in OWN_FOLDERS
        for file in (folder / name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix not in (".pyc", ".so")
    }


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The sdist, made of a copy and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    build(folder / "copy", "sdist", "--dist-dir", str(folder))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_sdist_has_every_source(unpacked) -> None:
    assert source_files(unpacked) >= source_files(ROOT)
    for name in ("setup.py", "pyproject.toml", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_wheel_without_the_extension(unpacked, tmp_path) -> None:
    build(unpacked, "bdist_wheel", "--dist-dir", str(tmp_path))
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {re.sub(r"^qformer_fast-[\d.]+\.dist-info/.*", "", name.split("/")[0] + "/") for name in names} == {
        "qformer_fast/", ""
    }  # fmt: skip
    expected = {name for name in source_files(ROOT) if name.startswith("qformer_fast/")}
    expected |= {
        name.replace("kernels/triton/", "qformer_fast/kernels/")
        for name in source_files(ROOT)
        if name.startswith("kernels/triton/")
    }
    assert {name for name in names if name.startswith("qformer_fast/")} == expected
    # what it says where it is installed
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    command = "from qformer_fast import extension, kernels; print(extension.__file__, extension.why_not())"
    run = [sys.executable, "-c", command]
    said = subprocess.run(
        run, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert (
        str(installed) in said.stdout and "the extension was not built; QFORMER_FAST_EXT=1 pip install" in said.stdout
    )


@pytest.mark.skipif(BUILT is None, reason="the extension was not built")
def test_the_wheel_with_the_extension(tmp_path) -> None:
    """Of the objects that were built already."""
    build(ROOT, "bdist_wheel", "--dist-dir", str(tmp_path / "dist"), ext="1")
    (wheel,) = (tmp_path / "dist").iterdir()
    assert re.search(r"-cp310-abi3-linux_\w+\.whl$", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "qformer_fast/_C.abi3.so" in names
    assert all(name.startswith("qformer_fast/") or ".dist-info/" in name for name in names)
    triton = pytest.importorskip("triton", reason="needs triton's cuobjdump")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    library = zipfile.ZipFile(wheel).extract("qformer_fast/_C.abi3.so", tmp_path)
    listed = subprocess.run([cuobjdump, "--list-elf", library], check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"sm_\w+", listed)) == {"sm_90a"}
