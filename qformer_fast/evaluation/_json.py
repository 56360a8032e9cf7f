"""Checks of annotations and results, with errors that name the entry."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

Id = int | str
ID = (int, str)


def member(content: Any, key: str, where: str) -> Any:
    """``content[key]``, a list."""
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f'{where} must hold "{key}" with a list, got {shown(content)}')
    return content[key]


def entries(content: Any, where: str, **fields: type | tuple[type, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each entry of a list, after the words that name it; checked to have these fields of these types.

    Raises:
        ValueError: no list, an empty one, an entry without a field or with one of another type.
    """
    if not isinstance(content, list):
        raise ValueError(f"{where} must hold a list, got {shown(content)}")
    if not content:
        raise ValueError(f"{where} must have at least one entry, got none")
    for number, entry in enumerate(content):
        place = f"{where}, entry {number}"
        check_fields(entry, place, **fields)
        yield place, entry


def check_fields(entry: Any, where: str, **fields: type | tuple[type, ...]) -> None:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), kind) for name, kind in fields.items()):
        expected = ", ".join(f'"{name}" ({_kind_name(kind)})' for name, kind in fields.items())
        raise ValueError(f"{where} must have {expected}, got {shown(entry)}")


def add_new(into: dict, key: Id, value: Any, where: str) -> None:
    if key in into:
        raise ValueError(f"{where} names {key!r} again; each id must have one entry")
    into[key] = value


def check_same_ids(found: Collection[Id], expected: Collection[Id], name: str, of: str) -> None:
    """Raises ValueError unless both hold the same ids, at least one."""
    if not expected:
        raise ValueError(f"{of} must not be empty")
    missing, unknown = _without(expected, found), _without(found, expected)
    if missing or unknown:
        raise ValueError(
            f"{name} must have the {len(expected)} ids of {of}, got {len(found)}: "
            f"{len(missing)} are missing {_some(missing)}, {len(unknown)} are unknown {_some(unknown)}"
        )


def shown(value: Any, length: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= length else text[:length] + "..."


def _kind_name(kind: type | tuple[type, ...]) -> str:
    return " or ".join(x.__name__ for x in (kind if isinstance(kind, tuple) else (kind,)))


def _without(ids: Iterable[Id], others: Collection[Id]) -> list[Id]:
    return [x for x in ids if x not in others]


def _some(ids: list[Id], most: int = 5) -> str:
    return f"[{', '.join(map(repr, ids[:most]))}{', ...' if len(ids) > most else ''}]"
