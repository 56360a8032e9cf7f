"""Published settings as YAML files, which ``--config`` takes by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def find_preset(name_or_path: str) -> Path:
    """A YAML file: the one at this path, or else the preset of this name.

    Raises:
        ValueError: neither; the message lists the presets.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    if name_or_path in preset_names():
        return FOLDER / f"{name_or_path}.yaml"
    raise ValueError(f"config must be a file or one of the presets {', '.join(preset_names())}; got {name_or_path!r}")
