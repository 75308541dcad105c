"""Run a bundle's config as a user does, with a log, and tell what it was run with."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from med3d_nets.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
_LOG_LINES = 25  # enough for all faults of a domain


def run_bundle(bundle: Path, config: str, folder: Path, options: dict[str, Any]) -> None:
    """Run one config; its output goes to ``FOLDER.log``.

    Args:
        bundle: folder of the bundle.
        config: ``train`` or ``evaluate``.
        folder: the run's output_dir, made if it is not there.
        options: keys of the config.

    Raises:
        InputError: the run failed; names the log and tells how it ends.
    """
    files = {"config_file": bundle / "configs" / f"{config}.json", "logging_file": bundle / "configs" / "logging.conf"}
    options = {**files, "bundle_root": bundle, "output_dir": folder, **options}
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    folder.mkdir(parents=True, exist_ok=True)
    log = f"{folder}.log"
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        end = "\n".join(Path(log).read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:])
        raise InputError(f"{folder}: the {config} run failed. The end of its log, {log}:\n{end}")


def commit() -> str:
    """Commit of this repository, with ``+`` where files differ from it; ``unknown`` outside of a clone."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False).returncode
    return head.stdout.strip() + "+" * bool(changed) if head.returncode == 0 else "unknown"


def machine() -> str:
    """Kind of machine: number of cores, architecture, and the GPU where there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}{gpu}"


def peak_bytes() -> int:
    """Peak memory of this process; ``ru_maxrss`` alone would be that of its parent where the parent has more."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
