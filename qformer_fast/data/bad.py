"""Bad data: refused, or skipped and counted; never passed over in silence."""

from __future__ import annotations

from collections import Counter
from typing import Literal, get_args

Kind = Literal["corrupt_shard", "missing_sample", "unreadable_picture", "empty_caption", "duplicate_id"]
OnBad = Literal["refuse", "skip"]


class BadData:
    """What is done where data are bad, and how often it was.

    Args:
        on_bad (str): "refuse" raises at the first, "skip" counts it and goes on without. Default: "refuse".

    ``counts`` has how many of each kind were skipped.

    Raises:
        ValueError: another word.
    """

    def __init__(self, on_bad: OnBad = "refuse"):
        if on_bad not in get_args(OnBad):
            raise ValueError(f"on_bad must be one of {get_args(OnBad)}, got {on_bad!r}")
        self.skips = on_bad == "skip"
        self.counts: Counter[Kind] = Counter()
        self._first: dict[Kind, str] = {}

    def found(self, kind: Kind, message: str) -> None:
        """Takes note of one bad entry.

        Raises:
            ValueError: bad data are refused; ``message`` says what was expected and what came, with file and key.
        """
        if not self.skips:
            raise ValueError(message)
        self.counts[kind] += 1
        self._first.setdefault(kind, message)

    def take(self, notes: Notes) -> None:
        """Takes note of what another process found.

        Raises:
            ValueError: something, and bad data are refused.
        """
        for kind, message in notes.found_there:
            self.found(kind, message)

    def summary(self) -> str:
        """What was skipped, a line a kind with its first case; "" if nothing was."""
        return "\n".join(
            f"skipped {count} {kind}, the first: {self._first[kind]}" for kind, count in self.counts.items()
        )


class Notes:
    """Bad data that one process finds and another, which has the :class:`BadData`, is to know of."""

    def __init__(self) -> None:
        self.found_there: list[tuple[Kind, str]] = []

    def found(self, kind: Kind, message: str) -> None:
        """Takes note of one bad entry."""
        self.found_there.append((kind, message))
