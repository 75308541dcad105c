"""Where weights lie on this machine, and whether a file is the one that the registry describes."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path

import torch

from med3d_nets.errors import InputError
from med3d_nets.registry import WEIGHTS, Weight
from med3d_nets.weights.states import file_sha256

HOME = "MED3D_HOME"
_CLONE = Path(__file__).resolve().parents[2]


def home() -> Path:
    """Folder of fetched weights: ``$MED3D_HOME``, else ``med3d`` in torch's hub folder."""
    own = os.environ.get(HOME, "")
    return Path(own).expanduser().absolute() if own else Path(torch.hub.get_dir()) / "med3d"


def record_of(name: str) -> Weight:
    """Record of a name.

    Raises:
        InputError: there is no such name; the message has those close to it.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    short = {_squeezed(known): known for known in WEIGHTS}
    close = [short[key] for key in difflib.get_close_matches(_squeezed(Path(name).name), short, n=3)]
    hint = f" Is it {' or '.join(close)}?" if close else ""
    raise InputError(
        f"{name}: neither a weights file that exists nor a name in the registry.{hint} "
        "All names: python -m med3d_nets.weights list."
    )


def where(name: str) -> Path:
    """Path in the store, whether the file is there or not.

    Raises:
        InputError: there is no such name.
    """
    return home() / record_of(name).file


def find(name: str) -> Path | None:
    """Look for a file on this machine; nothing is read.

    Args:
        name: name in the registry.

    Returns:
        The first of: the store, a clone of this repository (own weights), the cache of ``huggingface_hub`` (if that
        package is installed). None: in none of them.

    Raises:
        InputError: there is no such name.
    """
    record = record_of(name)
    places = [where(name), *([_CLONE / record.path] if record.path else []), *_in_hub_cache(record)]
    return next((path for path in places if path.is_file()), None)


def verify(path: str | Path, name: str | None = None) -> Weight:
    """Hold a file against the registry, by size and sha256.

    Args:
        path: the file.
        name: the record that it should be; None: the hash decides.

    Returns:
        The record that it is.

    Raises:
        InputError: no such file or name, or the file is not the record's, or none's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if name is not None:
        record = record_of(name)
        reason = fault(path, record)
        if reason:
            raise InputError(f"{path}: is not {record.name}: {reason}. Fetch or copy it again.")
        return record
    digest = file_sha256(path)
    for record in WEIGHTS.values():
        if record.sha256 == digest:
            return record
    named = [fault(path, record) for record in WEIGHTS.values() if record.file == path.name]
    told = f"by its name it should be {path.stem}, but: {named[0]}" if named else f"its sha256 is {digest}"
    raise InputError(
        f"{path}: is no file of the registry; {told}. Weights of your own are used by their path. The registry's files "
        "and their hashes: python -m med3d_nets.weights list --json."
    )


def resolve(name_or_path: str | Path) -> Path:
    """Path of weights that a user names.

    Args:
        name_or_path: a file, which is itself; or a name in the registry, whose file is looked for and checked, and
            fetched where there is none.

    Returns:
        The file.

    Raises:
        InputError: neither a file nor a name; the name's file is damaged; or it cannot be fetched.
    """
    if Path(name_or_path).is_file():
        return Path(name_or_path)
    record = record_of(str(name_or_path))
    found = find(record.name)
    if found is None:
        from med3d_nets.weights.fetch import fetch  # which needs this module

        return fetch(record.name)
    reason = fault(found, record)
    if reason:
        raise InputError(
            f"{found}: is not {record.name}: {reason}. python -m med3d_nets.weights fetch {record.name} gets it anew."
        )
    return found


def fault(path: Path, record: Weight) -> str:
    """What is wrong with a file that should be a record's; empty when nothing is."""
    with open(path, "rb") as file:
        start = file.read(64)
    if is_page(start):
        return "it is an HTML or XML page, not weights"
    size = path.stat().st_size
    if record.size and size != record.size:
        what = "incomplete" if size < record.size else "another file"
        return f"it has {size:,} bytes instead of {record.size:,}, so it is {what}"
    digest = file_sha256(path)
    return "" if digest == record.sha256 else f"its sha256 is {digest} instead of {record.sha256}"


def is_page(start: bytes) -> bool:
    """Whether a file that starts so is HTML or XML; no checkpoint starts with ``<``."""
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def _squeezed(name: str) -> str:
    """What is left of ``ResNet-10.pth`` and ``resnet_10`` alike."""
    return re.sub(r"\.\w+$|[^a-z0-9]", "", name.lower())


def _in_hub_cache(record: Weight) -> list[Path]:
    if not record.repository or importlib.util.find_spec("huggingface_hub") is None:
        return []
    from huggingface_hub import try_to_load_from_cache

    revisions = dict.fromkeys([record.revision, "main"])
    cached = [try_to_load_from_cache(record.repository, record.file, revision=revision) for revision in revisions]
    return [Path(path) for path in cached if isinstance(path, str)]  # it has a special value for "known not to exist"
