"""A built wheel in fresh environments with one Python and torch after another: it is imported, its extension loads, its
operators have fakes, it says why CUDA can't run where there is none, and stage 1 computes a loss and gradients.

On a machine with a GPU, with the Python and torch that are there, also the tests of the extension on it:

python bench/check_wheel.py --here --wheel dist/...
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import write_result

TESTS = Path(__file__).resolve().parents[1] / "tests"
PROBE = """
import json, pathlib, platform, torch, qformer_fast
from qformer_fast import Blip2QFormer, QFormerConfig, extension
from qformer_fast.backend import available
from qformer_fast.models.one_launch import why_not

assert pathlib.Path(qformer_fast.__file__).is_relative_to(pathlib.Path.cwd()), qformer_fast.__file__
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
found = {"python": platform.python_version(), "torch": torch.__version__}
found |= {"extension": extension.why_not(), "backends": available()}
found |= {"one_launch": why_not(QFormerConfig(), 32, torch.bfloat16, device)}
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, encoder_hidden_size=48)
model = Blip2QFormer(QFormerConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
model.to(device)
ids = torch.randint(1000, 2000, (3, 6))
negatives = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
out = model(torch.randn(3, 5, 48).to(device), ids.to(device), torch.ones_like(ids).to(device), negatives=negatives)
out.loss.backward()
found["loss"] = round(float(out.loss.detach()), 5)
found["gradient"] = round(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5, 5)
print(json.dumps(found))
"""


def check(wheel: Path, folder: Path, *, python: str, torch_version: str) -> dict[str, object]:
    """What the probe prints in a new environment of this Python with this torch.

    Raises:
        subprocess.CalledProcessError: something could not be installed, or a test of the extension or the probe failed.
    """
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    install = [inside, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={torch_version}", wheel, "pytest"], check=True)
    return probe(inside, folder, [TESTS / "test_extension.py", "-k", "loads or fakes"])


def check_here(wheel: Path, folder: Path) -> dict[str, object]:
    """What the probe prints in this environment, the wheel first on its path.

    Raises:
        subprocess.CalledProcessError: as of :func:`check`.
    """
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, "--target", folder, wheel], check=True)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    tests = [TESTS / "test_extension.py", TESTS / "models" / "test_one_launch.py", "-m", "cuda"]
    return probe(sys.executable, folder, tests, env=os.environ | {"PYTHONPATH": path})


def probe(python: str | Path, folder: Path, tests: list[str | Path], **options: Any) -> dict[str, object]:
    """Runs the tests, then the probe, in ``folder``."""
    options |= {"cwd": folder, "stdout": subprocess.PIPE, "text": True}
    tested = subprocess.run([python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], **options)
    print(tested.stdout)
    tested.check_returncode()
    done = subprocess.run([python, "-c", PROBE], check=True, **options)
    return json.loads(done.stdout.splitlines()[-1]) | {"tests": tested.stdout.splitlines()[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.12.1", "2.14.1"], help="versions")
    parser.add_argument("--here", action="store_true", help="this Python and the torch that it has, on its GPU")
    parser.add_argument("--output", type=Path, help="a JSON file for the result, written anew after every environment")
    options = parser.parse_args()
    result = {"bench": "check_wheel", "wheel": options.wheel.name, "found": []}
    checks = [check_here]
    if not options.here:
        environments = itertools.product(options.python, options.torch)
        checks = [functools.partial(check, python=python, torch_version=version) for python, version in environments]
    for check_one in checks:
        with tempfile.TemporaryDirectory() as folder:
            found = check_one(options.wheel.resolve(), Path(folder) / "environment")
        result["found"].append(found)
        print(json.dumps(found), flush=True)
        if options.output:
            write_result(options.output, result)


if __name__ == "__main__":
    main()
