"""The feature-extraction bundle run as a user does: embeddings, maps, weights from everywhere, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.utils import HashCheckError

from med3d_nets import EmbeddingNet, find_cases, find_weights, median_spacing
from med3d_nets.errors import InputError
from med3d_nets.registry import WEIGHTS, encoders
from med3d_nets.weights import file_sha256
from tests.bundle_runs import write_series, write_volume
from tests.feature_runs import BUNDLE, make_volume, read_table, run, run_command, write_encoder, write_nifti
from tests.reference import encoder_maps
from tests.small_training import refusal
from tests.weights_server import serving, tiny_checkpoint

ROOT = Path(__file__).parents[1]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
SPACING = [2.0, 2.0, 2.0]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = write_encoder(tmp_path_factory.mktemp("encoder") / "mine.pth")
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """Whole numbers, as DICOM has them."""
    return np.rint(make_volume("smooth", 1, (26, 19, 22)))


def extract(scans: Path, out: Path, weights: Path | str, **more: Any) -> None:
    run(
        "inference",
        **{"dataset_dir": str(scans), "output_dir": str(out), "weights": str(weights), "spacing": SPACING} | more,
    )


def features(out: Path, case: str) -> dict[str, np.ndarray]:
    with np.load(out / f"{case}_features.npz") as file:
        return dict(file)


def by_hand(voxels: np.ndarray, encoder: Path) -> list[torch.Tensor]:
    """The five maps, by numpy and the functional reference, of a volume that is at its working spacing."""
    low, high = np.percentile(voxels, [0.5, 99.5])
    clipped = np.clip(voxels.astype(np.float64), low, high)
    image = torch.from_numpy((clipped - clipped.mean()) / clipped.std()).float()[None, None]
    state = torch.load(encoder, weights_only=True)["state_dict"]
    state = {key.removeprefix("module."): value for key, value in state.items()}
    with torch.inference_mode():
        return encoder_maps(state, image, 10, "B", 8)


def test_command_gives_what_is_computed_by_hand(encoder: Path, volume: np.ndarray, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "in" / "mr 1.nii.gz", volume.astype(np.float32))
    options = {"dataset_dir": path, "output_dir": tmp_path / "out", "weights": encoder, "spacing": "[2,2,2]"}
    done = run_command("inference", **options, maps="true", map_stages="['layer2','layer4']")
    assert done.returncode == 0, done.stderr
    found, maps = features(tmp_path / "out", "mr 1"), by_hand(volume, encoder)
    for stage, expected in zip(STAGES, maps, strict=True):
        assert found[stage].dtype == np.float32
        np.testing.assert_allclose(found[stage], expected.mean(dim=(0, 2, 3, 4)), rtol=1e-3, atol=1e-5)
    assert np.array_equal(found["embedding"], found["layer4"]) and found["embedding"].std() > 0.01
    assert set(found) == {*STAGES, "embedding", "origin", "map_layer2", "map_layer4", "affine_layer2", "affine_layer4"}
    assert found["map_layer4"].dtype == np.float16
    np.testing.assert_allclose(found["map_layer4"], maps[4][0], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(found["affine_layer4"], np.diag([16.0, 16.0, 16.0, 1.0]))
    row = read_table(tmp_path / "out" / "embeddings.csv")["mr 1"]
    np.testing.assert_allclose([float(row[f"e{i}"]) for i in range(512)], found["embedding"], rtol=1e-6)
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["weights_sha256"] == file_sha256(encoder) and report["spacing"] == SPACING
    assert report["cases"] == ["mr 1"] and report["failed"] == {} and report["stages"]["layer4"] == 512
    assert report["normalisation"]["clip_percentiles"] == [0.5, 99.5]
    assert report["bundle"]["name"].endswith("ResNet-10") and set(report["versions"]) >= {"monai", "torch"}


def test_every_form_and_orientation_of_a_volume_gives_one_embedding(
    encoder: Path, volume: np.ndarray, tmp_path: Path
) -> None:
    """NIfTI, NRRD, a DICOM folder, and the same voxels stored along other axes; also where they are resampled."""
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    write_volume(tmp_path / "in" / "nifti.nii.gz", volume, affine)
    write_volume(tmp_path / "in" / "nrrd.nrrd", volume, affine)
    write_series(tmp_path / "in" / "series", volume, affine)
    turned = nib.Nifti1Image(volume, affine).as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    assert turned.shape != volume.shape
    write_nifti(tmp_path / "in" / "turned.nii", np.asarray(turned.dataobj), turned.affine)
    extract(tmp_path / "in", tmp_path / "out", encoder)
    first = features(tmp_path / "out", "nifti")["embedding"]
    assert set(features(tmp_path / "out", "nifti")) == {*STAGES, "embedding", "origin"}
    for case in ("nrrd", "series", "turned"):
        np.testing.assert_allclose(features(tmp_path / "out", case)["embedding"], first, rtol=1e-4, atol=1e-5)
    assert list(read_table(tmp_path / "out" / "embeddings.csv")) == ["nifti", "nrrd", "series", "turned"]


def test_small_volumes_need_no_padding(encoder: Path, tmp_path: Path) -> None:
    for shape in ((9, 7, 1), (3, 3, 3)):
        write_nifti(tmp_path / "in" / f"v{shape[0]}.nii", make_volume("rough", 1, shape))
    extract(tmp_path / "in", tmp_path / "out", encoder)
    for case in ("v9", "v3"):
        assert np.isfinite(features(tmp_path / "out", case)["embedding"]).all()


def test_the_lung_bundles_own_encoder(volume: np.ndarray, tmp_path: Path) -> None:
    weights = ROOT / "bundles" / "lung_ct_segmentation_resnet10" / "models" / "model.pt"
    write_nifti(tmp_path / "ct.nii", volume)
    extract(tmp_path / "ct.nii", tmp_path / "out", weights)
    state = {k.removeprefix("backbone."): v.float() for k, v in torch.load(weights, weights_only=True).items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items() if "head." not in k}}, tmp_path / "e.pth")
    expected = by_hand(volume, tmp_path / "e.pth")[4].mean(dim=(0, 2, 3, 4))
    np.testing.assert_allclose(features(tmp_path / "out", "ct")["embedding"], expected, rtol=2e-3, atol=1e-5)


def test_one_bad_case_does_not_stop_the_others(encoder: Path, volume: np.ndarray, tmp_path: Path) -> None:
    scans, out = tmp_path / "in", tmp_path / "out"
    for case in ("a", "b"):
        write_nifti(scans / f"{case}.nii.gz", volume)
    extract(scans, out, encoder)
    (scans / "a.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes()[:-300])
    write_nifti(scans / "flat.nii", np.full((8, 8, 8), 7, np.float32))
    message = refusal(lambda: extract(scans, out, encoder))
    assert "2 of 3 cases failed" in message and "a.nii.gz: cannot be read" in message
    assert "flat.nii: every voxel is 7" in message
    assert list(read_table(out / "embeddings.csv")) == ["b"]
    assert set(json.loads((out / "run.json").read_text())["failed"]) == {"a", "flat"}
    names = {path.name for path in out.iterdir()}
    old = {"a_features.npz.old", "embeddings.csv.old", "run.json.old"}
    assert names == {"b_features.npz", "embeddings.csv", "run.json", *old}


def test_finished_cases_are_skipped(encoder: Path, volume: np.ndarray, tmp_path: Path) -> None:
    """Their embeddings are in the table; another setting, other weights or a new case are computed."""
    scans, out = tmp_path / "in", tmp_path / "out"
    for case in ("a", "c"):
        write_nifti(scans / f"{case}.nii.gz", volume)
    extract(scans, out, encoder, skip_finished=True)
    table = (out / "embeddings.csv").read_text()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
    (scans / "b.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    extract(scans, out, encoder, skip_finished=True)
    assert list(read_table(out / "embeddings.csv")) == ["a", "b", "c"]
    assert set(table.splitlines()) < set((out / "embeddings.csv").read_text().splitlines())
    assert json.loads((out / "run.json").read_text())["cases"] == ["a", "b", "c"]
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    os.truncate(out / "a_features.npz", 1000)
    extract(scans, out, encoder, skip_finished=True)
    assert [(out / name).stat().st_mtime_ns == time for name, time in sorted(times.items())] == [False, True]
    for change in ({"clip_percentiles": [1.0, 99.0]}, {"weights": write_encoder(tmp_path / "other.pth", seed=4)}):
        times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npz")}
        extract(scans, out, **{"weights": encoder, "skip_finished": True, **change})
        assert not any((out / name).stat().st_mtime_ns == time for name, time in times.items()), change


def test_no_table_stays_when_all_cases_fail(encoder: Path, volume: np.ndarray, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", volume)
    extract(path, tmp_path / "out", encoder)
    message = refusal(lambda: extract(path, tmp_path / "out", encoder, max_voxels=1000))
    assert "ct.nii: would have 26 x 19 x 22 voxels of 2 x 2 x 2 mm, allowed are 1000 in all" in message
    assert {path.name for path in (tmp_path / "out").glob("*.*")} == {
        *("ct_features.npz.old", "embeddings.csv.old", "run.json.old", "run.json")
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ({"weights": "missing/resnet.pth"}, "missing/resnet.pth"),
        ({"weights": "resnet_11"}, "resnet_11"),
        ({"weights": ""}, "No weights are given"),
        ({"spacing": [1, 1]}, "needed are three voxel sizes in mm"),
        ({"spacing": [1, 0, 1]}, "needed are three voxel sizes in mm"),
        ({"maps": "maybe"}, "'maybe' is neither on nor off"),
        ({"maps": True, "map_stages": ["layer5"]}, "there is no layer5; allowed are stem, layer1"),
    ],
)
def test_refusals(override: dict[str, Any], words: str, encoder: Path, volume: np.ndarray, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", volume)
    assert words in refusal(lambda: extract(path, tmp_path / "out", **{"weights": encoder} | override))
    assert not (tmp_path / "out" / "embeddings.csv").exists()


def test_weights_of_another_depth(volume: np.ndarray, tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "ct.nii", volume)
    weights = write_encoder(tmp_path / "deep.pth", depth=18)
    message = refusal(lambda: extract(path, tmp_path / "out", weights))
    assert "ResNet-18" in message and "ResNet-10" in message
    os.truncate(weights, 1000)  # a temporary folder need not keep 130 MB


def test_monai_downloads_the_large_files(tmp_path: Path) -> None:
    """MONAI's command on the bundle's list, its addresses led to a loopback server; a wrong hash is an error."""
    content, text = tiny_checkpoint(), (BUNDLE / "large_files.yml").read_text()
    with serving(content) as server:
        for weight in encoders(10):
            assert weight.url in text and weight.sha256 in text
            text = text.replace(weight.url, server.url("good")).replace(weight.sha256, sha256(content).hexdigest())
        (tmp_path / "large_files.yml").write_text(text)
        monai.bundle.download_large_files(bundle_path=str(tmp_path))
        (tmp_path / "large_files.yml").write_text(text.replace(sha256(content).hexdigest(), 64 * "0"))
        with pytest.raises(HashCheckError, match="sha256 hash check"):
            monai.bundle.download_large_files(bundle_path=str(tmp_path))
    assert {path.name for path in (tmp_path / "models").iterdir()} == {weight.file for weight in encoders(10)}
    assert all(path.read_bytes() == content for path in (tmp_path / "models").iterdir())


def test_downloaded_weights_are_found_in_the_bundle_and_checked(
    encoder: Path, volume: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``monai.bundle download_large_files`` leaves them; another file under that name is refused."""
    bundle = tmp_path / "bundle"
    (bundle / "models").mkdir(parents=True)
    shutil.copy(encoder, bundle / "models" / "resnet_10_23dataset.pth")
    with pytest.raises(InputError, match="is not resnet_10_23dataset: .*download_large_files"):
        find_weights("resnet_10_23dataset", bundle)
    record = dataclasses.replace(WEIGHTS["resnet_10_23dataset"], size=None, sha256=file_sha256(encoder))
    monkeypatch.setitem(WEIGHTS, "resnet_10_23dataset", record)
    path = write_nifti(tmp_path / "ct.nii", volume)
    run("inference", dataset_dir=str(path), output_dir=str(tmp_path / "out"), bundle_root=str(bundle), spacing=SPACING)
    report = json.loads((tmp_path / "out" / "run.json").read_text())
    assert report["weights"] == "resnet_10_23dataset" and report["weights_sha256"] == record.sha256
    shutil.rmtree(bundle)


