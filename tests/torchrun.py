"""Starting a bundle's config in several processes as a user does, on CPU (gloo) where there is no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds; a deadlock would take for ever


@contextmanager
def started(
    folder: Path,
    bundle: Path,
    configs: Sequence[str],
    processes: int = 2,
    restarts: int = 0,
    nodes: Sequence[str] = ("--standalone",),
    **options: Any,
) -> Iterator[subprocess.Popen[str]]:
    """torchrun over configs of a bundle, by name; options that are no command line's go through a config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps({"bundle_root": str(bundle), **options}))
    files = [*(str(bundle / "configs" / f"{name}.json") for name in configs), str(folder / "options.json")]
    meta = str(bundle / "configs" / "metadata.json")
    command = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc_per_node={processes}"]
    command += [f"--max-restarts={restarts}"]
    command += ["-m", "monai.bundle", "run", "--config_file", str(files), "--meta_file", meta]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def torchrun(folder: Path, bundle: Path, configs: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run configs to their end; see ``started``."""
    with started(folder, bundle, configs, **options) as process:
        output, _ = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, output)
