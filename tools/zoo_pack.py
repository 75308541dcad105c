"""Bundles into a zoo's folder: zips that can be trusted to be what the repository has, and their index."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from monai.bundle import ConfigParser

from med3d_nets.errors import InputError
from med3d_nets.weights import file_sha256
from med3d_nets.weights.download import Patience, SourceError, StoreError, download
from tools.bundle_check import check_bundle
from tools.bundle_folder import Bundle
from tools.zoo_archive import pack, parts
from tools.zoo_index import Record, describe, parse_key

LARGE_FILES = "large_files.yml"


def pack_bundle(
    folder: Path, out: Path, index: dict[str, Record], large_files: str = "keep", url: str = "", fast: bool = False
) -> str:
    """Pack one bundle into a zoo's folder and put its record into the index.

    Args:
        folder: the bundle.
        out: the zoo's folder; the zip is ``NAME_vVERSION.zip``.
        index: the zoo's records; changed.
        large_files: "keep" packs ``large_files.yml``, so that ``monai.bundle download_large_files`` gets its files;
            "resolve" gets them now, checks their hashes and packs them.
        url: address of the folder that will hold the zip; empty: beside the index.
        fast: leave out the slow checks of the bundle.

    Returns:
        The record's key, ``NAME_vVERSION``.

    Raises:
        InputError: the bundle has faults (a version or name that MONAI would misread among them); the index has this
            version with other bytes; a large file cannot be had.
    """
    faults = check_bundle(folder, fast)
    if faults:
        told = "".join(f"\n  {fault}" for fault in faults)
        raise InputError(f"{folder}: {len(faults)} faults; correct them before it is packed.{told}")
    bundle = Bundle(folder)
    key = f"{bundle.name}_v{bundle.metadata['version']}"
    parse_key(key)
    path = out / f"{key}.zip"
    with _files(folder, large_files) as files:
        pack({f"{bundle.name}/{name}": file for name, file in files.items()}, path.with_suffix(".new"))
    new = path.with_suffix(".new")
    if key in index and index[key]["sha256"] != file_sha256(new):
        new.unlink()
        raise InputError(
            f"{key}: the index has this version with other bytes, which some may have downloaded. Give the bundle a "
            "new version in its metadata.json, or pack into another folder."
        )
    new.replace(path)
    index[key] = describe(bundle, path, f"{url.rstrip('/')}/{path.name}" if url else path.name)
    return key


@contextmanager
def _files(folder: Path, large_files: str) -> Iterator[Mapping[str, Path]]:
    """What is packed, by path within the bundle."""
    if large_files not in ("keep", "resolve"):
        raise InputError(f"large_files={large_files!r}: allowed are 'keep' and 'resolve'.")
    files = {name: folder / name for name in parts(folder)}
    if large_files == "keep" or LARGE_FILES not in files:
        yield files
        return
    entries = ConfigParser.load_config_file(files.pop(LARGE_FILES))["large_files"]
    with tempfile.TemporaryDirectory() as temporary:
        for number, entry in enumerate(entries):
            files[entry["path"]] = _large_file(folder / entry["path"], entry, Path(temporary) / str(number))
        yield files


def _large_file(here: Path, entry: Mapping[str, str], path: Path) -> Path:
    """A large file with the right hash: from the bundle's folder, or from its address."""
    if not here.is_file() or file_sha256(here) != entry["hash_val"]:
        try:
            download(entry["url"], path, None, Patience(), progress=True)
        except (SourceError, StoreError) as error:
            raise InputError(
                f"{entry['url']}: {error}. Pack with large_files keep, or put the file at {here}."
            ) from error
        here = path
    found = file_sha256(here) if here.is_file() else "of nothing"
    if found != entry["hash_val"]:
        raise InputError(f"{entry['url']}: sha256 {found}, {LARGE_FILES} tells {entry['hash_val']}. Nothing is packed.")
    return here