def test_features_that_overflow_are_refused(volume: np.ndarray, tmp_path: Path) -> None:
    weights = write_encoder(tmp_path / "big.pth")
    content = torch.load(weights, weights_only=True)
    content["state_dict"]["module.layer4.0.bn2.weight"] *= 1e6
    torch.save(content, weights)
    path = write_nifti(tmp_path / "ct.nii", volume)
    extract(path, tmp_path / "out", weights)
    message = refusal(lambda: extract(path, tmp_path / "out", weights, maps=True))
    assert "the map of layer4 exceeds half precision" in message
    assert not list((tmp_path / "out").glob("*_features.npz"))


def test_median_spacing_is_per_anatomical_axis(tmp_path: Path) -> None:
    for index, sizes in enumerate(((1.0, 2.0, 3.0), (1.5, 2.0, 5.0), (9.0, 2.5, 4.0))):
        write_nifti(tmp_path / f"v{index}.nii", make_volume("rough", 0, (4, 4, 4)), np.diag([*sizes, 1.0]))
    turned = np.array([[0, 0, 9.0, 0], [-2.5, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 0, 1]])
    write_nifti(tmp_path / "v2.nii", make_volume("rough", 0, (4, 4, 4)), turned)
    assert median_spacing(find_cases(tmp_path)) == [1.5, 2.0, 4.0]
    with pytest.raises(InputError, match="No case"):
        median_spacing([])


def test_every_depth_takes_its_place_in_the_vector() -> None:
    for depth, channels in ((10, 1024), (18, 1024), (50, 3904), (200, 3904)):
        with torch.device("meta"):
            net = EmbeddingNet(depth)
            assert net(torch.zeros(2, 1, 17, 16, 9)).shape == (2, channels)
        assert [place.stop - place.start for place in net.slices.values()] == list(net.feature_channels)


def test_the_bundle_stays_as_it_is() -> None:
    assert {path.name for path in BUNDLE.iterdir()} == {"LICENSE", "configs", "docs", "large_files.yml"}
