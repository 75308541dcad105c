"""The zoo: bundles are packed as the same bytes each time, served, published and compared, and MONAI runs them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import monai.bundle
import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch

from med3d_nets.errors import InputError
from tests.bundle_runs import small_scan, write_volume
from tests.zoo_server import LUNG, SMALL, dist, served
from tools import zoo, zoo_pack
from tools.bundle_folder import Bundle
from tools.bundle_metadata import SCHEMA
from tools.zoo_archive import pack
from tools.zoo_diff import diff
from tools.zoo_index import load_index, parse_key

__all__ = ["dist", "served"]  # fixtures

ROOT = Path(__file__).parents[1]


class TestPack:
    def test_the_same_files_are_the_same_bytes(self, dist: Path, tmp_path: Path) -> None:
        """Whatever the clock, the files' modes and the folder's other content."""
        copy = shutil.copytree(ROOT / "bundles" / SMALL, tmp_path / "bundles" / SMALL)
        os.utime(copy / "LICENSE", (0, 0))
        (copy / "LICENSE").chmod(0o600)
        (copy / "runs").mkdir()
        (copy / "runs" / "patient.nii").touch()
        zoo.pack(SMALL, out=str(tmp_path / "out"), fast=True, bundles=tmp_path / "bundles")
        name = f"{SMALL}_v0.1.0.zip"
        assert (tmp_path / "out" / name).read_bytes() == (dist / name).read_bytes()

    def test_the_index_tells_what_is_there(self, dist: Path) -> None:
        index = load_index(dist)
        assert set(index) == {f"{LUNG}_v0.1.0", f"{SMALL}_v0.1.0"}
        record = index[f"{LUNG}_v0.1.0"]
        assert record["size"] == (dist / f"{LUNG}_v0.1.0.zip").stat().st_size
        assert record["depth"] == 10 and record["has_weights"] and record["licence"].startswith("Apache")
        assert record["scores"]["cip64_left_lung_dice"] > 0.9
        assert not index[f"{SMALL}_v0.1.0"]["has_weights"]

    def test_a_version_has_one_content(self, dist: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(dist, tmp_path / "dist")
        copy = shutil.copytree(ROOT / "bundles" / SMALL, tmp_path / "bundles" / SMALL)
        before = {path: path.read_bytes() for path in folder.iterdir()}
        (copy / "docs" / "README.md").write_text((copy / "docs" / "README.md").read_text() + "\nMore.\n")
        with pytest.raises(InputError, match="has this version with other bytes"):
            zoo.pack(SMALL, out=str(folder), fast=True, bundles=tmp_path / "bundles")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize(("version", "told"), [("0.10.0", "one digit each"), ("1.0", "MAJOR.MINOR.PATCH")])
    def test_versions(self, tmp_path: Path, version: str, told: str) -> None:
        _with_metadata(tmp_path, version=version, changelog={version: "x"})
        with pytest.raises(InputError, match=told):
            zoo.pack(SMALL, out=str(tmp_path / "out"), fast=True, bundles=tmp_path / "bundles")
        assert not (tmp_path / "out").exists()

    def test_faults_and_names(self, tmp_path: Path) -> None:
        _with_metadata(tmp_path, task=None)
        with pytest.raises(InputError, match="faults; correct them before it is packed"):
            zoo.pack(SMALL, out=str(tmp_path / "out"), fast=True, bundles=tmp_path / "bundles")
        with pytest.raises(InputError, match="no such bundle"):
            zoo.pack("other", out=str(tmp_path / "out"), bundles=tmp_path / "bundles")
        with pytest.raises(InputError, match="large_files='some'"):
            zoo.pack(SMALL, out=str(tmp_path / "out"), fast=True, large_files="some")

    def test_large_files_are_resolved(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the bundle's folder where they are right, else from their address; with a wrong hash not at all."""
        content = b"weights" * 1000
        entry = {"path": "models/big.pth", "url": str(tmp_path / "big"), "hash_type": "sha256"}
        (tmp_path / "big").write_bytes(content)
        copy = shutil.copytree(ROOT / "bundles" / SMALL, tmp_path / "bundles" / SMALL)
        monkeypatch.setattr(zoo_pack, "check_bundle", lambda *_: [])  # the files are none of the registry's
        for hash_val, good in ((zoo_pack.file_sha256(tmp_path / "big"), True), ("0" * 64, False)):
            (copy / "large_files.yml").write_text(json.dumps({"large_files": [{**entry, "hash_val": hash_val}]}))
            out = tmp_path / f"out{good}"
            if not good:
                with pytest.raises(InputError, match="Nothing is packed"):
                    zoo.pack(SMALL, out=str(out), large_files="resolve", bundles=tmp_path / "bundles")
                assert not list(out.glob("*"))
                continue
            zoo.pack(SMALL, out=str(out), large_files="resolve", bundles=tmp_path / "bundles")
            with zipfile.ZipFile(out / f"{SMALL}_v0.1.0.zip") as archive:
                assert archive.read(f"{SMALL}/models/big.pth") == content
                assert f"{SMALL}/large_files.yml" not in archive.namelist()


