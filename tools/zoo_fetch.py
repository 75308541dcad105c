"""A bundle from a zoo: its bytes are those that the index tells, and they are unpacked with care."""

from __future__ import annotations

import tempfile
from pathlib import Path
from urllib.parse import urljoin
from urllib.request import urlopen

from med3d_nets.errors import InputError
from med3d_nets.weights import file_sha256
from med3d_nets.weights.download import Patience, SourceError, StoreError, download
from tools.zoo_archive import MOST_BYTES, unpack
from tools.zoo_index import NAME, Index, newest, parse_key, read_index

_PATIENCE = Patience()
_MOST_INDEX = 16 << 20  # bytes


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
        where, records = _index(index, patience)
        key = newest(records, name, version)
        record, path = records[key], Path(temporary) / f"{key}.zip"
        source = _join(where, record["source"])
        if max(record["size"], record["unpacked_size"]) > MOST_BYTES:
            raise InputError(f"{key}: the index tells of more than {MOST_BYTES:,} bytes; no bundle has as many.")
        _get(source, path, patience, record["size"])
        if path.stat().st_size != record["size"] or file_sha256(path) != record["sha256"]:
            raise InputError(
                f"{source}: {path.stat().st_size:,} bytes with sha256 {file_sha256(path)}; the index tells "
                f"{record['size']:,} and {record['sha256']}. Nothing is unpacked. Do not use a copy from there."
            )
        return unpack(path, parse_key(key)[0], out, record["unpacked_size"])


def _index(index: str, patience: Patience) -> tuple[str, Index]:
    where = index if index.endswith(".json") else f"{index.rstrip('/')}/{NAME}"
    try:
        if _is_address(where):
            with urlopen(where, timeout=patience.timeout) as answer:
                content = answer.read(_MOST_INDEX + 1)
        else:
            content = Path(where).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise InputError(f"{where}: cannot be had ({reason}). Give the address of a zoo.") from error
    if len(content) > _MOST_INDEX:
        raise InputError(f"{where}: has more than {_MOST_INDEX:,} bytes, too many for an index.")
    return where, read_index(content.decode("utf-8", errors="replace"), where)


def _join(where: str, source: str) -> str:
    """Address of a source that may be relative to the index."""
    if not _is_address(where):
        return source if _is_address(source) else str(Path(where).parent / source)
    address = urljoin(where, source)
    if not _is_address(address):
        raise InputError(f"{where}: names {source}, which is no http address. Do not trust it.")
    return address


def _is_address(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _get(source: str, path: Path, patience: Patience, size: int) -> None:
    try:
        download(source, path, size, patience, progress=True)
    except (SourceError, StoreError) as error:
        raise InputError(f"{source}: cannot be had ({error}).") from error
    if not path.is_file():
        raise InputError(f"{source}: is empty.")
