"""The zoo's index, ``model_info.json``: a record for each version of each bundle, in the form of MONAI's model zoo.

MONAI reads ``source`` alone; ``checksum`` is the model zoo's (SHA-1), the rest is for `tools.zoo fetch` and people.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.weights import file_sha256
from tools.bundle_folder import Bundle

NAME = "model_info.json"
Record = dict[str, Any]
Index = dict[str, Record]

_KEY = re.compile(r"(?P<name>\w+)_v(?P<version>\d+\.\d+\.\d+)")
_NEEDED = ("source", "sha256", "size", "unpacked_size")


def read_index(text: str, where: str) -> Index:
    """Parse an index.

    Args:
        text: its content.
        where: its path or address, for messages.

    Returns:
        Records by ``NAME_vVERSION``.

    Raises:
        InputError: it is no index, or a record lacks what a fetch needs.
    """
    try:
        index = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: is no JSON ({error}). Give the address of a zoo's {NAME}.") from error
    if not isinstance(index, dict):
        raise InputError(f"{where}: is no zoo's {NAME}, which is a JSON object of records.")
    for key, record in index.items():
        missing = [one for one in _NEEDED if not isinstance(record, dict) or not record.get(one)]
        if missing or not _KEY.fullmatch(key):
            raise InputError(f"{where}: the record {key!r} has no {', '.join(missing) or 'NAME_vX.Y.Z as its key'}.")
    return index


def load_index(folder: Path) -> Index:
    """Read the index of a folder of zips; empty where there is none yet."""
    path = folder / NAME
    return read_index(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}


def save_index(index: Mapping[str, Record], folder: Path) -> None:
    """Write the index, sorted, so that the same records give the same bytes."""
    with replacing(folder / NAME) as hidden:
        hidden.write_text(json.dumps(dict(sorted(index.items())), indent=2) + "\n", encoding="utf-8")


def parse_key(key: str) -> tuple[str, str]:
    """Name and version of ``NAME_vVERSION``."""
    match = _KEY.fullmatch(key)
    if not match:
        raise InputError(f"{key!r} is not NAME_vX.Y.Z with letters, digits and _ in the name.")
    return match["name"], match["version"]


def by_version(key: str) -> tuple[str, list[int]]:
    """Sort key: name, then the version's numbers."""
    name, version = parse_key(key)
    return name, [int(part) for part in version.split(".")]


def newest(index: Mapping[str, Record], name: str, version: str = "") -> str:
    """Key of a bundle's record.

    Args:
        index: records.
        name: the bundle.
        version: its version; empty: the newest, by numbers.

    Raises:
        InputError: there is none.
    """
    keys = sorted((key for key in index if parse_key(key)[0] == name), key=by_version)
    if not keys:
        names = sorted({parse_key(key)[0] for key in index})
        raise InputError(f"{name}: the index has no such bundle. It has {', '.join(names) or 'none'}.")
    if version and f"{name}_v{version}" not in keys:
        raise InputError(
            f"{name}: there is no version {version}. There are {', '.join(parse_key(k)[1] for k in keys)}."
        )
    return f"{name}_v{version}" if version else keys[-1]


def describe(bundle: Bundle, path: Path, source: str) -> Record:
    """Make the record of a packed bundle.

    Args:
        bundle: its folder.
        path: its zip.
        source: address of the zip, or its name where the index lies beside it.
    """
    metadata = bundle.metadata
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    return {
        "checksum": _sha1(path),
        "source": source,
        "sha256": file_sha256(path),
        "size": path.stat().st_size,
        "unpacked_size": sum(sizes.values()),
        "name": metadata["name"],
        "task": metadata["task"],
        "description": metadata["description"],
        "version": metadata["version"],
        "monai_version": metadata["monai_version"],
        "depth": bundle.depth,
        "licence": " ".join(bundle.text("LICENSE").split()[:4]).rstrip(","),  # of Apache's
        "has_weights": any(name.startswith(f"{bundle.name}/models/") for name in sizes),
        "scores": metadata.get("eval_metrics", {}),
    }


def _sha1(path: Path) -> str:
    value = hashlib.sha1()  # no protection, but what the model zoo's index has
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            value.update(chunk)
    return value.hexdigest()
