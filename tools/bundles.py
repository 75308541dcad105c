"""Make, check and ship the bundles in ``bundles/``.

python -m tools.bundles make [NAMES…]            bundles from their templates (see tools/bundle_source.py)
python -m tools.bundles make --check             write nothing; name what differs, exit code 1 if anything does
python -m tools.bundles check FOLDERS… [--fast]  every fault of bundle folders, exit code 1 if there is one
python -m tools.bundles ship CHECKPOINT NAME     trained weights into a bundle, in half precision
"""

from __future__ import annotations

import sys
from pathlib import Path

import fire

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.switches import is_on
from med3d_nets.weights import file_sha256
from tools import bundle_ship, bundle_source
from tools.bundle_check import check_bundle

ROOT = Path(__file__).resolve().parents[1]


def make(
    *names: str,
    check: bool = False,
    templates: str | Path = ROOT / "tools" / "templates",
    bundles: str | Path = ROOT / "bundles",
) -> None:
    """Write bundles from their templates, or compare them.

    Args:
        names: bundles to make, all of them by default.
        check: write nothing, name every file that is missing, differs or is made by nothing, and exit with 1.
        templates: folder of templates, one per task.
        bundles: folder of the bundles.

    Raises:
        InputError: no such bundle, or a faulty template.
    """
    templates, bundles, check = Path(templates), Path(bundles), is_on(check)
    known = bundle_source.all_bundles(templates)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{', '.join(unknown)}: no such bundle. There are {', '.join(known)}.")
    changes = []
    for name in names or known:
        files = bundle_source.render(*known[name], bundles, ROOT / "LICENSE")
        changes += (bundle_source.differences if check else bundle_source.write)(files, bundles / name)
    strangers = [] if names else _strangers(bundles, set(known))
    print("".join(f"{line}\n" for line in strangers + changes * check), end="")
    if check and (changes or strangers):
        sys.exit("The bundles differ from what their source makes; run python -m tools.bundles make.")
    print(f"{len(names or known)} bundles, {len(changes)} files {'differ' if check else 'brought up to date'}")


def check(*folders: str, fast: bool = False) -> None:
    """Print every fault of bundle folders and exit with 1 if there is one.

    Args:
        folders: bundles.
        fast: leave out TorchScript, which takes most of the time.

    Raises:
        InputError: no folder is given.
    """
    if not folders:
        raise InputError("No folder given: python -m tools.bundles check bundles/*")
    count = 0
    for folder in folders:
        faults = check_bundle(folder, is_on(fast))
        print(f"{folder}: {len(faults) or 'no'} fault{'s' * (len(faults) != 1)}", flush=True)
        print("".join(f"  {fault}\n" for fault in faults), end="")
        count += len(faults)
    if count:
        sys.exit(f"{len(folders)} bundles, {count} faults")
    print(f"{len(folders)} bundles, no faults")


def ship(checkpoint: str, name: str, bundles: str | Path = ROOT / "bundles") -> None:
    """Write trained weights into a bundle, in half precision.

    Args:
        checkpoint: state dict of the bundle's network.
        name: the bundle.
        bundles: folder of the bundles.

    Raises:
        InputError: see bundle_ship.ship.
    """
    path = bundle_ship.ship(Path(checkpoint), Path(bundles) / name)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {file_sha256(path)}")
    print("Now run python -m tools.bundles make: metadata.json and the model card tell of the weights.")


def _strangers(bundles: Path, known: set[str]) -> list[str]:
    folders = sorted(path for path in bundles.glob("*/") if path.is_dir() and not path.name.startswith("."))
    return [f"{path}: no template makes this bundle; remove it" for path in folders if path.name not in known]


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make, "check": check, "ship": ship})
