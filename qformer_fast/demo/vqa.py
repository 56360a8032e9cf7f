"""Visual question answering: the Q-Former reads the question too, and a small frozen language model answers."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Sequence

import torch

from qformer_fast.data.batches import LanguageDataset
from qformer_fast.data.examples import Example
from qformer_fast.data.files import write_text
from qformer_fast.demo import baseline, report
from qformer_fast.demo.setting import Outcome, Setting
from qformer_fast.evaluation.generated import Request, generate_after_prompts, generate_all
from qformer_fast.models.blip2_opt import Blip2OPT

MAJORITY, BLIND, ANSWERED = "majority answer", "majority answer of a question", "Q-Former, language model"
YES_NO = {"yes", "no"}
MAX_NEW_TOKENS = 4
EXAMPLES = 12


def run_vqa(setting: Setting) -> Outcome:
    """Trains on the training questions and answers all test questions, greedily."""
    config, lap, source = setting.config.vqa, setting.laps.end, setting.source
    questions, folder = source.questions, setting.output_dir / "vqa"
    cache = setting.tokens(questions.pictures, questions.render, "vqa, ")
    documents = defaultdict(list)
    for example in questions.train:
        documents[example.image].append(f"{example.prompt} {example.text}")
    language = setting.language_model(
        list(documents.values()),
        config.language,
        folder / "language_model",
        of="the text of the training images' questions and answers, those of an image one after another",
    )
    lap("vqa, language model")

    torch.manual_seed(setting.config.seed)
    stage1 = source.build_model(source.tokenizer, setting.encoder.width)
    model = Blip2OPT.from_stage1(stage1, language.model, keep_text=True)
    model.qformer.embeddings.word_embeddings.requires_grad_(False)
    dataset = LanguageDataset(questions.train, language.tokenizer, cache=cache, qformer_tokenizer=source.tokenizer)
    history = setting.train(
        model,
        dataset,
        folder / "training",
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        num_workers=config.num_workers,
    )
    lap(f"vqa, training, {config.steps} steps")

    generate = functools.partial(
        generate_after_prompts,
        model,
        language.tokenizer,
        qformer_tokenizer=source.tokenizer,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    requests = [Request(number, test.image, test.prompt) for number, test in enumerate(questions.test)]
    texts = generate_all(generate, cache.rows, requests, batch_size=config.answer_batch_size)
    answers = list(texts.values())
    lap(f"vqa, {len(answers)} answers")

    majority = baseline.majority_answer(questions.train)
    rows = {
        MAJORITY: accuracy([majority] * len(answers), questions.test),
        BLIND: accuracy(baseline.majority_answers(questions.train, questions.test), questions.test),
        ANSWERED: accuracy(answers, questions.test),
    }
    answered = [
        {"image": test.image, "prompt": test.prompt, "answer": test.text, "generated": answer}
        for test, answer in zip(questions.test, answers, strict=True)
    ]
    write_text(folder / "answers.json", json.dumps(answered, indent=1) + "\n")
    counts = {
        part: {"images": len({example.image for example in examples}), "questions": len(examples)}
        for part, examples in (("train", questions.train), ("test", questions.test))
    }
    results = {
        "accuracy": rows,
        "majority": majority,
        "counts": counts,
        "about": questions.about,
        "language_model": language.about,
        "language_model_losses": [language.losses[0], language.losses[-1]] if language.losses else [],
    }
    title = f"{questions.about}: {len(answers)} test questions, right answers in percent, exact match"
    summary = f"{report.as_text(title, rows)}\n\nThe language model: {language.about}."
    pictures = {picture.key: picture for picture in questions.pictures}
    cards = [
        report.card(
            questions.render(pictures[questions.test[i].image]),
            questions.test[i].prompt,
            questions.test[i].text,
            {"generated": answers[i]},
            right=[questions.test[i].text],
        )
        for i in torch.linspace(0, len(answers) - 1, EXAMPLES).long().tolist()
    ]
    sections = report.vqa_sections(results, language.losses, history, cards)
    return Outcome({"vqa": results}, summary, sections)


def accuracy(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Answers that equal the examples' texts, in percent: of all, of the yes-or-no ones and of the others."""
    right = [
        (answer == example.text, example.text in YES_NO) for answer, example in zip(answers, examples, strict=True)
    ]
    kinds = {
        "all": [hit for hit, _ in right],
        "yes or no": [hit for hit, binary in right if binary],
        "other": [hit for hit, binary in right if not binary],
    }
    return {kind: round(100 * sum(hits) / len(hits), 2) for kind, hits in kinds.items() if hits}
