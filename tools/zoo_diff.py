"""Two versions of a bundle: files, keys of their configs, and scores that differ."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from med3d_nets.errors import InputError
from med3d_nets.weights import file_sha256
from tools.zoo_archive import parts, unpack

_MOST_BYTES = 4 << 30
_SHOWN = 80  # characters of a value
_METADATA = "configs/metadata.json"


def diff(a: Path, b: Path) -> list[str]:
    """Compare two bundles.

    Args:
        a: folder or zip.
        b: likewise.

    Returns:
        A line for each file that only one has, each file that differs, with its hashes, and each key of a JSON file
        (``key#inner#…``) whose value differs, scores of the metadata among them.

    Raises:
        InputError: one is neither a bundle's folder nor its zip.
    """
    with _opened(a) as one, _opened(b) as other:
        first, second = set(parts(one)), set(parts(other))
        lines = [f"- {name}" for name in sorted(first - second)] + [f"+ {name}" for name in sorted(second - first)]
        for name in sorted(first & second):
            hashes = file_sha256(one / name), file_sha256(other / name)
            if hashes[0] != hashes[1]:
                lines.append(f"~ {name}: sha256 {hashes[0][:12]} -> {hashes[1][:12]}")
                lines += [f"    {line}" for line in _keys(one / name, other / name)]
    return lines


def _keys(a: Path, b: Path) -> Iterator[str]:
    """Keys that differ, of two JSON files; nothing of others."""
    if a.suffix != ".json":
        return
    one, other = (dict(_flat(json.loads(path.read_text(encoding="utf-8")))) for path in (a, b))
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key):
            yield f"{key}: {_shown(one, key)} -> {_shown(other, key)}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists, with MONAI's ids."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path, value
    for key, inner in items:
        yield from _flat(inner, f"{path}#{key}" if path else str(key))


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "absent"
    text = json.dumps(values[key])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


@contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The bundle's folder; that of a zip is unpacked for the time."""
    if path.is_file() and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
            name = archive.namelist()[0].split("/")[0]
            yield unpack(path, name, Path(folder), _MOST_BYTES)
    elif (path / _METADATA).is_file():
        yield path
    else:
        raise InputError(f"{path}: is neither a bundle's folder, which has {_METADATA}, nor a zip of one.")
