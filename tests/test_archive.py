"""A folder or table of scans in one process: finished cases are skipped, one table tells all, nothing is half done."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from med3d_nets.archive import origin_of
from med3d_nets.errors import InputError
from med3d_nets.results import SegmentationWriter
from tests.bundle_runs import (
    BY_HU,
    ENDINGS,
    AirNet,
    mask_of,
    names,
    refusal,
    restored_excepthook,
    run,
    small_scan,
    write_series,
    write_volume,
)

__all__ = ["restored_excepthook"]  # a fixture

COLUMNS = ["case", "image", "status", "reason", "left_lung_ml", "right_lung_ml"]
COLUMNS += ["total_ml", "warnings", "seconds", "mask"]


class StoppingNet(AirNet):
    """Ends, or is asked to end, while it computes the second case."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls = how, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += x.device.type != "meta"  # the estimate of the memory is no case
        if self.calls == 2 and self.how == "break":
            raise KeyboardInterrupt
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)


def stopping(how: str) -> dict[str, Any]:
    """Settings of a run with a StoppingNet."""
    return {**BY_HU, "network_def": {"_target_": "tests.test_archive.StoppingNet", "how": how}, "precision": "float32"}


def archive(folder: Path, cases: str = "abc") -> Path:
    """Scans that differ: each has its own part of the lungs."""
    image, affine = small_scan()
    for index, case in enumerate(cases):
        write_volume(folder / f"{case}.nii.gz", np.where(np.arange(image.shape[2]) > 4 + index, image, 40), affine)
    return folder


def summary(out: Path) -> dict[str, dict[str, str]]:
    """Rows of the table by case, in its order."""
    with (out / "summary.csv").open(newline="", encoding="utf-8") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}


def content(path: Path) -> bytes:
    """Of a file; of a compressed one without the time in its header."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def statuses(out: Path) -> dict[str, str]:
    return {case: row["status"] for case, row in summary(out).items()}


def times(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {path.name: path.stat().st_mtime_ns for path in out.iterdir() if "summary" not in path.name}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``in`` with three scans, and ``out`` with what a run made of them."""
    folder = tmp_path_factory.mktemp("made")
    archive(folder / "in")
    (folder / "w.pt").write_bytes(b"weights")
    run(folder / "in", folder / "out", weights=str(folder / "w.pt"), **settings())
    return folder


def settings(**more: Any) -> dict[str, Any]:
    return {**BY_HU, "precision": "float32", "skip_finished": True, **more}


def test_a_table_of_all_cases(made: Path) -> None:
    rows = summary(made / "out")
    assert list(rows) == ["a", "b", "c"] and list(rows["a"]) == COLUMNS
    for case, row in rows.items():
        voxels = np.asarray(mask_of(made / "out", case).dataobj)
        assert row["image"] == str(made / "in" / f"{case}.nii.gz") and row["mask"] == f"{case}_seg.nii.gz"
        assert (row["status"], row["reason"]) == ("done", "")
        assert float(row["left_lung_ml"]) == np.count_nonzero(voxels == 1) > 0  # voxels of 1 mL
        assert float(row["total_ml"]) == np.count_nonzero(voxels)
        assert "10.0 mm apart" in row["warnings"] and 0 < float(row["seconds"]) < 600
    assert len({row["total_ml"] for row in rows.values()}) == 3


