"""The demo's report: one HTML file with its pictures and plots inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qformer_fast import doctor
from qformer_fast.data.files import write_text

ATTENTION_EXAMPLES = 4

_STYLE = """
:root { --ink: #1c2330; --soft: #5b6577; --line: #dfe3ea; --paper: #ffffff; --tint: #f5f7fa; --accent: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #a3acbc; --line: #343c4a; --paper: #14181f; --tint: #1d232d; --accent: #7aa2ff; }
  img.plot { background: #ffffff; border-radius: 6px; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; max-width:
64rem;
  padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p, li { max-width: 46rem; } .lead, figcaption, .note { color: var(--soft); } .note { font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
tr.ours td { background: var(--tint); font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13.5rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: .8rem; background: var(--tint); font-size: .9rem; }
.card img { width: 100%; border-radius: 6px; background: #fff; } .card dl { margin: .4rem 0; }
.card dt { color: var(--soft); } .card dd { margin: 0 0 .2rem; }
.hit { color: var(--accent); font-weight: 600; } img.plot { width: 100%; } code { font-size: .9em; }
"""


@dataclass(frozen=True)
class Stage1About:
    """What the report says around stage 1's numbers."""

    verdict: str
    machine: str
    features: str
    text_features: str
    batch_size: int


def write_report(
    path: Path, sections: Sequence[str], results: dict[str, Any], credits: Sequence[tuple[str, str, str, str]]
) -> None:
    """Writes the report; whole or not at all.

    Args:
        path (Path): the HTML file.
        sections (Sequence): of the tasks, HTML.
        results (dict): as in ``results.json``.
        credits (Sequence): (what, by whom, licence, address).
    """
    body = [
        "<h1>The Q-Former of BLIP-2 on what it has never seen</h1>",
        *sections,
        "<h2>The run</h2>" + _run_table(results),
        "<h2>Limits</h2><ul><li>The frozen image features are not EVA-CLIP's as in the paper; what the Q-Former "
        "can see is bounded by them.</li><li>A few thousand short names teach names, not sentences.</li></ul>",
        "<h2>Credits</h2><ul>" + "".join(map(_credit, credits)) + "</ul>",
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>qformer_fast demo</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def stage1_sections(
    results: dict[str, Any], history: list[dict[str, float]], examples: list[dict[str, Any]], about: Stage1About
) -> list[str]:
    """Of stage 1.

    Args:
        results (dict): the task's part of ``results.json``.
        history (list): the training log's entries.
        examples (list): {"picture", "name", "vendor", "nearest", "generated", "attention" (queries, 7, 7)}.
        about (Stage1About): words around the numbers.
    """
    speed, counts = results["speed"], results["pictures"]
    cards = [
        card(
            example["picture"],
            example["name"],
            example["vendor"],
            {str(place): name for place, name in enumerate(example["nearest"], start=1)}
            | {"generated": example["generated"]},
            right=[example["name"]],
        )
        for example in examples
    ]
    panels = [
        ("contrast (ITC)", ["loss_itc"]),
        ("matching (ITM)", ["loss_itm"]),
        ("generation (ITG)", ["loss_itg"]),
        ("in the batch", ["r1_i2t", "r1_t2i", "itm_accuracy"]),
    ]
    steps = [entry["step"] for entry in history]
    curves = [(title, steps, {name: [entry[name] for entry in history] for name in names}) for title, names in panels]
    return [
        "<h2>Stage 1: retrieval of unseen concepts</h2>"
        f"<p class='lead'>Trained for {results['steps']} steps on {counts['train']} drawings and their names "
        f"({_text(about.machine)}), tested on {counts['test']} drawings of other concepts.</p>"
        + _table(results["retrieval"], ours="Q-Former"),
        f"<p>{_text(about.verdict)}</p><p class='note'>Recall in percent; images to {counts['test captions']} names "
        f"(i2t) and names to {counts['test']} drawings (t2i). Image features of all rows: {_text(about.features)}. The "
        f"linear heads see {_text(about.text_features)}; they are two linear layers trained with "
        "InfoNCE. Re-ranked: the nearest 16 candidates scored again by image-text matching, ITM logit plus cosine.</p>",
        "<h2>Training</h2>" + _figure(_curves(curves), "losses"),
        "<h2>Test pictures, nearest names, generated names</h2>" + _grid(cards) + "<p class='note'>Coloured: the right "
        "name. Generated by the text branch (ITG) with 3 beams.</p>",
        "<h2>Where the queries look</h2>"
        + _figure(_attention_plot(examples[:ATTENTION_EXAMPLES]), "attention maps")
        + "<p class='note'>Last cross-attention layer, mean over the heads, one column a query, 7 x 7 tokens.</p>",
        "<h2>Speed of this machine</h2><table><thead><tr><th>forward + backward of one batch</th><th>seconds</th></tr>"
        f"</thead><tbody><tr><td>original order: four passes, padded text</td><td>{speed['original order']:.3f}</td>"
        f"</tr><tr class='ours'><td>packed: two sweeps, keys and values once</td><td>"
        f"{speed['packed']:.3f}</td></tr></tbody></table><p>{speed['ratio']:.2f} times as fast, taken in turn.</p>"
        f"<p class='note'>{about.batch_size} pairs, {_text(about.machine)}. The original order "
        "pads text to 32 tokens and these names have a few, so much of the gain is padding that was not computed.</p>",
    ]


def stage2_sections(
    results: dict[str, Any], losses: list[float], history: list[dict[str, float]], cards: list[str]
) -> list[str]:
    """Of stage 2.

    Args:
        results (dict): the task's part of ``results.json``.
        losses (list): of the language model's pre-training.
        history (list): the training log's entries.
        cards (list): from :func:`card`.
    """
    return [
        "<h2>Stage 2: captions of unseen drawings</h2>" + _table(results["rows"], ours="stage 2"),
        "<p class='note'>CIDEr times 100, as papers print it; exact names in percent: the caption is the drawing's "
        "name or one of its other names, which are also CIDEr's references, all as the tokenizer writes them. The "
        "nearest training picture is that of the largest cosine of averaged image tokens; it says its own name, which "
        f"is no unseen drawing's. {_text(' '.join(f'{notice}.' for notice in results['notices']))}</p>",
        _language_model(results, losses, history),
        _grid(cards),
    ]


def vqa_sections(
    results: dict[str, Any], losses: list[float], history: list[dict[str, float]], cards: list[str]
) -> list[str]:
    """Of visual question answering; arguments as of :func:`stage2_sections`."""
    train, test = results["counts"]["train"], results["counts"]["test"]
    return [
        "<h2>Questions about unseen pictures</h2>"
        f"<p class='lead'>{_text(results['about'])}: trained on {train['questions']} questions about {train['images']} "
        f"images, tested on all {test['questions']} about {test['images']} others.</p>"
        + _table(results["accuracy"], ours="Q-Former"),
        "<p class='note'>Answers in percent that are the right one, letter by letter, generated greedily. The majority "
        f"answer is the most frequent one of training, {_text(results['majority'])}; that of a question the most "
        "frequent one to the same words, which is what can be known without looking.</p>",
        _language_model(results, losses, history),
        _grid(cards),
    ]


def as_text(title: str, rows: dict[str, dict[str, float]]) -> str:
    """A table of numbers with one decimal, as text."""
    columns = list(next(iter(rows.values())))
    first = 2 + max(26, *map(len, rows))
    lines = [title, f"{'':<{first}}" + "".join(f"{name:>11}" for name in columns)]
    lines += [f"{name:<{first}}" + "".join(f"{row[column]:>11.1f}" for column in columns) for name, row in rows.items()]
    return "\n".join(lines)


def card(picture: Image.Image, title: str, note: str, lines: Mapping[str, str], *, right: Sequence[str]) -> str:
    """A picture with what was said of it, HTML.

    Args:
        picture (Image): any size.
        title, note (str): beside it.
        lines (Mapping): what each model says, by its name.
        right (Sequence): what is coloured.
    """
    picture = picture.resize((160, 160), Image.Resampling.LANCZOS)
    rows = []
    for name, said in lines.items():
        marked = f"<span class='hit'>{_text(said)}</span>" if said in right else _text(said)
        rows.append(f"<dt>{_text(name)}</dt><dd>{marked or '<em>nothing</em>'}</dd>")
    return (
        f"<div class='card'><img src='{_png(picture)}' alt='{_text(title)}'><strong>{_text(title)}</strong> "
        f"<span class='note'>{_text(note)}</span><dl>{''.join(rows)}</dl></div>"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(rows: dict[str, dict[str, float]], *, ours: str) -> str:
    """Numbers with one decimal; rows whose names start with ``ours`` stand out."""
    columns = list(next(iter(rows.values())))
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        f"<tr{' class=ours' if name.startswith(ours) else ''}><td>{_text(name)}</td>"
        + "".join(f"<td>{row[column]:.1f}</td>" for column in columns)
        + "</tr>"
        for name, row in rows.items()
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _language_model(results: dict[str, Any], losses: list[float], history: list[dict[str, float]]) -> str:
    steps, values = [entry["step"] for entry in history], [entry["loss"] for entry in history]
    curves = [("language model, text alone", list(range(1, len(losses) + 1)), {"loss": losses})] if losses else []
    curves.append(("Q-Former, language model frozen", steps, {"loss": values}))
    about = f"<p>The language model: {_text(results['language_model'])}.</p>"
    return about + _figure(_curves(curves), "losses in nats a token")


def _grid(cards: list[str]) -> str:
    return f"<div class='grid'>{''.join(cards)}</div>"


def _run_table(results: dict[str, Any]) -> str:
    lines = {f"time, {name}": f"{seconds:.0f} s" for name, seconds in results["seconds"].items()}
    lines |= {f"option {name}": value for name, value in _flat(results["config"]).items()}
    lines |= {name: version or "not installed" for name, version in doctor.report()["versions"].items()}
    rows = "".join(f"<tr><td>{_text(name)}</td><td>{_text(value)}</td></tr>" for name, value in lines.items())
    return f"<table><tbody>{rows}</tbody></table>"


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Nested options under dotted names."""
    flat = {}
    for name, value in options.items():
        inner = _flat(value) if isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": x for key, x in inner.items()}
    return flat


def _credit(credit: tuple[str, str, str, str]) -> str:
    what, by, licence, address = map(_text, credit)
    return f"<li>{what}: {by}, {licence}{f' ({address})' if address else ''}</li>"


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _figure(figure, alt: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return f"<img class='plot' alt='{alt}' src='data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _new_figure(rows: int, columns: int, size: tuple[float, float]):
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _curves(panels: list[tuple[str, list[int], dict[str, list[float]]]]):
    """One plot a (title, steps, {name: values})."""
    figure, axes = _new_figure(1, len(panels), (3.25 * len(panels), 3.1))
    for axis, (title, steps, curves) in zip(axes[0], panels, strict=True):
        for name, values in curves.items():
            axis.plot(steps, values, label=name, linewidth=1.4)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    return figure


def _attention_plot(examples: list[dict[str, Any]]):
    queries = examples[0]["attention"].shape[0]
    figure, axes = _new_figure(len(examples), queries + 1, (2.2 * (queries + 1), 2.3 * len(examples)))
    for row, example in zip(axes, examples, strict=True):
        picture = np.asarray(example["picture"])
        height, width = picture.shape[:2]
        maps = torch.nn.functional.interpolate(example["attention"][None].float(), (height, width), mode="bicubic")[0]
        row[0].imshow(picture)
        row[0].set_title(example["name"], fontsize=8)
        for query, axis in enumerate(row[1:]):
            axis.imshow(picture)
            axis.imshow(maps[query].numpy(), cmap="inferno", alpha=0.6)
            axis.set_title(f"query {query}", fontsize=8)
        for axis in row:
            axis.set_axis_off()
    return figure
