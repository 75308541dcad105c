"""Scans and annotations in LUNA16's form: what is read, what is refused, and where boxes and patches come to lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from med3d_nets import (
    CheckPointsd,
    CropLungsd,
    InputError,
    LoadVolumed,
    PointsToBoxesd,
    RandBoxPatchd,
    ResampleRASd,
    read_luna,
    split_luna,
)
from med3d_nets.detection_data import IGNORED, NOTHING
from tests.nodule_scans import HEADER, UID, ball, luna_folder, write_mhd


class TestRead:
    def test_as_distributed(self, tmp_path: Path) -> None:
        """Folders subset0 …, mhd and raw, one table for all; rows of scans that are not there do not matter."""
        folder = luna_folder(tmp_path)
        cases = read_luna(folder)
        assert [Path(case["image"]).name for case in cases] == [f"{UID}{n}.mhd" for n in range(3)]
        assert [len(case["points"]) for case in cases] == [1, 2, 0]
        x, y, z, diameter = cases[0]["points"][0]
        row = (folder / "annotations.csv").read_text().splitlines()[1].split(",")
        assert [-x, -y, z, diameter] == [float(value) for value in row[1:]]  # LPS in the table, RAS here

    def test_ras_tables(self, tmp_path: Path) -> None:
        folder = luna_folder(tmp_path)
        one, two = (read_luna(folder, space=space)[0]["points"][0] for space in ("LPS", "RAS"))
        assert one == [-two[0], -two[1], *two[2:]]

    def test_excluded_findings(self, tmp_path: Path) -> None:
        folder = luna_folder(tmp_path)
        (folder / "annotations_excluded.csv").write_text(f"{HEADER}\n{UID}2,1,2,3,-1\n")
        assert read_luna(folder)[2]["excluded"] == [[-1.0, -2.0, 3.0, 10.0]]

    def test_patients(self, tmp_path: Path) -> None:
        folder = luna_folder(tmp_path)
        (folder / "patients.csv").write_text(f"seriesuid,patient\n{UID}0,a\n{UID}1,a\n")
        assert [case["patient"] for case in read_luna(folder)] == ["a", "a", f"{UID}2"]

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ("", "has no column coordX"),
            ("a,b\n1,2\n", "has no column coordX and no column coordY and no column coordZ. Its columns: a, b"),
            (f"{HEADER}\n", "has no row below its header"),
            (f"{HEADER}\n{UID}0,1,2,three,4\n", "line 2: coordZ is 'three'"),
            (f"{HEADER}\n{UID}0,1,2,3,4\n{UID}0,1,2,9,0\n", "line 3: diameter_mm is 0"),
            (f"{HEADER}\n{UID}0,1,2,3,\n", "line 2: no diameter_mm"),
            (f"{HEADER}\nother,1,2,3,4\n", "none of its 1 series is among the 3 scans"),
        ],
    )
    def test_refused(self, tmp_path: Path, table: str, message: str) -> None:
        folder = luna_folder(tmp_path)
        (folder / "annotations.csv").write_text(table)
        with pytest.raises(InputError, match=message):
            read_luna(folder)

    def test_no_table(self, tmp_path: Path) -> None:
        folder = luna_folder(tmp_path)
        (folder / "annotations.csv").unlink()
        with pytest.raises(InputError, match="annotations.csv: no such file"):
            read_luna(folder)


class TestSplit:
    def test_by_subset(self, tmp_path: Path) -> None:
        train, val = split_luna(read_luna(luna_folder(tmp_path)), val_subset="subset1")
        assert [len(train), len(val)] == [2, 1]

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"val_subset": "subset7"}, "subset0, subset1"), ({"val_patients": [f"{UID}0", f"{UID}1"]}, "has a nodule")],
    )
    def test_refused(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            split_luna(read_luna(luna_folder(tmp_path)), **options)


class TestPoints:
    def test_outside_of_the_volume(self, tmp_path: Path) -> None:
        folder = luna_folder(tmp_path)
        (folder / "annotations.csv").write_text(f"{HEADER}\n{UID}0,1,2,30,4\n{UID}0,500,2,30,4\n")
        case = {**read_luna(folder)[0]}
        with pytest.raises(RuntimeError) as caught:
            Compose([LoadVolumed("image"), CheckPointsd("image")])(case)
        message = str(caught.value.__cause__)
        assert "annotations.csv, line 3: the point (500.0, 2.0, 30.0) mm (LPS) is outside" in message

    @pytest.mark.parametrize("kind", ["plain", "flipped", "oblique"])
    def test_a_box_is_on_its_nodule(self, tmp_path: Path, kind: str) -> None:
        """Scan → reading → RAS at another spacing → crop: the box is where the bright ball is."""
        angle = np.deg2rad(15 if kind == "oblique" else 0)
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = turn @ np.diag({"plain": [1, 1, 2], "flipped": [-1, -1.2, 2]}.get(kind, [0.9, 1.1, -1.5]))
        affine[:3, 3] = [30, -40, 100]
        hu, centre = ball((70, 60, 40), affine, [20, 33, 15], 10)
        nib.save(nib.Nifti1Image(hu, affine), tmp_path / "scan.nii.gz")
        x, y, z = centre
        (tmp_path / "annotations.csv").write_text(f"{HEADER}\nscan,{-x},{-y},{z},10\n")
        chain = [LoadVolumed("image"), CheckPointsd("image"), ResampleRASd("image", [1.25] * 3), PointsToBoxesd()]
        d = Compose(chain)(read_luna(tmp_path)[0])
        bright = np.argwhere(d["image"][0].numpy() > -200)
        box = d["boxes"][0].numpy()
        np.testing.assert_allclose((box[:3] + box[3:6]) / 2, bright.mean(axis=0), atol=0.3)
        np.testing.assert_allclose(box[3:6] - box[:3], 8, rtol=1e-4)


class TestPatch:
    def chain(self, **options: Any) -> tuple[dict[str, Any], RandBoxPatchd]:
        image = torch.zeros(1, 80, 70, 60)
        x, y, z = np.indices(image.shape[1:])
        image[0][torch.from_numpy((x - 30) ** 2 + (y - 40) ** 2 + (z - 20) ** 2 <= 16)] = 1
        boxes = torch.tensor([[26.0, 36, 16, 34, 44, 24, 0], [60, 10, 40, 70, 20, 50, IGNORED]])
        data = {"image": MetaTensor(image), "boxes": boxes, "field": torch.ones_like(image, dtype=torch.uint8)}
        return data, RandBoxPatchd("image", [48, 40, 32], **options)

    def test_the_box_goes_with_the_ball(self) -> None:
        data, cut = self.chain(positive_fraction=1.0)
        for seed in range(12):
            patch = cut.set_random_state(seed)(data)
            assert patch["image"].shape == (1, 48, 40, 32)
            row = patch["label"][patch["label"][:, 6] == 0]
            assert len(row) == 1
            bright = np.argwhere(patch["image"][0].numpy() > 0.5)
            np.testing.assert_allclose((row[0, :3] + row[0, 3:6]) / 2, bright.mean(axis=0), atol=0.5)
            np.testing.assert_allclose(row[0, 3:6] - row[0, :3], np.ptp(bright, axis=0), atol=2.1)

    def test_excluded_findings_are_marked(self) -> None:
        data, cut = self.chain(positive_fraction=0.0)
        kinds = set()
        for seed in range(30):
            kinds |= set(cut.set_random_state(seed)(data)["label"][:, 6].tolist())
        assert kinds == {0.0, NOTHING, IGNORED}

    def test_a_scan_without_lungs_or_nodules(self) -> None:
        data, cut = self.chain()
        data["boxes"], data["field"] = torch.zeros(0, 7), torch.zeros_like(data["field"])
        assert (cut.set_random_state(0)(data)["label"][:, 6] == NOTHING).all()


class TestLungs:
    def test_a_body_without_lungs(self) -> None:
        hu = torch.full((1, 60, 60, 40), -1000.0)
        hu[:, 5:55, 5:55] = 40
        d = CropLungsd("image")({"image": MetaTensor(hu, affine=torch.diag(torch.tensor([3.0, 3, 3, 1])))})
        assert d["image"].shape == hu.shape and not d["field"].any()

    def test_the_crop_keeps_its_place(self) -> None:
        hu = torch.full((1, 80, 80, 60), -1000.0)
        hu[:, 5:75, 5:75] = 40
        hu[:, 12:30, 20:60, 20:40] = -850
        hu[:, 50:68, 20:60, 20:40] = -850
        affine = torch.diag(torch.tensor([3.0, 3, 3, 1], dtype=torch.float64))
        d = CropLungsd("image", margin_mm=6)({"image": MetaTensor(hu, affine=affine)})
        crop = d["image"]
        start = (crop.affine[:3, 3] / 3).round().int().tolist()
        assert 0 < start[2] < 20 and crop.shape[3] < 40
        inside = hu[:, start[0] :, start[1] :, start[2] :][:, : crop.shape[1], : crop.shape[2], : crop.shape[3]]
        torch.testing.assert_close(crop.as_tensor(), inside)
        assert d["field"].bool()[crop.as_tensor() == -850].all()


def test_mhd_is_read_with_its_orientation(tmp_path: Path) -> None:
    """The tiny scans of these tests are what ITK takes them for."""
    path = write_mhd(tmp_path / "a.mhd", np.zeros((4, 5, 6), np.int16), (-10.0, 20.0, 30.0), (0.5, 0.75, 2.0))
    image = itk.imread(path)
    assert list(image.GetOrigin()) == [-10, 20, 30] and list(image.GetSpacing()) == [0.5, 0.75, 2]
