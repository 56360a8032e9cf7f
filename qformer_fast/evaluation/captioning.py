"""COCO-caption metrics (BLEU, METEOR, ROUGE-L, CIDEr, SPICE) through pycocoevalcap, as LAVIS measures them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from qformer_fast.data.files import read_json, write_text
from qformer_fast.evaluation._json import (
    ID,
    Id,
    add_new,
    check_fields,
    check_same_ids,
    entries,
    member,
    shown,
)
from qformer_fast.evaluation.karpathy import SPLITS, listed_images

BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
METRICS = (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE")
DOMAINS = ("in-domain", "near-domain", "out-domain")
OVERALL = "overall"

Tokenizer = Literal["ptb", "regex"]
# words with their inner hyphens, apostrophes, points and commas in one piece, other signs one by one
TOKEN = re.compile(r"\w+(?:[-'.,:]\w+)*|[^\w\s]")
# what PTBTokenizer of pycocoevalcap drops, with quotes and brackets as they are before it renames them
DROPPED = frozenset("'`\"“”‘’()[]{}.?!,:;-–—…")

SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")

# of references and candidates by image: the value of each metric, and its value for each image
Scorer = Callable[[dict[int, list[str]], dict[int, list[str]]], tuple[list[float], list[list[float]]]]


@dataclass(frozen=True)
class CaptionMetrics:
    """Metrics of one set of captions, as fractions: papers print 100 times these.

    Args:
        scores (dict): of the names in ``METRICS``, those that could be computed.
        per_image (dict): the same of each image id; corpus BLEU and METEOR are no means of these.
        tokenizer (str): "ptb", or "regex", whose figures can't be compared with published ones.
        notices (list): what was left out or done otherwise, and why.
    """

    scores: dict[str, float]
    per_image: dict[Id, dict[str, float]]
    tokenizer: Tokenizer
    notices: list[str]


@dataclass(frozen=True)
class CaptionSplit:
    """What the images of a split are compared with.

    Args:
        references (dict): captions of each image id, as they were written.
        file_names (dict): of each image id, where the file has it.
        domains (dict): of each image id of NoCaps a name in ``DOMAINS``, otherwise empty.
    """

    references: dict[Id, list[str]]
    file_names: dict[Id, str]
    domains: dict[Id, str]


def caption_metrics(
    candidates: Mapping[Id, str], references: Mapping[Id, list[str]], *, tokenizer: Tokenizer | None = None
) -> CaptionMetrics:
    """BLEU 1 to 4, METEOR, ROUGE-L, CIDEr and SPICE of one caption an image.

    METEOR needs Java, SPICE also the CoreNLP jars that ``python -m pycocoevalcap.spice.get_stanford_models`` downloads;
    what can't be computed is left out and named in ``notices``.

    Args:
        candidates (mapping): caption of each image id, of all of ``references`` and of no others.
        references (mapping): captions of each image id, at least one with a word in it.
        tokenizer (str, Optional): "ptb", PTBTokenizer as in every published figure, needs Java; "regex" does not.
            Default: `None`, "ptb" where Java runs.

    Raises:
        ValueError: no image, other candidates than references, no text, an image without a reference.
        ImportError: pycocoevalcap is missing. RuntimeError: PTBTokenizer can't run, with the reason.

    Source: ``COCOEvalCap.evaluate`` of pycocoevalcap 1.2, which LAVIS tasks/captioning.py calls.
    """
    return _evaluate(candidates, references, {OVERALL: references}, tokenizer)[OVERALL]


def by_domain(
    candidates: Mapping[Id, str],
    references: Mapping[Id, list[str]],
    domains: Mapping[Id, str],
    *,
    tokenizer: Tokenizer | None = None,
) -> dict[str, CaptionMetrics]:
    """:func:`caption_metrics` of each domain of NoCaps on its own, then of all images.

    A domain is a corpus of its own: CIDEr weighs n-grams by how many of its images they are written of.

    Args:
        candidates, references, tokenizer: as in :func:`caption_metrics`.
        domains (mapping): "in-domain", "near-domain" or "out-domain" of each image id.

    Returns:
        dict: of the domains that have images, in this order, then "overall".

    Raises:
        ValueError: as :func:`caption_metrics`; another domain, other images in ``domains``.
        ImportError, RuntimeError: as :func:`caption_metrics`.
    """
    check_same_ids(domains, references, "domains", "references")
    for image_id, domain in domains.items():
        _check_domain(domain, f"domains, image {image_id!r}")
    groups = {domain: [i for i in references if domains[i] == domain] for domain in DOMAINS}
    present = {domain: image_ids for domain, image_ids in groups.items() if image_ids}
    return _evaluate(candidates, references, present | {OVERALL: list(references)}, tokenizer)


def read_references(path: str | os.PathLike, *, split: str = "test") -> CaptionSplit:
    """The reference captions of COCO, NoCaps or Flickr30K, unchanged.

    Args:
        path (path): COCO's format, {"images": [{"id", "file_name" (optional), "domain" (NoCaps)}], "annotations":
            [{"image_id", "caption"}]}; or a file of :func:`~qformer_fast.evaluation.karpathy.read_karpathy`, image ids
            the numbers that the file names end with, as LAVIS takes them, or the whole path where there is none.
        split (str): of Karpathy's file of all splits. Default: "test".

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, another split, one without images, a missing field,
            an image twice or without captions, a caption of an unknown image; the message names the entry.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    where = f"annotations: {path}"
    content = read_json(path, "annotations")
    if isinstance(content, dict) and "annotations" in content:
        found = _read_coco(content, where)
    else:
        found = _with_numbers(listed_images(content, path, split))
    if not found.references:
        raise ValueError(f"{where} has no image" + (f' of split "{split}"' if isinstance(content, dict) else ""))
    for image_id, captions in found.references.items():
        _check_captions(captions, f"{where}, image {image_id!r}")
    return found