def _with_metadata(folder: Path, **changes: object) -> None:
    path = shutil.copytree(ROOT / "bundles" / SMALL, folder / "bundles" / SMALL) / "configs" / "metadata.json"
    metadata = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))


class TestServe:
    def test_page(self, served: tuple[str, Path]) -> None:
        page = urllib.request.urlopen(served[0]).read().decode()
        assert "<script" not in page and page.startswith("<!DOCTYPE html>")
        for text in (
            LUNG,
            "cip64 left lung dice <b>0.9733</b>",
            "Apache License",
            "29.1 MB",
            "in the zip",
            "see its README",
        ):
            assert text in page
        source = f"{served[0]}{LUNG}_v0.1.0.zip"
        assert f"python -m monai.bundle download --name {LUNG} --url {source} --bundle_dir ." in page

    def test_nothing_but_the_zoo(self, served: tuple[str, Path]) -> None:
        (served[1] / "secret.zip").touch()
        for path in ("secret.zip", "../dist/model_info.json", "%2e%2e/x", f"{LUNG}_v0.1.0"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(served[0] + path)

    def test_nothing_to_serve(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no packed bundles"):
            zoo.serve(str(tmp_path))

    def test_a_part_of_a_zip(self, served: tuple[str, Path]) -> None:
        whole = (served[1] / f"{SMALL}_v0.1.0.zip").read_bytes()
        request = urllib.request.Request(f"{served[0]}{SMALL}_v0.1.0.zip", headers={"Range": "bytes=1000-"})
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 206 and answer.read() == whole[1000:]


def test_diff(dist: Path, tmp_path: Path) -> None:
    lines = diff(dist / f"{LUNG}_v0.1.0.zip", ROOT / "bundles" / SMALL)
    assert "- models/model.pt" in lines and "    network_def#depth: 10 -> 18" in lines
    assert any("eval_metrics#cip64_left_lung_dice: 0.9733 -> absent" in line for line in lines)
    assert diff(dist / f"{LUNG}_v0.1.0.zip", ROOT / "bundles" / LUNG) == []
    with pytest.raises(InputError, match="neither a bundle's folder"):
        diff(tmp_path, dist)


def test_diff_of_resolved_files_and_empty_lists(tmp_path: Path) -> None:
    """Files that only a zip has, and values that are empty, null or of another type."""
    zips = []
    for number, value in enumerate(([], None, 1, True)):
        folder = tmp_path / str(number) / "b"
        (folder / "configs").mkdir(parents=True)
        (folder / "models").mkdir()
        (folder / "configs" / "metadata.json").write_text(json.dumps({} if value is None else {"a": value, "b": [1]}))
        (folder / "models" / "resnet_10.pth").write_bytes(bytes([number]))
        files = {f"b/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
        zips.append(tmp_path / f"{number}.zip")
        pack(files, zips[-1])
    assert any("models/resnet_10.pth: sha256" in line for line in diff(zips[0], zips[2]))
    assert "    a: [] -> 1" in diff(zips[0], zips[2]) and "    a: 1 -> true" in diff(zips[2], zips[3])
    assert {"    a: [] -> absent", "    b#0: 1 -> absent"} < set(diff(zips[0], zips[1]))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InputError, match="nor a zip of one"):
        diff(tmp_path / "empty.zip", zips[0])


class TestPublish:
    def test_github(self, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        zoo.publish("github", "me/models/v1", str(dist), str(tmp_path / "out"))
        index = load_index(tmp_path / "out" / "models")
        source = f"https://github.com/me/models/releases/download/v1/{LUNG}_v0.1.0.zip"
        assert index[f"{LUNG}_v0.1.0"]["source"] == source
        assert {path.name for path in (tmp_path / "out" / "assets").iterdir()} == {f"{key}.zip" for key in index}
        assert "gh release create v1 --repo me/models --verify-tag" in capsys.readouterr().out

    def test_monai_lists_what_is_on_github(self, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its address is fixed, so the network alone is replaced: the rest is MONAI reading our files."""
        zoo.publish("github", "me/models/v1", str(dist), str(tmp_path / "out"))

        def get(url: str) -> SimpleNamespace:
            path = url.removeprefix("https://raw.githubusercontent.com/me/models/v1/")
            return SimpleNamespace(text=(tmp_path / "out" / path).read_text(), raise_for_status=lambda: None)

        monkeypatch.setattr(monai.bundle.scripts, "requests", SimpleNamespace(get=get))
        monkeypatch.setattr(monai.bundle.scripts, "has_requests", True)
        listed = monai.bundle.get_all_bundles_list(repo="me/models", tag="v1")
        assert sorted(listed) == [parse_key(key) for key in sorted(load_index(dist))]
        versions = monai.bundle.get_bundle_versions(LUNG, repo="me/models", tag="v1")
        assert versions == {"latest_version": "0.1.0", "all_versions": ["0.1.0"]}
        info = monai.bundle.get_bundle_info(LUNG, repo="me/models", tag="v1")
        assert info["browser_download_url"].endswith(f"/releases/download/v1/{LUNG}_v0.1.0.zip")

    @pytest.mark.parametrize("to", ["github", "huggingface"])
    def test_zips_are_those_of_the_index(self, dist: Path, tmp_path: Path, to: str) -> None:
        folder = shutil.copytree(dist, tmp_path / "dist")
        (folder / f"{SMALL}_v0.1.0.zip").unlink()
        with pytest.raises(InputError, match="is not there or not what model_info.json tells of"):
            zoo.publish(to, "me/models/v1" if to == "github" else "me", str(folder), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    def test_huggingface(self, dist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        zoo.publish("huggingface", "me", str(dist), str(tmp_path / "out"))
        card = (tmp_path / "out" / LUNG / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: monai\n") and (tmp_path / "out" / LUNG / "models").is_dir()
        assert f"hf repo tag create me/{LUNG} 0.1.0" in capsys.readouterr().out

    def test_upload_runs_what_it_prints(
        self, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        program = tmp_path / "bin" / "hf"
        program.parent.mkdir()
        program.write_text(
            f'#!/bin/sh\necho "hf $*" >> {tmp_path}/called\n[ "$1" != repo ] || [ ! -e {tmp_path}/fail ]\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(InputError, match="set HF_TOKEN to a token"):
            zoo.publish("huggingface", "me", str(dist), str(tmp_path / "b"), upload=True)
        zoo.publish("huggingface", "me", str(dist), str(tmp_path / "no"), upload="false")  # as a command line gives it
        assert not (tmp_path / "called").exists()
        monkeypatch.setenv("HF_TOKEN", "secret")
        capsys.readouterr()
        zoo.publish("huggingface", "me", str(dist), str(tmp_path / "b"), upload=True)
        assert (tmp_path / "called").read_text() == capsys.readouterr().out.replace("'", "")
        (tmp_path / "fail").touch()
        with pytest.raises(InputError, match="Command 2 of 4 failed"):
            zoo.publish("huggingface", "me", str(dist), str(tmp_path / "c"), upload=True)

    @pytest.mark.parametrize(
        ("to", "repo", "told"),
        [
            ("gitlab", "me", "allowed are github, huggingface"),
            ("github", "me/models", "OWNER/REPO/TAG"),
            ("github", "me/models/hosting_storage_v1", "another tag"),
            ("huggingface", "me/models", "owner's name"),
        ],
    )
    def test_wrong(self, dist: Path, tmp_path: Path, to: str, repo: str, told: str) -> None:
        with pytest.raises(InputError, match=told):
            zoo.publish(to, repo, str(dist), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_a_classifier_goes_with_its_record(tmp_path: Path) -> None:
    """Without it nobody could tell which patients its weights have seen."""
    name = "lung_nodule_ct_classification_resnet10"
    zoo.pack(name, out=str(tmp_path), fast=True)
    with zipfile.ZipFile(tmp_path / f"{name}_v0.1.0.zip") as file:
        assert f"{name}/models/classifier.json" in file.namelist()


@pytest.mark.slow
def test_what_monai_downloads_makes_the_same_mask(served: tuple[str, Path], tmp_path: Path) -> None:
    """From an empty folder, run from a foreign one: voxel for voxel what the repository's bundle makes."""
    scan = write_volume(tmp_path / "scan.nii.gz", *small_scan())
    command = [sys.executable, "-m", "monai.bundle"]
    source = f"{served[0]}{LUNG}_v0.1.0.zip"
    subprocess.run(
        [*command, "download", "--name", LUNG, "--url", source, "--bundle_dir", str(tmp_path / "new")],
        check=True,
        cwd=tmp_path,
        capture_output=True,
    )
    masks = []
    for root in (ROOT / "bundles" / LUNG, tmp_path / "new" / LUNG):
        out = tmp_path / f"out{len(masks)}"
        options = {"bundle_root": root, "dataset_dir": scan, "output_dir": out}
        files = {"config_file": root / "configs" / "inference.json", "meta_file": root / "configs" / "metadata.json"}
        pairs = [str(word) for name, value in {**files, **options}.items() for word in (f"--{name}", value)]
        subprocess.run([*command, "run", *pairs], check=True, cwd=tmp_path, capture_output=True)
        masks.append(np.asarray(nib.load(out / "scan_seg.nii.gz").dataobj))
    np.testing.assert_array_equal(*masks)


@pytest.mark.slow
def test_monais_tools_take_what_was_downloaded(served: tuple[str, Path], tmp_path: Path) -> None:
    """load, verify_metadata (by our copy of its rules: the schema is on the network), verify_net_in_out, exports."""
    monai.bundle.download(name=LUNG, url=f"{served[0]}{LUNG}_v0.1.0.zip", bundle_dir=tmp_path, progress=False)
    root = tmp_path / LUNG
    files = {name: str(root / "configs" / f"{name}.json") for name in ("metadata", "inference")}
    state = monai.bundle.load(LUNG, bundle_dir=tmp_path, workflow_type="infer")
    network = Bundle(root).network
    network.load_state_dict(state)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    monai.bundle.verify_metadata(meta_file=files["metadata"], filepath=tmp_path / "schema.json")
    configs = {"meta_file": files["metadata"], "config_file": files["inference"]}
    monai.bundle.verify_net_in_out("network_def", device="cpu", **configs)
    weights = {"ckpt_file": str(root / "models" / "model.pt"), **configs}
    monai.bundle.ckpt_export("network_def", filepath=tmp_path / "net.ts", **weights)
    image = torch.rand(1, 1, 64, 64, 64)
    monai.bundle.onnx_export("network_def", filepath=str(tmp_path / "net.onnx"), input_shape=image.shape, **weights)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: image.numpy()})[0])
    with torch.inference_mode():
        wanted = network(image)
        torch.testing.assert_close(torch.jit.load(tmp_path / "net.ts")(image), wanted)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
