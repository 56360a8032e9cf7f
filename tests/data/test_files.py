import os
import stat

import pytest

from qformer_fast.data.files import find_damage, new_folder, write_text


def test_a_folder_appears_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "deep" / "out") as scratch:
        (scratch / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert find_damage(tmp_path / "deep" / "out", ["a.txt"]) is None


def test_a_failed_folder_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as scratch:
        (scratch / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_others_may_read_what_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with new_folder(tmp_path / "out") as scratch:
            (scratch / "private").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {"private": 0o640, "checksums.json": 0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"abd", "a.txt is corrupted or truncated"),
        ("a.txt", b"ab", "a.txt is corrupted or truncated"),
        ("a.txt", None, "a.txt is missing"),
        ("checksums.json", None, "checksums.json is missing or corrupted"),
        ("checksums.json", b'{"a.t', "checksums.json is missing or corrupted"),
        ("checksums.json", b"{}", "checksums.json is missing or corrupted"),
        ("checksums.json", b"[]", "checksums.json is missing or corrupted"),
    ],
)
def test_damage_is_described(tmp_path, name, content, match):
    with new_folder(tmp_path / "out") as scratch:
        (scratch / "a.txt").write_bytes(b"abc")
    (tmp_path / "out" / name).unlink()
    if content is not None:
        (tmp_path / "out" / name).write_bytes(content)
    assert match in find_damage(tmp_path / "out", ["a.txt"])


def test_text_is_replaced_or_kept(tmp_path):
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"
