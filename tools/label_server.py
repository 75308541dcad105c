"""Serve bundles to annotators: 3D Slicer and OHIF, by MONAI Label.

    python -m tools.label_server start --bundle lung_ct_segmentation_resnet10 --studies SCANS

Run with the Python of the server's environment, which ``make label-env`` makes; ``make label-server`` does both.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import fire

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "tools" / "monailabel_app"
FORMATS = ("*.nii.gz", "*.nii", "*.nrrd")
"""Files that MONAI Label finds in a folder of scans and the bundles read."""


def prepare(bundle: str, out: str = "label_app", domain: str = "", bundles: str | Path = ROOT / "bundles") -> Path:
    """Make the app's folder with a copy of a bundle; one that is there stays, with what it has learnt.

    Args:
        bundle: name of a segmentation bundle with weights.
        out: the app's folder.
        domain: of a multi-domain bundle, the one to serve: the copy has its classes alone, and is named after it.
        bundles: folder of the bundles.

    Returns:
        The copy.

    Raises:
        InputError: no such bundle or domain, or it has no weights or does not segment.
    """
    source = Path(bundles) / bundle
    _check_bundle(source)
    domains = _domains(source)
    if domain and domain not in domains:
        known = f"known are {', '.join(domains)}" if domains else "this bundle has none"
        raise InputError(f"domain={domain!r}: {known}.")
    if domains and not domain:
        raise InputError(
            f"{bundle} has a branch for each of several domains: choose one, --domain {' | '.join(domains)}."
        )
    app = Path(out)
    (app / "model").mkdir(parents=True, exist_ok=True)
    with replacing(app / "main.py") as hidden:
        shutil.copyfile(APP / "main.py", hidden)
    copy = app / "model" / (bundle.replace("multidomain", domain) if domain else bundle)
    if not copy.exists():
        hidden = copy.with_name(f".partial_{os.getpid()}_{copy.name}")
        shutil.copytree(source, hidden, ignore=shutil.ignore_patterns("runs", "data", "*.pth"))
        if domain:
            _reduce(hidden, domain, domains[domain])
        os.replace(hidden, copy)
    return copy


def start(
    bundle: str,
    studies: str,
    port: int = 8000,
    host: str = "127.0.0.1",
    out: str = "label_app",
    domain: str = "",
    uncertainty: bool | str = False,
) -> None:
    """Serve one bundle until the program is stopped (Ctrl-C).

    Args:
        bundle: see ``prepare``.
        studies: folder of the scans (.nii.gz, .nii, .nrrd); labels go into its ``labels``.
        port: to listen at.
        host: address to listen at; 0.0.0.0 lets other machines in, and MONAI Label asks nobody for a password.
        out: see ``prepare``.
        domain: likewise.
        uncertainty: also offer the scans by the network's uncertainty, which computes on them in the background.

    Raises:
        InputError: see ``prepare``; or there are no scans, or MONAI Label is not installed.
    """
    clear_errors()
    if find_spec("monailabel") is None:
        raise InputError(
            f"{sys.executable} has no MONAI Label. Run make label-server, which makes an environment of it."
        )
    scans = Path(studies)
    if not any(path for pattern in FORMATS for path in scans.glob(pattern)):
        found = "holds no scan" if scans.is_dir() else "is no folder"
        raise InputError(f"studies '{studies}' {found}. Give a folder of {', '.join(FORMATS)}; convert DICOM first.")
    copy = prepare(bundle, out, domain)
    print(_words(copy, scans, host, port), flush=True)
    options = {"models": copy.name, "uncertainty": str(uncertainty).lower()}
    conf = [word for pair in options.items() for word in ("--conf", *pair)]
    where = ["--app", str(Path(out)), "--studies", str(scans), "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "monailabel.main", "start_server", *where, *conf])


def _check_bundle(source: Path) -> None:
    have = sorted(path.parents[1].name for path in source.parent.glob("*_segmentation_*/models/model.pt"))
    if source.name not in have:
        wrong = "has no weights, models/model.pt" if (source / "configs").is_dir() else "is no such bundle"
        wrong = wrong if "_segmentation" in source.name or not source.is_dir() else "does not segment"
        raise InputError(f"{source.name} {wrong}. With weights: {', '.join(have) or 'none'}.")


def _domains(source: Path) -> dict[str, list[str]]:
    """Classes of each domain of a multi-domain bundle; empty for others."""
    config = json.loads((source / "configs" / "inference.json").read_text(encoding="utf-8"))
    return {name: record["classes"] for name, record in config.get("shipped_domains", {}).items()}


def _reduce(copy: Path, domain: str, classes: list[str]) -> None:
    """Let a copy of a multi-domain bundle be one of a single domain: its default, and the classes that it tells of."""
    path = copy / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "domain": domain}, indent=4), encoding="utf-8")
    path = copy / "configs" / "metadata.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    metadata["network_data_format"]["outputs"]["pred"] |= {
        "num_channels": len(classes) + 1,
        "channel_def": {str(index): name for index, name in enumerate(["background", *classes])},
    }
    path.write_text(json.dumps(metadata, indent=4), encoding="utf-8")
    for config_file in (copy / "configs").glob("*train.json"):  # that trains all domains, from a manifest
        config_file.unlink()


def _words(copy: Path, scans: Path, host: str, port: int) -> str:
    shown = "this machine's name or address" if host == "0.0.0.0" else host
    return f"""
{copy.name} is served from {copy}
  (a training changes the weights there; remove the folder to start from the bundle's own again)
Scans are those of {scans}, labels go to {scans / "labels"}

In 3D Slicer, module MONAI Label (extension "MONAILabel"):
  MONAI Label server:  http://{shown}:{port}
  then: Refresh, Next Sample, Auto Segmentation > Model {copy.name} > Run, correct, Submit Label

Stop with Ctrl-C.
"""


if __name__ == "__main__":
    fire.Fire({"prepare": prepare, "start": start})
