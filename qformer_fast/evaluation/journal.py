"""A file of what is done, from which an interrupted evaluation goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qformer_fast.data.files import write_text
from qformer_fast.evaluation._json import shown


class Journal:
    """JSON Lines: {"identity"}, then an object for each piece of work, there as soon as it is done.

    ``entries`` is what was found in the file, without a last line that was cut off.

    Args:
        path (path): the file, made where there is none.
        identity (Mapping): JSON values that decide about the entries.
        fields (Sequence): that each entry must have.

    Raises:
        ValueError: a damaged file, or one with entries of another identity; the message says what differs.
    """

    def __init__(self, path: str | os.PathLike, identity: Mapping[str, Any], fields: Sequence[str]):
        self.path = Path(path)
        # through JSON, which makes lists of tuples
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self.entries = self._read(fields)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.cut(len(self.entries))

    def cut(self, count: int) -> None:
        """Drops all entries but the first ``count``."""
        self.entries = self.entries[:count]
        write_text(self.path, "".join(map(_line, [{"identity": self._identity}, *self.entries])))

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Writes more entries; ``entries`` stays what was found."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, entries)))

    def _read(self, fields: Sequence[str]) -> list[dict[str, Any]]:
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if self.path.exists() else []
        try:
            first, *found = map(json.loads, lines) if lines else [{"identity": {}}]
            theirs, entries = first["identity"], [{name: entry[name] for name in fields} for entry in found]
            if not isinstance(theirs, dict):
                raise TypeError(f"identity {shown(theirs)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"output: {self.path} is damaged ({error!r}); remove it or choose another folder"
            ) from error
        if entries and theirs != self._identity:
            names = [name for name in {**theirs, **self._identity} if theirs.get(name) != self._identity.get(name)]
            changes = [f"{name} {shown(theirs.get(name))} now {shown(self._identity.get(name))}" for name in names]
            raise ValueError(
                f"output: {self.path} is of another run, choose another folder; what differs: {', '.join(changes)}"
            )
        return entries


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
