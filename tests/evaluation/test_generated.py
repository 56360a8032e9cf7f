"""Texts batch by batch: their order, what is kept of an interrupted run, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from qformer_fast.evaluation.generated import Request, generate_all

IMAGES = {"a.png": 1.0, "b.png": 2.0, "c.png": 3.0}
REQUESTS = [Request(7, "b.png", "one"), Request("x", "a.png", "two"), Request(3, "b.png", "three")]
REQUESTS += [Request(4, "c.png", "four"), Request(9, "a.png", "five")]
TEXTS = {7: "one 2", "x": "two 1", 3: "three 2", 4: "four 3", 9: "five 1"}


class Writer:
    """Writes a prompt and its image's number, remembers the batches, and fails at batch ``fails``."""

    def __init__(self, fails: int | None = None, noise: bool = False):
        self.fails, self.noise, self.prompts, self.names = fails, noise, [], []

    def read(self, names):
        self.names.append(list(names))
        return torch.tensor([IMAGES[name] for name in names])[:, None, None].expand(-1, 3, 4)

    def write(self, tokens, prompts):
        if len(self.prompts) == self.fails:
            raise RuntimeError("killed")
        self.prompts.append(list(prompts))
        noise = f" {torch.rand(()):.6f}" if self.noise else ""
        return [f"{prompt} {int(x[0, 0])}{noise}" for x, prompt in zip(tokens, prompts, strict=True)]

    def run(self, path=None, requests=REQUESTS, **options):
        return generate_all(self.write, self.read, requests, **{"batch_size": 2, "path": path, **options})


def test_each_text_is_of_its_image_and_prompt() -> None:
    writer = Writer()
    found = writer.run()
    assert found == TEXTS and list(found) == list(TEXTS)
    assert writer.prompts == [["one", "two"], ["three", "four"], ["five"]]
    assert Writer().run(batch_size=3) == TEXTS


def test_an_image_is_read_once_a_batch() -> None:
    writer = Writer()
    writer.run(batch_size=4)
    assert writer.names == [["b.png", "a.png", "c.png"], ["a.png"]]


@pytest.mark.parametrize("half_written", ["", '{"id": 3, "te', '{"id": 3, "text": "three 2"}\n', "\x00\x00"])
@pytest.mark.parametrize("seed", [None, 5])
def test_an_interrupted_run_goes_on(tmp_path, half_written, seed) -> None:
    options = {"identity": {"prompt": "a", "sizes": (1, 2)}, "seed": seed}
    noise = seed is not None
    whole = Writer(noise=noise).run(tmp_path / "new" / "whole.jsonl", **options)
    with pytest.raises(RuntimeError, match="killed"):
        Writer(fails=1, noise=noise).run(tmp_path / "texts.jsonl", **options)
    with (tmp_path / "texts.jsonl").open("a") as file:
        file.write(half_written)
    torch.rand(3)
    writer = Writer(noise=noise)
    assert writer.run(tmp_path / "texts.jsonl", **options) == whole
    assert writer.prompts == [["three", "four"], ["five"]]
    assert (tmp_path / "texts.jsonl").read_bytes() == (tmp_path / "new" / "whole.jsonl").read_bytes()
    again = Writer()
    assert again.run(tmp_path / "texts.jsonl", **options) == whole and again.prompts == []


def test_the_file_has_a_line_a_text(tmp_path) -> None:
    Writer().run(tmp_path / "texts.jsonl", identity={"a": 1})
    identity, *lines = map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines())
    assert identity == {"identity": {"a": 1}}
    assert lines == [{"id": key, "text": text} for key, text in TEXTS.items()]


def test_a_file_of_another_run_is_refused_and_stays(tmp_path) -> None:
    path = tmp_path / "texts.jsonl"
    Writer().run(path, identity={"prompt": "a", "beams": 5})
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="of another run, .*what differs: prompt 'a' now 'b', top_p None now 0.9$"):
        Writer().run(path, identity={"prompt": "b", "beams": 5, "top_p": 0.9})
    with pytest.raises(ValueError, match="must have the ids of the requests"):
        Writer().run(path, REQUESTS[1:] + REQUESTS[:1], identity={"prompt": "a", "beams": 5})
    assert path.read_bytes() == kept


def test_a_run_that_failed_at_once_does_not_stand_in_the_way(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        Writer(fails=0).run(tmp_path / "texts.jsonl", identity={"a": 1})
    assert Writer().run(tmp_path / "texts.jsonl", identity={"a": 2}) == TEXTS


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Writer().run(batch_size=0)
    with pytest.raises(ValueError, match="requests must have different ids, at least one"):
        Writer().run(requests=[])
    with pytest.raises(ValueError, match="requests must have different ids"):
        Writer().run(requests=[*REQUESTS, REQUESTS[0]])
