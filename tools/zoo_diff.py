"""Two versions of a bundle: files, keys of their configs, and scores that differ."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from med3d_nets.errors import InputError
from med3d_nets.weights import file_sha256
from tools.zoo_archive import MOST_BYTES, parts, unpack

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
        first, second = set(one.files), set(other.files)
        lines = [f"- {name}" for name in sorted(first - second)] + [f"+ {name}" for name in sorted(second - first)]
        for name in sorted(first & second):
            hashes = file_sha256(one.folder / name), file_sha256(other.folder / name)
            if hashes[0] != hashes[1]:
                lines.append(f"~ {name}: sha256 {hashes[0][:12]} -> {hashes[1][:12]}")
                lines += [f"    {line}" for line in _keys(one.folder / name, other.folder / name)]
    return lines


def _keys(a: Path, b: Path) -> Iterator[str]:
    """Keys that differ, of two JSON files; nothing of others."""
    if a.suffix != ".json":
        return
    one, other = (dict(_flat(json.loads(path.read_text(encoding="utf-8")))) for path in (a, b))
    for key in [*one, *(key for key in other if key not in one)]:
        before, after = (json.dumps(values[key]) if key in values else "absent" for values in (one, other))
        if before != after:
            yield f"{key}: {_short(before)} -> {_short(after)}"


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts and lists, with MONAI's ids."""
    if not isinstance(value, (dict, list)) or not value:
        yield path, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield from _flat(inner, f"{path}#{key}" if path else str(key))


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class _Files(NamedTuple):
    """A bundle's folder, and its files relative to it."""

    folder: Path
    files: list[str]


@contextmanager
def _opened(path: Path) -> Iterator[_Files]:
    """A folder's files that are packed; all files of a zip, which is unpacked for the time."""
    if path.is_file() and zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            folder = unpack(path, names[0].split("/")[0], Path(temporary), MOST_BYTES) if names else Path(temporary)
            files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
            yield _of_bundle(path, _Files(folder, files))
    else:
        yield _of_bundle(path, _Files(path, parts(path)))


def _of_bundle(path: Path, files: _Files) -> _Files:
    if _METADATA not in files.files:
        raise InputError(f"{path}: is neither a bundle's folder, which has {_METADATA}, nor a zip of one.")
    return files
