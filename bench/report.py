"""Markdown tables and plots of what bench_ops.py measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS = "triton"
GEMMS = "gemms"
RESULTS = Path(__file__).resolve().parent / "results"


def groups(rows: Iterable[Row]) -> dict[tuple, dict[str, Row]]:
    """(op, shape, dtype, dropout, mode) -> provider -> its timed row, in the order of the file."""
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "error" not in row:
            key = (row["op"], row["shape"], row["dtype"], row["dropout_p"], row["mode"])
            found.setdefault(key, {})[row["provider"]] = row
    return found


def best_other(by_provider: dict[str, Row]) -> Row | None:
    """The fastest row that is not ours."""
    others = [row for name, row in by_provider.items() if name not in (OURS, GEMMS)]
    return min(others, key=lambda row: row["p50_us"], default=None)


def slower(rows: Iterable[Row]) -> list[str]:
    """One line for each of our times above the best other provider's."""
    lines = []
    for (op, shape, dtype, dropout_p, mode), by_provider in groups(rows).items():
        ours, other = by_provider.get(OURS), best_other(by_provider)
        if ours and other and ours["p50_us"] > other["p50_us"]:
            ratio = ours["p50_us"] / other["p50_us"]
            lines.append(
                f"- {op} {shape} {dtype}, dropout {dropout_p}, {mode}: {ours['p50_us']:.1f} us, "
                f"{ratio:.2f} times {other['provider']}'s {other['p50_us']:.1f}"
            )
    return lines


def table(op: str, rows: list[Row]) -> Iterator[str]:
    """Times of one op, a line for each shape, dropout probability and mode."""
    found = {key: value for key, value in groups(rows).items() if key[0] == op}
    providers = list(dict.fromkeys(name for by_provider in found.values() for name in by_provider))
    yield from _line(
        "shape", "dtype", "dropout", "mode", *providers, "floor", f"{OURS} / floor", f"best other / {OURS}"
    )
    yield from _line(*["---"] * 4, *["---:"] * (len(providers) + 3))
    for (_, *key), by_provider in found.items():
        ours, other = by_provider.get(OURS), best_other(by_provider)
        times = [_number(by_provider.get(name), "p50_us", ".1f") for name in providers]
        floor = next((row["floor_us"] for row in by_provider.values() if "floor_us" in row), None)
        gain = f"{other['p50_us'] / ours['p50_us']:.2f}" if ours and other else ""
        yield from _line(*key, *times, f"{floor:.1f}" if floor else "", _number(ours, "floor_ratio", ".2f"), gain)


def peaks(rows: list[Row]) -> Iterator[str]:
    """Peak memory of a forward and backward."""
    found = {key: value for key, value in groups(rows).items() if key[4] == "fwd_bwd"}
    found = {key: value for key, value in found.items() if any(row.get("peak_mib") for row in value.values())}
    providers = [p for p in dict.fromkeys(name for by_provider in found.values() for name in by_provider) if p != GEMMS]
    if found:
        yield from ("### Peak memory of forward + backward, MiB, inputs aside", "")
        yield from _line("op", "shape", "dtype", "dropout", *providers)
        yield from _line(*["---"] * 4, *["---:"] * len(providers))
        for (*key, _), by_provider in found.items():
            yield from _line(*key, *(_number(by_provider.get(name), "peak_mib", ".1f") for name in providers))
        yield ""


def report(name: str, result: dict[str, Any]) -> Iterator[str]:
    """The Markdown lines of one result file."""
    machine, ceilings, rows = result["machine"], result["ceilings"], result["rows"]
    versions = machine["versions"]
    yield from (f"## {name}", "")
    yield (
        f"{machine['gpu'] or machine['cpu']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {machine['commit']}, {machine['time']}; copy {ceilings['gb_s']:.4g} GB/s, "
        f"matrix product {ceilings['tflop_s']:.4g} TFLOP/s; `{result['command']}`"
    )
    yield ""
    yield from ("Medians in microseconds a call, inputs not in the cache; * host launches included.", "")
    for op in dict.fromkeys(row["op"] for row in rows):
        yield from (f"### {op}", "", *table(op, rows), "")
    yield from peaks(rows)
    if lines := slower(rows):
        yield from (f"### Where {OURS} is slower than the best other provider", "", *lines, "")
    errors = dict.fromkeys(f"- {r['provider']}, {r['op']} {r['shape']}: {r['error']}" for r in rows if "error" in r)
    if errors:
        yield from ("### Not timed", "", *errors, "")


def _line(*cells: Any) -> Iterator[str]:
    yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _number(row: Row | None, name: str, form: str) -> str:
    if row is None or row.get(name) is None:
        return ""
    return f"{row[name]:{form}}" + ("*" if name == "p50_us" and row["timing"] == "events" else "")


def plot(rows: list[Row], folder: Path, stem: str) -> list[Path]:
    """One picture an op: forward + backward (or what there is) as multiples of the floor."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in dict.fromkeys(row["op"] for row in rows):
        found = {key: value for key, value in groups(rows).items() if key[0] == op}
        last = "fwd_bwd" if any(key[4] == "fwd_bwd" for key in found) else "fwd"
        found = {key: value for key, value in found.items() if key[4] == last}
        providers = list(dict.fromkeys(p for v in found.values() for p, row in v.items() if "floor_ratio" in row))
        figure, axes = pyplot.subplots(figsize=(2 + 1.6 * len(found), 3.5), layout="constrained")
        for i, provider in enumerate(providers):
            heights = [by_provider.get(provider, {}).get("floor_ratio", 0) for by_provider in found.values()]
            places = [x + i * 0.8 / len(providers) for x in range(len(found))]
            axes.bar(places, heights, 0.8 / len(providers), label=provider)
        labels = [f"{shape}\n{dtype} p={dropout_p}" for _, shape, dtype, dropout_p, _ in found]
        axes.set(title=f"{op}, {last}", ylabel="time / floor", yscale="log")
        axes.set_xticks([x + 0.4 for x in range(len(found))], labels, fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.legend(fontsize=7)
        paths.append(folder / f"{stem}_{op}.png")
        figure.savefig(paths[-1], dpi=150)
        pyplot.close(figure)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="default: those in bench/results/")
    parser.add_argument("--out", type=Path, help="a Markdown file; default: standard output")
    parser.add_argument("--plots", type=Path, help="a folder for pictures; needs matplotlib")
    options = parser.parse_args()
    lines = ["# Ops: measured times", "", "Written by bench/report.py.", ""]
    for path in options.files or sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if result.get("bench") == "ops":
            lines += report(path.name, result)
            if options.plots:
                plot(result["rows"], options.plots, path.stem)
    text = "\n".join(lines)
    if options.out:
        options.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
