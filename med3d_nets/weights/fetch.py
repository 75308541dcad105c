"""Fetch released weights: whole and with the registry's sha256, or not at all.

``$MED3D_WEIGHTS_URL`` names further sources, separated by spaces, that are asked first: addresses or folders that hold
the files by their names, for example a file server of a site without access to the internet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from med3d_nets.errors import InputError
from med3d_nets.registry import HUB, MIRRORS, Weight
from med3d_nets.weights import store
from med3d_nets.weights.download import Patience, SourceError, StoreError, download

SOURCES = "MED3D_WEIGHTS_URL"
_PATIENCE = Patience()
_log = logging.getLogger(__name__)


def fetch(name: str, urls: Sequence[str] | None = None, progress: bool = True, patience: Patience = _PATIENCE) -> Path:
    """Have the file of a registry name on this machine.

    A file that is here already and has the registry's hash is taken; else the sources are asked one after the other.
    What a broken connection brought is gone on with the next time. Of two processes at once one fetches, the other
    waits for it.

    Args:
        name: name in the registry.
        urls: addresses or paths of the file, asked in place of the known sources.
        progress: show a bar, where there is a terminal.
        patience: how long to try.

    Returns:
        The file: in the store, unless ``store.find`` has a good one in another place.

    Raises:
        InputError: unknown name, no source gave the file (each with its reason), or the store cannot be written; the
            message says which file to put where.
    """
    record = store.record_of(name)
    found = store.find(name)
    if found is not None and not store.fault(found, record):
        return found
    sources = [urls] if isinstance(urls, str) else list(urls or known_sources(record))
    if not sources:
        raise InputError(_no_source(record))
    path = store.where(name)
    partial = path.with_name(f".partial-{record.sha256[:12]}-{record.file}")
    try:
        with _locked(path):
            if path.is_file() and not store.fault(path, record):
                return path  # of the process that this one waited for
            return _from_first(sources, path, partial, record, progress, patience)
    except StoreError as error:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk needs the space
        raise InputError(
            f"{path}: cannot be written ({error}). Free space or set {store.HOME} to another folder. {_by_hand(record)}"
        ) from error


def known_sources(record: Weight) -> list[str]:
    """Addresses of a file, in the order in which they are asked.

    Args:
        record: the file's record.

    Returns:
        Those of ``$MED3D_WEIGHTS_URL``, the authors' release (by commit where one is known, and its newest state), its
        mirrors. Only the former for this project's own weights.
    """
    own = os.environ.get(SOURCES, "")
    bases = [own] if Path(own).is_dir() else own.split()
    addresses = [f"{base.rstrip('/')}/{record.file}" for base in bases if base]
    if record.url:
        newest = record.url.replace(f"/{record.revision}/", "/main/")
        addresses += [record.url, newest, *(record.url.replace(HUB, mirror) for mirror in MIRRORS)]
    return list(dict.fromkeys(addresses))


def _from_first(
    sources: Sequence[str], path: Path, partial: Path, record: Weight, progress: bool, patience: Patience
) -> Path:
    tried = []
    for source in sources:
        try:
            _log.info("%s: fetching %s", source, record.file)
            _take(source, partial, record, progress, patience)
            _keep(partial, path)
            return path
        except SourceError as error:
            tried.append(f"  {source}: {error}")
    raise InputError("\n".join([f"{record.file}: no source gave it.", *tried, _by_hand(record)]))


def _take(source: str, partial: Path, record: Weight, progress: bool, patience: Patience) -> None:
    """Leave the record's file under its partial name, or nothing that would spoil the next attempt."""
    begun = partial.is_file()
    _check_space(partial, record)
    for fresh in (False, True) if begun else (True,):
        if fresh:
            partial.unlink(missing_ok=True)
        download(source, partial, record.size, patience, progress)
        reason = store.fault(partial, record) if partial.is_file() else "it is empty"
        if not reason:
            return
        partial.unlink(missing_ok=True)  # what another source had begun may be the wrong part: once more without it
    raise SourceError(f"not the file: {reason}")


def _keep(partial: Path, path: Path) -> None:
    # Not through files.replacing, whose hidden file is of one process: this one outlives it, to be gone on with.
    try:
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(error.strerror or str(error)) from error


def _check_space(partial: Path, record: Weight) -> None:
    held = partial.stat().st_size if partial.is_file() else 0
    free = shutil.disk_usage(partial.parent).free
    if record.size and free < record.size - held:
        raise StoreError(f"{free:,} bytes are free, {record.size - held:,} are needed")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path.with_name(f".lock-{path.name}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("%s: another process is fetching it, waiting.", path)
            lock.acquire()
    except OSError as error:
        raise StoreError(error.strerror or str(error)) from error
    try:
        yield
    finally:
        lock.release()


def _by_hand(record: Weight) -> str:
    size = f"{record.size:,} bytes, " if record.size else ""
    path = store.where(record.name)
    return (
        f"To put the file there by hand: {path} ({size}sha256 {record.sha256}); "
        f"python -m med3d_nets.weights verify {path} checks it."
    )


def _no_source(record: Weight) -> str:
    return (
        f"{record.name}: these are this project's own weights, which have no address: they come with a clone of the "
        f"repository, as {record.path}. Clone it, or name a source in {SOURCES}. {_by_hand(record)}"
    )
