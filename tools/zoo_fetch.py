"""A bundle from a zoo: its bytes are those that the index tells, and they are unpacked with care."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import urljoin

from med3d_nets.errors import InputError
from med3d_nets.weights import file_sha256
from med3d_nets.weights.download import Patience, SourceError, StoreError, download
from tools.zoo_archive import unpack
from tools.zoo_index import NAME, Index, newest, parse_key, read_index

_PATIENCE = Patience()
_MOST_INDEX = 64 << 20  # bytes


def fetch(name: str, index: str, out: Path, version: str = "", patience: Patience = _PATIENCE) -> Path:
    """Fetch a bundle, whole and with the hash of the index, or not at all.

    Args:
        name: the bundle.
        index: address or path of ``model_info.json``, or of the folder that holds it.
        out: folder in which the bundle's folder is made.
        version: empty: the newest.
        patience: how long to try.

    Returns:
        The bundle's folder.

    Raises:
        InputError: the index cannot be read or lacks the bundle; the zip cannot be had, has another size or hash, or
            holds what `zoo_archive.unpack` refuses; the bundle's folder is there already.
    """
    if (out / name).exists():
        raise InputError(f"{out / name}: is there already. Remove or rename it, or give another folder.")
    with tempfile.TemporaryDirectory(prefix="med3d_zoo_") as temporary:
        where, records = _index(index, Path(temporary), patience)
        key = newest(records, name, version)
        record, path = records[key], Path(temporary) / f"{key}.zip"
        source = _join(where, record["source"])
        _get(source, path, patience, record["size"])
        if path.stat().st_size != record["size"] or file_sha256(path) != record["sha256"]:
            raise InputError(
                f"{source}: {path.stat().st_size:,} bytes with sha256 {file_sha256(path)}; the index tells "
                f"{record['size']:,} and {record['sha256']}. Nothing is unpacked. Do not use a copy from there."
            )
        return unpack(path, parse_key(key)[0], out, record["unpacked_size"])


def _index(index: str, folder: Path, patience: Patience) -> tuple[str, Index]:
    where = index if index.endswith(".json") else f"{index.rstrip('/')}/{NAME}"
    path = folder / NAME
    _get(where, path, patience, None)
    if path.stat().st_size > _MOST_INDEX:
        raise InputError(f"{where}: {path.stat().st_size:,} bytes are too many for an index.")
    return where, read_index(path.read_text(encoding="utf-8", errors="replace"), where)


def _join(where: str, source: str) -> str:
    """Address of a source that may be relative to the index."""
    if "://" in where or "://" in source:
        return urljoin(where, source)
    return str(Path(where).parent / source)


def _get(source: str, path: Path, patience: Patience, size: int | None) -> None:
    try:
        download(source, path, size, patience, progress=size is not None)
    except (SourceError, StoreError) as error:
        raise InputError(f"{source}: cannot be had ({error}).") from error
    if not path.is_file():
        raise InputError(f"{source}: is empty.")
