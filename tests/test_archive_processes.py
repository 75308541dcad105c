"""An archive of scans shared out by torchrun, also when one of the processes is killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.bundle_runs import (
    BUNDLE,
    BY_HU,
    ENDINGS,
    AirNet,
    mask_of,
    names,
    refusal,
    restored_excepthook,
)
from tests.test_archive import archive, statuses, summary, times
from tests.torchrun import TIMEOUT, started, torchrun

__all__ = ["restored_excepthook"]  # a fixture

CONFIGS = ("inference", "multi_gpu_inference")
SLOW = 5.0  # seconds


class SlowNet(AirNet):
    """Takes a while for each case, before which it leaves a file named after its process in a folder."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.calls = Path(folder), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "meta":  # the estimate of the memory is no case
            self.calls += 1
            (self.folder / f"{os.getpid()}_{self.calls}").touch()
            time.sleep(SLOW)
        return super().forward(x)


def options(scans: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {"dataset_dir": str(scans), "output_dir": str(out), "device": "cpu", "precision": "float32", **BY_HU, **more}


def results(cases: str) -> set[str]:
    return {f"{case}_seg{ending}" for case in cases for ending in ENDINGS}


@pytest.mark.slow
def test_two_processes_share_five_cases(tmp_path: Path) -> None:
    """Of a table, in its order; the bad case of the second process stops nobody, and the first one tells of it."""
    archive(tmp_path / "in", "abcde")
    (tmp_path / "in" / "d.nii.gz").write_bytes(b"no volume")
    lines = [f"in/{case}.nii.gz,{case}" for case in "edcba"]  # d is the second, and so the other process's
    (tmp_path / "list.csv").write_text("\n".join(["image,case", *lines]))
    out = tmp_path / "out"
    done = torchrun(tmp_path, BUNDLE, CONFIGS, **options(tmp_path / "list.csv", out))
    assert done.returncode != 0 and re.search(r"Error: 1 of 5 cases failed:\n.*  d: .*cannot be read", done.stdout), (
        done.stdout
    )
    assert done.stdout.count("Error: 1 of 5") == 1 and "]: Traceback" not in done.stdout  # torchrun's own follows
    assert "3 of 3 cases done" in done.stdout and "1 of 2 cases done" in done.stdout
    assert "5 cases (4 done, 0 skipped, 1 failed)" in done.stdout
    assert names(out) == results("abce") | {"summary.csv"}
    refusal(tmp_path / "list.csv", tmp_path / "one", **BY_HU, precision="float32")
    rows, alone = summary(out), summary(tmp_path / "one")
    assert list(rows) == list("edcba") and "cannot be read" in rows["d"]["reason"]
    assert [{**row, "seconds": ""} for row in rows.values()] == [{**row, "seconds": ""} for row in alone.values()]
    for case in "abce":
        one, two = (np.asarray(mask_of(folder, case).dataobj) for folder in (out, tmp_path / "one"))
        np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_fewer_cases_than_processes(tmp_path: Path) -> None:
    done = torchrun(tmp_path, BUNDLE, CONFIGS, processes=3, **options(archive(tmp_path / "in", "ab"), tmp_path / "out"))
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("1 of 1 cases done") == 2 and "0 of 0 cases done" in done.stdout
    assert statuses(tmp_path / "out") == {"a": "done", "b": "done"}


@pytest.mark.slow
def test_a_wrong_path_ends_all_processes_in_clear_words(tmp_path: Path) -> None:
    done = torchrun(tmp_path, BUNDLE, CONFIGS, **options(tmp_path / "none", tmp_path / "out"))
    assert done.returncode != 0 and "none' does not exist" in done.stdout and "]: Traceback" not in done.stdout


@pytest.mark.slow
def test_a_killed_process_loses_its_case_in_hand_alone(tmp_path: Path) -> None:
    """Four processes, three cases each; one is killed in its second case, and the same command starts again."""
    scans, out, log = archive(tmp_path / "in", "abcdefghijkl"), tmp_path / "out", tmp_path / "log"
    log.mkdir()
    slow = {"network_def": {"_target_": "tests.test_archive_processes.SlowNet", "folder": str(log)}}
    given = options(scans, out, **slow)
    with started(tmp_path, BUNDLE, CONFIGS, processes=4, **given) as process:
        wait(process, lambda: len(list(log.glob("*_2"))) == 4 and results("abcd") <= names(out))
        killed = int(sorted(log.glob("*_2"))[0].name.partition("_")[0])
        os.kill(killed, signal.SIGKILL)
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert output.count("Asked to stop (SIGTERM): the case in hand") == 3, output
    assert not list(log.glob("*_3")) and not (out / "summary.csv").exists()
    finished = {case for case in "abcdefghijkl" if results(case) <= names(out)}
    assert set("abcd") < finished and len(finished) == 7, (finished, output)
    assert names(out) == results("".join(finished))
    before = times(out)
    shutil.rmtree(log)
    log.mkdir()
    again = torchrun(tmp_path, BUNDLE, CONFIGS, processes=4, **given)
    assert again.returncode == 0, again.stdout
    assert statuses(out) == {case: "skipped" if case in finished else "done" for case in "abcdefghijkl"}
    assert before.items() <= times(out).items() and len(list(log.iterdir())) == 5
    assert all(row["total_ml"] and row["mask"] for row in summary(out).values())
    assert names(out) == results("abcdefghijkl") | {"summary.csv"}


@pytest.mark.slow
@pytest.mark.parametrize("repetition", range(2))
def test_torchrun_restarts_what_was_killed(repetition: int, tmp_path: Path) -> None:
    """The first process is killed, whose address the others must not find again."""
    scans, out, log = archive(tmp_path / "in", "abcdef"), tmp_path / "out", tmp_path / "log"
    log.mkdir()
    slow = {"network_def": {"_target_": "tests.test_archive_processes.SlowNet", "folder": str(log)}}
    with started(tmp_path, BUNDLE, CONFIGS, restarts=1, **options(scans, out, **slow)) as process:
        wait(process, lambda: len(list(log.glob("*_2"))) == 2 and results("ab") <= names(out))
        first = {path.name.partition("_")[0] for path in log.iterdir()}
        os.kill(int(sorted(log.glob("*_2"))[0].name.partition("_")[0]), signal.SIGKILL)
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    # 3, or fewer where the machine's load delays the kill: the restarted processes do what is left, each case once
    left = [path for path in log.iterdir() if path.name.partition("_")[0] not in first]
    assert 1 <= len(left) <= 3 and {"a", "b"} <= {case for case, status in statuses(out).items() if status == "skipped"}
    assert sorted(statuses(out).values()) == ["done"] * len(left) + ["skipped"] * (6 - len(left))


def wait(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not ready():
        assert process.poll() is None and time.monotonic() < end, "the processes have not come so far"
        time.sleep(0.05)