def read_captions(path: str | os.PathLike) -> dict[Id, str]:
    """Candidates in COCO's format of results, [{"image_id", "caption"}].

    Raises:
        FileNotFoundError: nothing there. ValueError: no such file, no caption, a missing field, an image id twice; the
            message names the entry.
    """
    candidates: dict[Id, str] = {}
    content = read_json(path, "candidates")
    for place, entry in entries(content, f"candidates: {path}", image_id=ID, caption=str):
        add_new(candidates, entry["image_id"], entry["caption"], place)
    return candidates


def write_captions(path: str | os.PathLike, candidates: Mapping[Id, str]) -> None:
    """Writes what :func:`read_captions` reads and evaluation servers take."""
    for image_id, caption in candidates.items():
        _check_candidate(caption, image_id)
    captions = [{"image_id": image_id, "caption": caption} for image_id, caption in candidates.items()]
    write_text(Path(path), json.dumps(captions))


def _evaluate(
    candidates: Mapping[Id, str],
    references: Mapping[Id, list[str]],
    groups: Mapping[str, Iterable[Id]],
    tokenizer: Tokenizer | None,
) -> dict[str, CaptionMetrics]:
    """Metrics of each group of image ids; captions are split once, and METEOR's process is started once."""
    if tokenizer not in (None, *get_args(Tokenizer)):
        raise ValueError(f"tokenizer must be one of {get_args(Tokenizer)} or None, got {tokenizer!r}")
    check_same_ids(candidates, references, "candidates", "references")
    for image_id in references:
        _check_captions(references[image_id], f"references, image {image_id!r}")
        _check_candidate(candidates[image_id], image_id)
    if find_spec("pycocoevalcap") is None:
        raise ImportError("caption metrics need pycocoevalcap: pip install 'qformer_fast[captioning]'")
    no_java = _why_no_java()
    if tokenizer == "ptb" and no_java:
        raise RuntimeError(f'tokenizer="ptb" can\'t run: {no_java}')
    tokenizer = tokenizer or ("regex" if no_java else "ptb")
    split = _split_ptb if tokenizer == "ptb" else _split_regex
    split_references = iter(split([caption for captions in references.values() for caption in captions]))
    tokens = {i: [next(split_references) for _ in captions] for i, captions in references.items()}
    candidate_tokens = dict(zip(references, split([candidates[i] for i in references]), strict=True))
    for image_id, captions in tokens.items():
        if not any(captions):
            raise ValueError(f"references, image {image_id!r} must have a word in them, got {references[image_id]!r}")
    scorers, notices = _scorers(no_java)
    if tokenizer == "regex":
        why = f" ({no_java})" if no_java else ""
        notices.insert(0, f"captions were split by a regex, not by PTBTokenizer{why}: not comparable with papers")
    found = {}
    for name, image_ids in groups.items():
        chosen = {i: tokens[i] for i in image_ids}
        found[name] = _score(chosen, {i: candidate_tokens[i] for i in image_ids}, scorers, tokenizer, notices)
    return found


