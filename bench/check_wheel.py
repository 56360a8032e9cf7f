"""A built wheel in fresh environments with one Python and torch after another: it is imported, its extension loads, its
operators have fakes, it says why CUDA can't run where there is none, and stage 1 computes a loss and gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from _machine import write_result

TESTS = Path(__file__).resolve().parents[1] / "tests" / "test_extension.py"
PROBE = """
import json, platform, torch, qformer_fast
from qformer_fast import Blip2QFormer, QFormerConfig, extension
from qformer_fast.backend import available

found = {"python": platform.python_version(), "torch": torch.__version__}
found |= {"extension": extension.why_not(), "backends": available()}
torch.manual_seed(0)
sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, encoder_hidden_size=48)
model = Blip2QFormer(QFormerConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
ids = torch.randint(1000, 2000, (3, 6))
negatives = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
out = model(torch.randn(3, 5, 48), ids, torch.ones_like(ids), negatives=negatives)
out.loss.backward()
found["loss"] = round(float(out.loss.detach()), 5)
found["gradient"] = round(sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5, 5)
print(json.dumps(found))
"""


def check(wheel: Path, python: str, torch_version: str, folder: Path) -> dict[str, object]:
    """What the probe prints in a new environment of this Python with this torch.

    Raises:
        subprocess.CalledProcessError: something could not be installed, or a test of the extension or the probe failed.
    """
    subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    install = [inside, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={torch_version}", wheel, "pytest"], check=True)
    test = [inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, "-k", "loads or fakes"]
    subprocess.run(test, cwd=folder, check=True)
    done = subprocess.run([inside, "-c", PROBE], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["2.10.0", "2.12.1", "2.14.1"], help="versions")
    parser.add_argument("--output", type=Path, help="a JSON file for the result, written anew after every environment")
    options = parser.parse_args()
    result = {"bench": "check_wheel", "wheel": options.wheel.name, "found": []}
    for python in options.python:
        for version in options.torch:
            with tempfile.TemporaryDirectory() as folder:
                found = check(options.wheel.resolve(), python, version, Path(folder) / "environment")
            result["found"].append(found)
            print(json.dumps(found), flush=True)
            if options.output:
                write_result(options.output, result)


if __name__ == "__main__":
    main()
