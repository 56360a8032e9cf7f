"""What an interrupted evaluation finds of itself, and what is refused."""

from __future__ import annotations

import pytest

from qformer_fast.evaluation.journal import Journal

ENTRIES = [{"logits": [0.1, 1e-30]}, {"logits": []}, {"logits": [float("inf")]}]


def test_entries_come_back_up_to_a_half_written_one(tmp_path) -> None:
    path = tmp_path / "new" / "logits.jsonl"
    journal = Journal(path, {"k": (1, 2)}, ("logits",))
    assert journal.entries == []
    journal.append(ENTRIES[:1])
    journal.append(ENTRIES[1:])
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"logits": [0.')
    again = Journal(path, {"k": [1, 2]}, ("logits",))
    assert again.entries == ENTRIES and path.read_bytes() == whole
    again.cut(1)
    assert Journal(path, {"k": [1, 2]}, ("logits",)).entries == again.entries == ENTRIES[:1]


@pytest.mark.parametrize(
    "content",
    [
        "no json\n",
        "[1, 2]\n",
        "3\n",
        "{}\n",
        '{"identity": {}}\n{"other": 7}\n',
        '{"identity": {}}\n7\n',
        '{"identity": 7}\n{"logits": []}\n',
        '{"identity": [1]}\n{"logits": []}\n',
        "\x00\n",
    ],
)
def test_a_damaged_file_is_named_and_stays(tmp_path, content) -> None:
    (tmp_path / "logits.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"output: .*logits\.jsonl is damaged .*remove it or choose another folder"):
        Journal(tmp_path / "logits.jsonl", {}, ("logits",))
    assert (tmp_path / "logits.jsonl").read_text() == content


def test_entries_of_another_run_are_refused_and_stay(tmp_path) -> None:
    path = tmp_path / "logits.jsonl"
    Journal(path, {"k": 1}, ("logits",))
    Journal(path, {"k": 2}, ("logits",)).append(ENTRIES)  # of the first there is nothing to lose
    kept = path.read_bytes()
    with pytest.raises(ValueError, match="of another run, .*what differs: k 2 now None, j None now 3$"):
        Journal(path, {"j": 3}, ("logits",))
    assert path.read_bytes() == kept