def _score(
    references: dict[Id, list[str]],
    candidates: dict[Id, str],
    scorers: list[tuple[tuple[str, ...], Scorer]],
    tokenizer: Tokenizer,
    notices: list[str],
) -> CaptionMetrics:
    notices = list(notices)
    without = sum(not caption for caption in candidates.values())
    if without:
        notices.append(f"{without} of {len(candidates)} candidates have no word in them and match nothing")
    # the scorers' image ids: SPICE sorts them, and ids may be of both types
    numbered = dict(enumerate(references.values())), {n: [caption] for n, caption in enumerate(candidates.values())}
    scores: dict[str, float] = {}
    per_image: dict[Id, dict[str, float]] = {image_id: {} for image_id in references}
    for names, scorer in scorers:
        try:
            totals, values = scorer(*numbered)
        except RuntimeError as error:
            notices.append(f"{names[0]} is left out: {error}")
            continue
        for name, total, column in zip(names, totals, values, strict=True):
            scores[name] = float(total)
            for row, value in zip(per_image.values(), column, strict=True):
                row[name] = float(value)
    return CaptionMetrics(scores, per_image, tokenizer, notices)


def _scorers(no_java: str | None) -> tuple[list[tuple[tuple[str, ...], Scorer]], list[str]]:
    """The scorers that can run, in the order of ``METRICS``, and why the others can't."""
    scorers: list[tuple[tuple[str, ...], Scorer]] = [(BLEU, _bleu), (("ROUGE_L",), _rouge), (("CIDEr",), _cider)]
    no_spice = no_java or _why_no_spice()
    notices = [f"{name} is left out: {why}" for name, why in (("METEOR", no_java), ("SPICE", no_spice)) if why]
    if not no_java:
        scorers.insert(1, (("METEOR",), _Meteor()))
    if not no_spice:
        scorers.append((("SPICE",), _spice))
    return scorers, notices


def _bleu(references, candidates):
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(len(BLEU)).compute_score(references, candidates, verbose=0)


def _rouge(references, candidates):
    from pycocoevalcap.rouge.rouge import Rouge

    score, values = Rouge().compute_score(references, candidates)
    return [score], [values]


def _cider(references, candidates):
    from pycocoevalcap.cider.cider import Cider

    score, values = Cider().compute_score(references, candidates)
    return [score], [values]


class _Meteor:
    """METEOR in one Java process for all calls."""

    def __init__(self):
        from pycocoevalcap.meteor.meteor import Meteor

        self.meteor = Meteor()

    def __call__(self, references, candidates):
        try:
            score, values = self.meteor.compute_score(references, candidates)
        except (OSError, ValueError) as error:
            process = self.meteor.meteor_p
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()
            # what Meteor's destructor stumbles over: the lock of the failed call and a pipe that can't be flushed
            self.meteor.lock.release()
            with contextlib.suppress(OSError):
                process.stdin.close()
            raise RuntimeError(f"its Java process failed: {said or error}") from error
        return [score], [values]


