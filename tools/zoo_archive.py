"""A bundle as a zip: packed so that the same files give the same bytes, and unpacked so that no zip does harm."""

from __future__ import annotations

import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from med3d_nets.errors import InputError
from med3d_nets.files import replacing

PARTS = (
    "LICENSE",
    "large_files.yml",
    "configs/*.json",
    "configs/logging.conf",
    "docs/*",
    "models/model.pt",
    "models/classifier.json",
)
"""What of a bundle's folder is packed; whatever else lies there (data, runs, checkpoints) is the user's own."""

_DATE = (1980, 1, 1, 0, 0, 0)  # the zip format's first
_CHUNK = 1 << 20
_MOST_FILES = 1000
MOST_BYTES = 4 << 30
"""Of a bundle, whatever an index says: the largest encoder has half a gigabyte."""


def parts(folder: Path) -> list[str]:
    """Files of a bundle that are packed, as sorted paths relative to its folder."""
    found = {path for pattern in PARTS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found if not path.name.startswith("."))


def pack(files: Mapping[str, Path], path: Path) -> None:
    """Write files as a zip whose bytes depend on their names and content alone.

    Stored, not deflated: weights shrink by a few percent only, and another zlib would give other bytes.

    Args:
        files: path within the zip, with ``/``, and the file.
        path: the zip to write.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as hidden, zipfile.ZipFile(hidden, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _DATE)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.file_size = files[name].stat().st_size
            with files[name].open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _CHUNK)


def unpack(path: Path, name: str, folder: Path, most_bytes: int) -> Path:
    """Unpack a bundle's zip as ``folder/name``, whole or not at all.

    Args:
        path: the zip.
        name: the bundle, in whose folder all files of the zip must be.
        folder: where the bundle's folder is made; it must not hold one of that name.
        most_bytes: size of all files together that is not exceeded, whatever the zip says of itself.

    Returns:
        The bundle's folder.

    Raises:
        InputError: the zip is damaged, or holds an absolute path, one outside the bundle's folder, a link, the same
            path twice, something encrypted, or more than ``most_bytes``; or the folder is there already.
    """
    target = folder / name
    if target.exists():
        raise InputError(f"{target}: is there already. Remove or rename it, or give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial_", dir=folder) as hidden, zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check(entries, name, most_bytes)
            _extract(archive, entries, Path(hidden))
            (Path(hidden) / name).rename(target)
    except InputError:
        raise
    # All that zipfile raises on damaged or unknown content.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{path.name}: is a damaged zip ({error}). Get it again.") from error
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}). Free space or give another folder."
        ) from error
    return target


def _check(entries: Iterable[zipfile.ZipInfo], name: str, most_bytes: int) -> None:
    """Refuse what is no plain file within the bundle's folder, by what the zip's list says."""
    seen: set[str] = set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        kind = stat.S_IFMT(entry.external_attr >> 16)
        fault = ""
        if path.is_absolute() or "\\" in entry.filename or ":" in entry.filename or "\0" in entry.orig_filename:
            fault = "an absolute path or one of another system"
        elif ".." in path.parts or path.parts[:1] != (name,):
            fault = f"not within {name}/"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            fault = "a link or device"
        elif entry.flag_bits & 1:
            fault = "encrypted"
        elif entry.filename.casefold() in seen:
            fault = "there twice"
        if fault:
            raise InputError(
                f"The zip's {entry.orig_filename!r} is {fault}: nothing of it is unpacked. Do not trust its source."
            )
        seen.add(entry.filename.casefold())
    if len(seen) > _MOST_FILES or sum(entry.file_size for entry in entries) > most_bytes:
        raise InputError(
            f"The zip would unpack to {len(seen)} files of {sum(entry.file_size for entry in entries):,} bytes; "
            f"{_MOST_FILES} of {most_bytes:,} are allowed. Nothing of it is unpacked."
        )


def _extract(archive: zipfile.ZipFile, entries: Iterable[zipfile.ZipInfo], folder: Path) -> None:
    """Write the files. None gets longer than the zip's list says: its checksum is wrong then."""
    for entry in entries:
        path = folder / entry.filename
        if entry.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(entry) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
