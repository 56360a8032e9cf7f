"""``qformer-fast demo``: real pictures from packages, training, evaluation on what was unseen, and a report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from qformer_fast.data.files import write_text
from qformer_fast.demo.config import TASKS, DemoConfig, Task
from qformer_fast.demo.report import write_report
from qformer_fast.demo.setting import Laps, Outcome, Setting
from qformer_fast.demo.sources import package_source, synthetic_source
from qformer_fast.demo.stage1 import run_stage1
from qformer_fast.demo.stage2 import run_stage2
from qformer_fast.demo.vqa import run_vqa
from qformer_fast.training.loop import resolve_device


def main(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo, prints tables and the report's path, and returns the results as written to ``results.json``.

    Raises:
        ModuleNotFoundError: a package is missing; the message names it. ValueError: a damaged cache of image tokens.
    """
    laps = Laps()
    device = resolve_device(config.device)
    tasks = config.tasks or (TASKS if device.type == "cuda" else TASKS[:1])
    if "stage2" in tasks and find_spec("pycocoevalcap") is None:
        raise ModuleNotFoundError("stage2's captions are measured by pycocoevalcap: pip install 'qformer_fast[demo]'")
    source = synthetic_source() if config.synthetic else package_source(questions="vqa" in tasks)
    setting = Setting(
        config=config,
        source=source,
        encoder=source.make_encoder(device),
        device=device,
        precision=_faster_precision(device) if config.precision == "auto" else config.precision,
        output_dir=Path(config.output_dir),
        cache_dir=_cache_dir(config),
        laps=laps,
    )
    for name in ("training", "stage2", "vqa"):
        shutil.rmtree(setting.output_dir / name, ignore_errors=True)
    results: dict[str, Any] = {"config": asdict(config)}
    sections: list[str] = []
    for outcome in _outcomes(setting, tasks):
        results |= outcome.results
        sections += outcome.sections
        print(f"\n{outcome.summary}\n", flush=True)
    results |= {
        "seconds": dict(laps.seconds),
        "precision": setting.precision,
        "device": setting.device_name,
        "features": source.features,
        "text_features": source.text_features,
    }
    write_text(setting.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    path = setting.output_dir / "report.html"
    write_report(path, sections, results, source.credits)
    laps.end("report")
    print(f"in all: {sum(laps.seconds.values()):.0f} s")
    print(f"report: {path.resolve()}")
    return results


def _outcomes(setting: Setting, tasks: Sequence[Task]) -> Iterator[Outcome]:
    if "stage1" in tasks:
        stage1 = run_stage1(setting)
        yield stage1.outcome
        if "stage2" in tasks:
            yield run_stage2(setting, stage1)
    if "vqa" in tasks:
        yield run_vqa(setting)


def _cache_dir(config: DemoConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qformer_fast"


def _faster_precision(device: torch.device) -> str:
    """bf16 on a GPU, and on a CPU whose bf16 products are faster than its fp32 ones; measured, 0.1 s."""
    if device.type != "cpu":
        return "bf16"

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"
