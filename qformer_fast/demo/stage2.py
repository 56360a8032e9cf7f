"""Stage 2 on drawings: a small frozen language model names what it has never seen."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from qformer_fast.data.batches import LanguageDataset
from qformer_fast.data.examples import Example
from qformer_fast.data.files import write_text
from qformer_fast.demo import baseline, report
from qformer_fast.demo.pictures import Picture
from qformer_fast.demo.setting import Outcome, Setting
from qformer_fast.demo.stage1 import EXAMPLES, Stage1
from qformer_fast.evaluation.captioning import CaptionMetrics, caption_metrics
from qformer_fast.evaluation.generated import Request, generate_after_prompts, generate_all, generate_captions
from qformer_fast.models.blip2_opt import Blip2OPT

NEAREST, ITG, STAGE2 = "nearest training picture", "stage 1, own text branch (ITG)", "stage 2, language model"
GENERATION = {"num_beams": 3, "max_new_tokens": 16}
BATCH_SIZE = 128


def run_stage2(setting: Setting, stage1: Stage1) -> Outcome:
    """Trains from stage 1's model on the same pictures and names, and captions the unseen drawings in three ways."""
    config, lap, tokenizer = setting.config.stage2, setting.laps.end, setting.source.tokenizer
    folder, cache, test = setting.output_dir / "stage2", stage1.test.cache, stage1.test.pictures
    documents = {picture.concept: [picture.caption, *picture.aliases] for picture in stage1.pictures}
    language = setting.language_model(
        list(documents.values()),
        config.language,
        folder / "language_model",
        of="the text of the training drawings' names",
    )
    lap("stage 2, language model")
    torch.manual_seed(setting.config.seed)
    model = Blip2OPT.from_stage1(stage1.model, language.model)
    examples = [Example(pair.image, pair.caption, image_id=pair.image_id) for pair in stage1.dataset.pairs]
    dataset = LanguageDataset(examples, language.tokenizer, cache=cache)
    history = setting.train(
        model, dataset, folder / "training", steps=config.steps, batch_size=config.batch_size, lr=config.lr
    )
    lap(f"stage 2, training, {config.steps} steps")

    neighbours = baseline.nearest(stage1.test.tokens, cache.rows([picture.key for picture in stage1.pictures]))
    names = [stage1.pictures[number].caption for number in neighbours.tolist()]
    generators = {
        ITG: functools.partial(_after_no_prompt, stage1.model, tokenizer),
        STAGE2: functools.partial(generate_after_prompts, model, language.tokenizer, **GENERATION),
    }
    requests = [Request(picture.key, picture.key) for picture in test]
    candidates = {NEAREST: as_written(tokenizer, names)}
    for name, generate in generators.items():
        candidates[name] = list(generate_all(generate, cache.rows, requests, batch_size=BATCH_SIZE).values())
    lap("stage 2, captions")

    references = written_names(tokenizer, test)
    measured = {name: _metrics(captions, references) for name, captions in candidates.items()}
    rows = {
        name: {"CIDEr": round(100 * measured[name].scores["CIDEr"], 2), "exact name": exact_names(captions, references)}
        for name, captions in candidates.items()
    }
    lap("stage 2, metrics")
    captions = [
        {"picture": picture.key, "names": references[i]} | {name: candidates[name][i] for name in candidates}
        for i, picture in enumerate(test)
    ]
    write_text(folder / "captions.json", json.dumps(captions, indent=1) + "\n")
    # what other metrics lack is no news here
    notices = [notice for notice in measured[STAGE2].notices if " is left out: " not in notice]
    results = {
        "rows": rows,
        "scores": {name: metrics.scores for name, metrics in measured.items()},
        "notices": notices,
        "generation": GENERATION,
        "language_model": language.about,
        "language_model_losses": [language.losses[0], language.losses[-1]] if language.losses else [],
    }
    title = f"captions of {len(test)} unseen drawings; CIDEr times 100, names found exactly in percent"
    said = f"The language model: {language.about}."
    summary = "\n".join([report.as_text(title, rows), "", said, *notices])
    shown = torch.linspace(0, len(test) - 1, EXAMPLES).long().tolist()
    cards = [
        report.card(
            setting.source.render(test[i]),
            test[i].caption,
            test[i].vendor,
            {name: candidates[name][i] for name in candidates},
            right=references[i],
        )
        for i in shown
    ]
    sections = report.stage2_sections(results, language.losses, history, cards)
    return Outcome({"captions": results}, summary, sections)


def as_written(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[str]:
    """Names as the tokenizer writes what it has read, "t-shirt" as "t - shirt", as generated ones are."""
    return tokenizer.batch_decode(tokenizer(list(names))["input_ids"], skip_special_tokens=True)


def written_names(tokenizer: PreTrainedTokenizerBase, pictures: Sequence[Picture]) -> list[list[str]]:
    """Of each picture its name and its other names, as the tokenizer writes them."""
    return [list(dict.fromkeys(as_written(tokenizer, [p.caption, *p.aliases]))) for p in pictures]


def exact_names(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Captions that are the picture's name or one of its other names, in percent."""
    found = sum(caption in names for caption, names in zip(captions, references, strict=True))
    return round(100 * found / len(captions), 2)


def _after_no_prompt(model, tokenizer, image_embeds, prompts) -> list[str]:
    return generate_captions(model, tokenizer, image_embeds, **GENERATION)


def _metrics(captions: Sequence[str], references: Sequence[list[str]]) -> CaptionMetrics:
    return caption_metrics(dict(enumerate(captions)), dict(enumerate(references)))