def test_finished_cases_are_skipped(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    before = times(out)
    run(made / "in", out, weights=str(made / "w.pt"), **settings())
    assert "3 of 3 cases are finished already: skipped" in capsys.readouterr().out
    assert times(out) == before
    rows, first = summary(out), summary(made / "out")
    assert rows == {case: {**row, "status": "skipped"} for case, row in first.items()}
    run(made / "in", out, weights=str(made / "w.pt"), **settings(skip_finished=False))
    assert set(statuses(out).values()) == {"done"}
    assert all(time > before[name] for name, time in times(out).items())


def test_a_new_case_is_added(made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    archive(made / "in", "0")
    run(made / "in", out, weights=str(made / "w.pt"), **settings())
    (made / "in" / "0.nii.gz").unlink()
    assert statuses(out) == {"0": "done", "a": "skipped", "b": "skipped", "c": "skipped"}


Change = Callable[[Path, Path], dict[str, Any]]


def on_files(change: Callable[[Path], Any]) -> Change:
    """A change in the output folder alone."""

    def act(scans: Path, out: Path) -> dict[str, Any]:
        change(out)
        return {}

    return act


def other_image(scans: Path, out: Path) -> dict[str, Any]:
    archive(scans, "a")
    return {}


def other_weights(scans: Path, out: Path) -> dict[str, Any]:
    (out.parent / "other.pt").write_bytes(b"other")
    return {"weights": str(out.parent / "other.pt")}


def other_bundle(out: Path) -> None:
    report = json.loads((out / "a_seg.json").read_text())
    report["bundle"]["version"] = "0.0.0"
    (out / "a_seg.json").write_text(json.dumps(report))


CHANGES: dict[str, tuple[Change, str]] = {
    "setting": (lambda scans, out: {"keep_largest": False}, "abc"),
    "weights": (other_weights, "abc"),
    "image": (other_image, "a"),
    "bundle": (on_files(other_bundle), "a"),
    "no mask": (on_files(lambda out: (out / "a_seg.nii.gz").unlink()), "a"),
    "half a mask": (on_files(lambda out: os.truncate(out / "a_seg.nii.gz", 100)), "a"),
    "no picture": (on_files(lambda out: (out / "a_seg.png").unlink()), "a"),
    "no report": (on_files(lambda out: (out / "a_seg.json").unlink()), "a"),
    "no JSON": (on_files(lambda out: (out / "a_seg.json").write_text("{")), "a"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_it_would_be_made_now_is_made_anew(name: str, made: Path, tmp_path: Path) -> None:
    out = shutil.copytree(made / "out", tmp_path / "out")
    shutil.copytree(made / "in", tmp_path / "in")
    change, anew = CHANGES[name]
    try:
        run(made / "in", out, **{"weights": str(made / "w.pt"), **settings(), **change(made / "in", out)})
    finally:  # the scans with their times are those of the next change too
        shutil.copytree(tmp_path / "in", made / "in", dirs_exist_ok=True)
    assert statuses(out) == {case: "done" if case in anew else "skipped" for case in "abc"}
    results = {f"{case}_seg{ending}" for case in "abc" for ending in ENDINGS}
    assert names(out) == {*results, "summary.csv", "summary.csv.old"}


def test_origin_of_images_in_several_files(tmp_path: Path) -> None:
    """A slice of a series, or the voxels beside a header, that changes makes it another image."""
    image, affine = small_scan()
    series = write_series(tmp_path / "s", image[:, :, :3], affine)
    (tmp_path / "v.mhd").write_text("ElementDataFile = v.raw")
    (tmp_path / "v.raw").write_bytes(b"1234")
    before = [origin_of(path, {"overlap": 0.5}) for path in (series, tmp_path / "v.mhd")]
    assert before == [origin_of(path, {"overlap": 0.5}) for path in (series, tmp_path / "v.mhd")]
    (series / "IM0001").unlink()
    os.utime(tmp_path / "v.raw", (1, 10**10))
    after = [origin_of(path, {"overlap": 0.5}) for path in (series, tmp_path / "v.mhd")]
    assert before[0]["image_bytes"] > after[0]["image_bytes"]
    assert before[1]["image_modified"] < after[1]["image_modified"]


def test_a_table_names_the_cases_and_failures_have_their_reason(tmp_path: Path) -> None:
    archive(tmp_path / "in")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"no volume")
    (tmp_path / "list.csv").write_text("case,image\nthird,in/c.nii.gz\nbad,in/b.nii.gz\nfirst,in/a.nii.gz\n")
    message = refusal(tmp_path / "list.csv", tmp_path / "out", **BY_HU)
    assert "1 of 3 cases failed:\n  bad:" in message
    rows = summary(tmp_path / "out")
    assert {case: row["status"] for case, row in rows.items()} == {"third": "done", "bad": "failed", "first": "done"}
    assert "b.nii.gz: cannot be read" in rows["bad"]["reason"] and rows["bad"]["total_ml"] == rows["bad"]["mask"] == ""
    assert rows["third"]["mask"] == "third_seg.nii.gz"


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_request_to_stop_costs_no_case(prefetch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM during the second of three: it is finished, the third is not begun, and no table looks new."""
    scans, out = archive(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "summary.csv").write_text("of an earlier run")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="the case in hand, b, is finished. Start the same command again"):
        run(scans, out, prefetch=prefetch, **stopping("ask"))
    assert signal.getsignal(signal.SIGTERM) is before
    finished = {f"{case}_seg{ending}" for case in "ab" for ending in ENDINGS}
    assert names(out) == finished | {"summary.csv.old"}
    run(scans, out, **{**stopping("never"), "skip_finished": True})
    assert statuses(out) == {"a": "skipped", "b": "skipped", "c": "done"}


def test_what_a_killed_run_left_is_removed(made: Path, tmp_path: Path) -> None:
    """Half-written files of the cases that are run now; those of other cases may be another process's."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    left = [".partial_999_a_seg.nii.gz", ".partial_999_b_seg.json", ".partial_999_other_seg.json"]
    for name in left:
        (out / name).write_text("half")
    (out / "a_seg.json").unlink()
    run(made / "in", out, weights=str(made / "w.pt"), **settings())
    assert {name for name in names(out) if name.startswith(".")} == {left[1], left[2]}


def test_with_and_without_prefetch_the_results_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files to the byte, and errors of reading and of writing, each told of its own case."""
    scans = archive(tmp_path / "in", "abcde")
    (scans / "b.nii.gz").write_bytes(b"no volume")
    write = SegmentationWriter._write_files

    def full(self: SegmentationWriter, case: str, *args: Any) -> None:
        if case in "ce":
            raise InputError(f"no space for {case}")
        write(self, case, *args)

    monkeypatch.setattr(SegmentationWriter, "_write_files", full)
    messages = []
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "c_seg.json").write_text("of an earlier run")
        messages.append(refusal(scans, tmp_path / name, prefetch=name == "with", **BY_HU))
        assert "2 of 5 cases done" in capsys.readouterr().out
    assert messages[0] == messages[1]
    assert "3 of 5 cases failed:\n  b: " in messages[0] and "\n  c: no space for c\n  e: no space for e" in messages[0]
    one, two = tmp_path / "with", tmp_path / "without"
    assert names(one) == names(two) > {"a_seg.nii.gz", "c_seg.json.old", "d_seg.png"}
    for name in names(one):
        if name.endswith((".nii.gz", ".png")):
            assert content(one / name) == content(two / name), name
    reports = [json.loads((out / "d_seg.json").read_text()) for out in (one, two)]
    assert [{**report, "created": "", "seconds": 0} for report in reports] == [
        {**reports[0], "created": "", "seconds": 0}
    ] * 2
    assert statuses(one) == statuses(two) == {"a": "done", "b": "failed", "c": "failed", "d": "done", "e": "failed"}
