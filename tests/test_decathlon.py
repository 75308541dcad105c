"""Fetching the Decathlon: small archives of the same form from a server on loopback, with its bad days."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.apps import DecathlonDataset

from med3d_nets.errors import InputError
from med3d_nets.inputs import load_volume
from med3d_nets.manifest import read_manifest
from med3d_nets.weights.download import Patience
from tools import decathlon

SPLEEN, PROSTATE = "Task09_Spleen", "Task05_Prostate"
QUICK = Patience(timeout=5.0, tries=2, wait=0.01)


def make_archive(folder: Path, task: str, channels: int) -> Path:
    """An archive as the Decathlon's: dataset.json, imagesTr, labelsTr below the task's name."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(3):
        shape = (10, 11, 12) + ((channels,) if channels > 1 else ())
        image = rng.normal(size=shape).astype(np.float32)
        label = np.zeros((10, 11, 12), dtype=np.uint8)
        label[3:6, 3:6, 3:6] = 1
        entry = {"image": f"./imagesTr/case_{number}.nii.gz", "label": f"./labelsTr/case_{number}.nii.gz"}
        for path, voxels in zip(entry.values(), (image, label), strict=True):
            (folder / task / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 3.0, 1.0])), folder / task / path)
        entries.append(entry)
    index = {
        "name": task,
        "description": "test",
        "reference": "none",
        "licence": "none",
        "tensorImageSize": "4D" if channels > 1 else "3D",
        "modality": {str(i): f"MRI{i}" for i in range(channels)},
        "labels": {"0": "background", "1": "organ"},
        "numTraining": 3,
        "numTest": 0,
        "training": entries,
        "test": [],
    }
    (folder / task / "dataset.json").write_text(json.dumps(index))
    archive = folder / f"{task}.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder / task, arcname=task)
    return archive


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, with Range as the Decathlon's server has it; the server may cut an answer short."""

    def do_GET(self) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.server.ranges.append(start)  # type: ignore[attr-defined]
        end = min(len(content), self.server.cuts.pop(0)) if self.server.cuts else len(content)  # type: ignore[attr-defined]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    source = tmp_path / "source"
    source.mkdir()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(source)))
    http.daemon_threads = True
    http.cuts, http.ranges = [], []  # type: ignore[attr-defined]
    archives = {task: make_archive(source, task, channels) for task, channels in ((SPLEEN, 1), (PROSTATE, 2))}
    urls = {task: f"http://127.0.0.1:{http.server_address[1]}/{task}.tar" for task in archives}
    md5 = {task: hashlib.md5(path.read_bytes()).hexdigest() for task, path in archives.items()}
    monkeypatch.setattr(DecathlonDataset, "resource", {**DecathlonDataset.resource, **urls})
    monkeypatch.setattr(DecathlonDataset, "md5", {**DecathlonDataset.md5, **md5})
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()


def test_fetch_writes_a_manifest_that_trains(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    root = tmp_path / "root"
    decathlon.fetch(str(root), f"{SPLEEN},{PROSTATE}", hold_out=0.3)
    domains = {domain.name: domain for domain in read_manifest(root / "manifest.json")}
    assert list(domains) == ["prostate_mr", "spleen_ct"]
    assert {name: (len(d.training_cases()), len(d.held_out_cases())) for name, d in domains.items()} == {
        "prostate_mr": (2, 1),
        "spleen_ct": (2, 1),
    }
    assert domains["prostate_mr"].modality == "MRI0"
    assert not list(root.glob(".partial*"))


def test_of_several_sequences_the_first_is_taken(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    decathlon.fetch(str(tmp_path / "root"), PROSTATE)
    [domain] = read_manifest(tmp_path / "root" / "manifest.json")
    case = domain.cases[1]
    whole = nib.load(tmp_path / "root" / PROSTATE / "imagesTr" / "case_1.nii.gz")
    image = load_volume(case["image"])
    np.testing.assert_array_equal(image[0].numpy(), np.asarray(whole.dataobj)[..., 0])
    np.testing.assert_allclose(image.affine, whole.affine)
    assert load_volume(case["label"]).shape == image.shape


def test_a_cut_download_goes_on_at_its_byte(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    server.cuts[:] = [4000]  # type: ignore[attr-defined]
    decathlon.fetch(str(tmp_path / "root"), SPLEEN, patience=QUICK)
    assert server.ranges == [0, 4000]  # type: ignore[attr-defined]
    assert (tmp_path / "root" / SPLEEN / "dataset.json").is_file()


def test_a_finished_task_is_not_fetched_again(
    server: ThreadingHTTPServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decathlon.fetch(str(tmp_path / "root"), SPLEEN)
    server.ranges.clear()  # type: ignore[attr-defined]
    decathlon.fetch(str(tmp_path / "root"), SPLEEN)
    assert server.ranges == [] and f"{SPLEEN}: is there already" in capsys.readouterr().out  # type: ignore[attr-defined]


def test_a_wrong_archive_is_refused_and_not_kept(
    server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DecathlonDataset.md5, SPLEEN, "0" * 32)
    with pytest.raises(InputError, match=rf"{SPLEEN}: http://.* could not be fetched \(.*hash.*md5 0000"):
        decathlon.fetch(str(tmp_path / "root"), SPLEEN)
    assert not (tmp_path / "root" / SPLEEN).exists()
    assert not list((tmp_path / "root").rglob("*.tar"))


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DecathlonDataset.resource, SPLEEN, "http://127.0.0.1:9/Task09_Spleen.tar")
    with pytest.raises(InputError, match=r"no connection .*Run the command again"):
        decathlon.fetch(str(tmp_path / "root"), SPLEEN, patience=QUICK)


def test_unknown_tasks_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Task10_Colon: not of 3DSeg-8"):
        decathlon.fetch(str(tmp_path), "Task10_Colon")
    with pytest.raises(InputError, match="none of Task01_BrainTumour"):
        decathlon.prepare(str(tmp_path))
