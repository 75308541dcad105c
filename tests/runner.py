"""Running the configs of a bundle: in this process, or as a user does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigWorkflow

BUNDLES = Path(__file__).parents[1] / "bundles"


class Runner:
    """Runs the configs of one bundle, by name."""

    def __init__(self, bundle: str) -> None:
        self.folder = BUNDLES / bundle

    def config(self, name: str) -> str:
        """Path of a config."""
        return str(self.folder / "configs" / f"{name}.json")

    def run(self, name: str, **override: Any) -> ConfigWorkflow:
        """Run a config in this process, as ``python -m monai.bundle run`` does."""
        options = {"bundle_root": str(self.folder), "device": torch.device("cpu"), **override}
        workflow = ConfigWorkflow(self.config(name), logging_file=False, workflow_type=None, **options)
        hook = sys.excepthook
        try:
            workflow.initialize()
            workflow.run()
            workflow.finalize()
        finally:
            sys.excepthook = hook
        return workflow

    def run_command(self, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``python -m monai.bundle run`` as a process of its own."""
        words = {"config_file": self.config(name), "bundle_root": str(self.folder), "device": "cpu", **options}
        pairs = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "monai.bundle", "run", *pairs]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
