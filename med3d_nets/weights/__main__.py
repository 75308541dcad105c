"""Weights on the command line, ``python -m med3d_nets.weights COMMAND``.

list, fetch, verify, where, show, convert, overlap. Each is a function of the package; here is only what it prints.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import fire

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.weights import report, store


def list_weights(json: bool = False) -> None:
    """Print the registry: the authors' released files and this project's own.

    Args:
        json: everything that is on record, as JSON.
    """
    print(report.as_json(report.records()) if json else report.table())


def fetch(*names: str) -> None:
    """Have files on this machine: download those that are not, check all, and print where they are.

    Args:
        names: names that `list` prints.

    Raises:
        InputError: no name is given, a name is unknown, or a file cannot be had.
    """
    from med3d_nets.weights.fetch import fetch

    if not names:
        raise InputError("No name given: python -m med3d_nets.weights fetch NAME…; list prints the names.")
    for record in [store.record_of(str(name)) for name in names]:
        print(fetch(record.name), flush=True)


def verify(path: str, name: str = "") -> None:
    """Hold a file against the registry, by size and sha256.

    Args:
        path: the file.
        name: name that it should be; empty: any of the registry.

    Raises:
        InputError: it is not that file, or none of the registry's.
    """
    record = store.verify(str(path), str(name) or None)
    print(f"{path}: is {record.name}, sha256 {record.sha256}")


def where(name: str) -> None:
    """Print where a file is, or where it belongs if it is not there.

    Args:
        name: a name that `list` prints.

    Raises:
        InputError: the name is unknown.
    """
    found = store.find(str(name))
    print(found or store.where(str(name)))
    if found is None:
        print(f"Not there yet: python -m med3d_nets.weights fetch {name}", file=sys.stderr)


def show(path: str, json: bool = False) -> None:
    """Print what a weights file holds.

    Args:
        path: a checkpoint, or a name whose file is on this machine.
        json: everything, as JSON.

    Raises:
        InputError: there is no such file, or it is no checkpoint.
    """
    place: Path | None = Path(str(path))
    if str(path) in store.WEIGHTS and not Path(str(path)).is_file():
        place = store.find(str(path))
    if place is None:
        raise InputError(f"{path}: is not on this machine. Get it: python -m med3d_nets.weights fetch {path}.")
    print(report.as_json(report.describe(place)) if json else report.described(place))


def convert(source: str, target: str, to: str = "", bias_downsample: bool = False) -> None:
    """Convert weights from one form to another and print what was done.

    Args:
        source: file (.pt, .pth, .pth.tar, .safetensors), or a name that `list` prints.
        target: file to write.
        to: bundle, encoder, medicalnet or monai; empty: bundle if there is a segmentation head, else encoder.
        bias_downsample: for monai: with the biases that MONAI's networks have by default.

    Raises:
        InputError: the source is not of a known form, or the target cannot be written.
    """
    from med3d_nets.weights.convert import convert

    # The notes, which are logged for those who call the function, are part of what is printed.
    logging.getLogger("med3d_nets.weights.convert").setLevel(logging.ERROR)
    print(convert(str(source), str(target), to=str(to), bias_downsample=bias_downsample))


def overlap(name: str, dataset_json: str, section: str = "") -> None:
    """Print whether evaluation data may have been seen when weights were trained.

    Args:
        name: a name that `list` prints, or a file that has one's hash.
        dataset_json: dataset.json of the data, or its folder.
        section: list of cases in it; empty: all.

    Raises:
        InputError: unknown weights, or no readable dataset.json.
    """
    from med3d_nets.weights.provenance import overlap

    print(overlap(str(name), str(dataset_json), str(section)))


COMMANDS = {
    "list": list_weights,
    "fetch": fetch,
    "verify": verify,
    "where": where,
    "show": show,
    "convert": convert,
    "overlap": overlap,
}

if __name__ == "__main__":
    clear_errors()
    fire.Fire(COMMANDS, name="python -m med3d_nets.weights")