def _spice(references, candidates):
    from pycocoevalcap.spice.spice import Spice

    try:
        score, values = Spice().compute_score(references, candidates)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"its Java process failed: {error}") from error
    return [score], [[value["All"]["f"] for value in values]]


def _why_no_java() -> str | None:
    if shutil.which("java") is None:
        return "there is no java on the PATH"
    run = subprocess.run(["java", "-version"], capture_output=True, text=True)
    return None if run.returncode == 0 else f"`java -version` fails: {run.stderr.strip()}"


def _why_no_spice() -> str | None:
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent
    missing = [jar for jar in SPICE_JARS if not (folder / "lib" / jar).exists()]
    if missing:
        return f"{folder / 'lib'} has no {' and no '.join(missing)}"
    return None if os.access(folder, os.W_OK) else f"it writes into {folder}, which is read-only"


def _split_ptb(captions: list[str]) -> list[str]:
    """The tokens of each caption, joined by spaces, as pycocoevalcap's PTBTokenizer gives them.

    Its file of captions goes to the temporary folder, not beside the jar, which may be read-only; and every line
    separator within a caption becomes a space, where the original's output shifts by a line.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "captions.txt")
        file.write_bytes("\n".join(" ".join(caption.splitlines()) for caption in captions).encode())
        tokenize = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
        run = subprocess.run(["java", "-cp", str(jar), *tokenize], capture_output=True)
    if run.returncode != 0:
        raise RuntimeError(f"PTBTokenizer failed: {run.stderr.decode(errors='replace').strip()}")
    lines = run.stdout.decode().split("\n")
    if len(lines) < len(captions) or any(lines[len(captions) :]):
        raise RuntimeError(f"PTBTokenizer gave {len(lines)} lines for {len(captions)} captions")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [
        " ".join(token for token in line.split(" ") if token not in dropped).strip() for line in lines[: len(captions)]
    ]


def _split_regex(captions: list[str]) -> list[str]:
    return [" ".join(t for t in TOKEN.findall(caption.lower()) if t not in DROPPED) for caption in captions]


def _read_coco(content: dict[str, Any], where: str) -> CaptionSplit:
    found = CaptionSplit({}, {}, {})
    for place, image in entries(member(content, "images", where), f"{where}, images", id=ID):
        add_new(found.references, image["id"], [], place)
        for field, values in (("file_name", found.file_names), ("domain", found.domains)):
            if field in image:
                check_fields(image, place, **{field: str})
                values[image["id"]] = image[field]
        if "domain" in image:
            _check_domain(image["domain"], place)
    if found.domains and len(found.domains) < len(found.references):
        images, domains = len(found.references), len(found.domains)
        raise ValueError(f'{where} must have "domain" of all {images} images or of none, got it of {domains}')
    annotations = member(content, "annotations", where)
    for place, annotation in entries(annotations, f"{where}, annotations", image_id=ID, caption=str):
        if annotation["image_id"] not in found.references:
            raise ValueError(f'{place} must have an "image_id" of "images", got {annotation["image_id"]!r}')
        found.references[annotation["image_id"]].append(annotation["caption"])
    return found


def _with_numbers(listed: Iterable[tuple[str, str, list[Any]]]) -> CaptionSplit:
    """Of entries of karpathy.py, by the number that each file's name ends with."""
    found = CaptionSplit({}, {}, {})
    for place, image, captions in listed:
        number = PurePosixPath(image).stem.rpartition("_")[2]
        image_id = int(number) if number.isdecimal() else image
        add_new(found.references, image_id, captions, f"annotations: {place}")
        found.file_names[image_id] = image
    return found


def _check_captions(captions: Any, where: str) -> None:
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where} must have a list of captions, at least one, got {shown(captions)}")


def _check_candidate(caption: Any, image_id: Id) -> None:
    if not isinstance(caption, str):
        raise ValueError(f"candidates must be text, got {caption!r} of {image_id!r}")


def _check_domain(domain: Any, where: str) -> None:
    if domain not in DOMAINS:
        raise ValueError(f"{where} must have a domain in {DOMAINS}, got {domain!r}")
