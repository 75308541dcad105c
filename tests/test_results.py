"""CaseEvaluator and SegmentationWriter: what a user finds after inference, also when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader, Dataset
from monai.transforms import (
    AsDiscreted,
    Compose,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from med3d_nets import results
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvaluator, CaseEvents
from med3d_nets.measures import measure
from med3d_nets.preview import WINDOW_HU, render_preview
from med3d_nets.results import SegmentationWriter

LABELS = {"1": "left lung", "2": "right lung"}
NAMES = {1: "left lung", 2: "right lung"}
SHAPE = (30, 20, 26)

_turn = nib.eulerangles.euler2mat(0.2, 0.1, -0.15)
GRIDS = {
    "canonical": np.diag([2.0, 2.0, 2.0, 1.0]),
    "flipped": np.diag([-2.0, -2.0, 2.0, 1.0]),
    "permuted": np.array([[0, 0, -2.5, 9], [-2, 0, 0, -7], [0, 3, 0, 4], [0, 0, 0, 1.0]]),
    "oblique": nib.affines.from_matvec(_turn * [2.0, 2.0, 3.0], [10, -20, 300]),
    "sheared": np.array([[2, 0, 0, 0], [0, 2, 0.6, 0], [0, 0, 2.4, 0], [0, 0, 0, 1.0]]),
}


class HalvesNet(torch.nn.Module):
    """Air is lung; the half at smaller x is the left one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        air = (x < 0.35).float()
        left = torch.zeros_like(x)
        left[:, :, : x.shape[2] // 2] = 1
        return torch.cat([1 - air, air * left, air * (1 - left)], dim=1)


def make_ct(path: Path, affine: np.ndarray) -> np.ndarray:
    """Write a body of 40 HU with two lungs of -800 HU; return the true label map on its grid."""
    low, high = np.array([-24.0, -12, -20]), np.array([24.0, 12, 20])  # of both lungs, mm from the centre
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), -1)
    middle = nib.affines.apply_affine(affine, (np.array(SHAPE) - 1) / 2)
    world = nib.affines.apply_affine(affine, index) - middle
    inside = np.all((world > low) & (world < high), axis=-1) & (np.abs(world[..., 0]) > 3)
    label = np.where(inside, np.where(world[..., 0] < 0, 1, 2), 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(np.where(label > 0, -800, 40).astype(np.int16), affine), path)
    return label


class CheckedLoad(LoadImaged):
    """Stands for a loading transform that checks."""

    def __call__(self, data: Any, reader: Any = None) -> Any:
        path = Path(data["image"])
        if path.name == "bad.nii.gz":
            raise InputError(f"{path}: bad image")
        if path.name == "odd.nii.gz":
            raise KeyError("unforeseen")
        if path.name == "stop.nii.gz":
            raise KeyboardInterrupt
        return super().__call__(data, reader)


def make_evaluator(cases: list[Path], output_dir: Path, weights: Path, **writer: Any) -> CaseEvaluator:
    preprocessing = Compose(
        [
            CheckedLoad("image", ensure_channel_first=True),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", pixdim=(2.0, 2.0, 2.0), mode="bilinear"),
            ScaleIntensityRanged("image", -1000, 600, 0, 1, clip=True),
        ]
    )
    postprocessing = Compose(
        [
            AsDiscreted("pred", argmax=True),
            Invertd("pred", transform=preprocessing, orig_keys="image", nearest_interp=True),
        ]
    )
    data = [{"image": str(path), "case": path.name.removesuffix(".nii.gz")} for path in cases]
    handler = SegmentationWriter(
        output_dir, LABELS, (-1000, 600), weights, {"name": "lungs", "version": "1.2.3"}, **writer
    )
    return CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data, preprocessing), batch_size=1),
        network=HalvesNet(),
        postprocessing=postprocessing,
        val_handlers=[handler],
    )


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize("grid", GRIDS)
def test_mask_is_on_the_grid_of_the_input(tmp_path: Path, weights: Path, grid: str) -> None:
    truth = make_ct(tmp_path / "ct.nii.gz", GRIDS[grid])
    make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "new" / "out", weights).run()
    image, mask = nib.load(tmp_path / "ct.nii.gz"), nib.load(tmp_path / "new" / "out" / "ct_seg.nii.gz")
    assert mask.shape == image.shape
    assert mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    np.testing.assert_allclose(mask.get_sform(), image.affine, atol=1e-4)
    assert mask.header.get_xyzt_units()[0] == "mm"
    if grid == "sheared":
        assert mask.get_qform(coded=True)[1] == 0
    else:
        np.testing.assert_allclose(mask.get_qform(coded=True)[0], image.affine, atol=1e-4)
    found = np.asarray(mask.dataobj)
    for value in (1, 2):
        dice = 2 * np.sum((found == value) & (truth == value)) / (np.sum(found == value) + np.sum(truth == value))
        assert dice > 0.9, f"{NAMES[value]}: {dice}"


def test_report(tmp_path: Path, weights: Path) -> None:
    make_ct(tmp_path / "ct.nii.gz", GRIDS["permuted"])
    make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "out", weights).run()
    report = json.loads((tmp_path / "out" / "ct_seg.json").read_text())
    mask = np.asarray(nib.load(tmp_path / "out" / report["mask"]).dataobj)
    assert report["case"] == "ct"
    assert report["image"] == str(tmp_path / "ct.nii.gz")
    assert report["shape"] == list(SHAPE)
    assert report["spacing_mm"] == [2.0, 3.0, 2.5]
    assert report["orientation"] == "PSL"
    assert report["labels"]["right lung"]["value"] == 2
    assert report["labels"]["right lung"]["voxels"] == np.sum(mask == 2) > 0
    assert report["labels"]["left lung"]["volume_ml"] == pytest.approx(np.sum(mask == 1) * 0.015, abs=0.01)
    assert report["total_volume_ml"] == pytest.approx(np.sum(mask > 0) * 0.015, abs=0.01)
    assert report["bundle"] == {"name": "lungs", "version": "1.2.3"}
    assert report["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert set(report["versions"]) == {"med3d_nets", "monai", "torch", "python"}
    assert any("implausible" in warning for warning in report["warnings"])
    assert report["created"].endswith("+00:00")


@pytest.mark.parametrize("grid", ["permuted", "oblique"])
def test_the_picture_shows_the_written_mask(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, grid: str
) -> None:
    """On the grid of the network's input, where it must lie on the air of the image in HU."""
    shown: dict[str, Any] = {}

    def render(image: np.ndarray, mask: np.ndarray, spacing: Any, *texts: Any) -> bytes:
        shown.update(image=image, mask=mask, spacing=spacing, texts=texts)
        return b""

    make_ct(tmp_path / "ct.nii.gz", GRIDS[grid])
    monkeypatch.setattr(results, "render_preview", render)
    make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "out", weights).run()
    image, mask = shown["image"], shown["mask"]
    np.testing.assert_allclose(shown["spacing"], 2.0, atol=1e-5)
    assert image.min() == pytest.approx(-800, abs=1) and image.max() == pytest.approx(40, abs=1)
    air = image < -440
    assert 2 * np.sum(air & (mask > 0)) / (np.sum(air) + np.sum(mask > 0)) > 0.9
    assert mask.dtype == np.uint8 and np.nonzero(mask == 1)[0].max() < np.nonzero(mask == 2)[0].min()
    legend, title, _, window = shown["texts"]
    assert window == WINDOW_HU
    assert legend[1].startswith("left lung") and legend[2].endswith("mL") and title.startswith("ct: ")


def test_a_bad_case_does_not_stop_the_others(
    tmp_path: Path, weights: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "z"):
        make_ct(tmp_path / f"{name}.nii.gz", GRIDS["canonical"])
    out = tmp_path / "out"
    out.mkdir()
    for name in ("bad_seg.nii.gz", "bad_seg.json", "a_seg.json"):
        (out / name).write_text("of an earlier run")
    cases = [tmp_path / f"{name}.nii.gz" for name in ("a", "bad", "odd", "z")]
    evaluator = make_evaluator(cases, out, weights)
    events: list[str] = []
    evaluator.add_event_handler(CaseEvents.CASE_FAILED, lambda engine: events.append(engine.state.case))
    evaluator.add_event_handler(CaseEvents.ALL_CASES_DONE, lambda: events.append("done"))
    for _ in range(2):  # an evaluator runs again after failures
        with pytest.raises(InputError) as caught:
            evaluator.run()
        assert str(caught.value) == (
            f"2 of 4 cases failed:\n  bad: {cases[1]}: bad image\n  odd: KeyError: 'unforeseen'"
        )
    assert events == ["bad", "odd", "done"] * 2
    made = {f"{case}_seg{ending}" for case in "az" for ending in (".nii.gz", ".json", ".png")}
    assert {path.name for path in out.iterdir()} == made | {
        "summary.csv",
        "summary.csv.old",
        "bad_seg.nii.gz.old",
        "bad_seg.json.old",
    }
    assert json.loads((out / "a_seg.json").read_text())["case"] == "a"
    printed = capfd.readouterr()
    assert "[1/4] a\n" in printed.out and "[4/4] z\n" in printed.out and "2 of 4 cases done" in printed.out
    assert "terminating" not in printed.err + caplog.text
    assert [record.getMessage() for record in caplog.records if record.exc_info] == ["odd failed unexpectedly"] * 2


def test_the_error_of_a_single_case_is_its_message(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(InputError) as caught:
        make_evaluator([tmp_path / "bad.nii.gz"], tmp_path / "out", weights).run()
    assert str(caught.value) == f"{tmp_path / 'bad.nii.gz'}: bad image"
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_stops_at_once(tmp_path: Path, weights: Path) -> None:
    make_ct(tmp_path / "a.nii.gz", GRIDS["canonical"])
    evaluator = make_evaluator([tmp_path / "stop.nii.gz", tmp_path / "a.nii.gz"], tmp_path / "out", weights)
    started: list[str] = []
    evaluator.add_event_handler(Events.STARTED, lambda engine: started.append(engine.state.case))
    with pytest.raises(KeyboardInterrupt):
        evaluator.run()
    assert started == ["stop"]


def test_no_space_leaves_nothing_behind(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: Any, stream: Any) -> None:
        stream.write(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    make_ct(tmp_path / "ct.nii.gz", GRIDS["canonical"])
    monkeypatch.setattr(nib.Nifti1Image, "to_stream", full)
    with pytest.raises(InputError, match=r"out/ct_seg\.nii\.gz: cannot be written \(No space .* another folder"):
        make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "out", weights).run()
    assert list((tmp_path / "out").iterdir()) == []


def test_an_output_folder_that_cannot_be_made(tmp_path: Path, weights: Path) -> None:
    make_ct(tmp_path / "ct.nii.gz", GRIDS["canonical"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file.*nothing can be written.*folder that can be written"):
        make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "file", weights).run()


def lungs(**boxes: tuple[slice, slice, slice]) -> np.ndarray:
    mask = np.zeros((40, 30, 20), np.uint8)
    mask[boxes.get("left", np.s_[4:18, 5:25, 3:17])] = 1
    mask[boxes.get("right", np.s_[22:36, 5:25, 3:17])] = 2
    return mask


@pytest.mark.parametrize(
    ("mask", "affine", "expected"),
    [
        (lungs(), np.diag([5, 5, 5, 1.0]), []),
        (
            lungs(left=np.s_[2:18, 5:25, 3:17], right=np.s_[:0, :, :]),
            np.diag([5, 5, 5, 1.0]),
            ["no voxel of right lung found"],
        ),
        (
            lungs(left=np.s_[4:18, 5:25, 3:20]),
            np.diag([5, 5, 5, 1.0]),
            ["left lung touches the border of the image (superior): its volume may be incomplete"],
        ),
        (
            lungs(right=np.s_[22:40, 0:25, 3:17]),
            np.diag([5, -5, 5, 1.0]),
            ["right lung touches the border of the image (anterior, right): its volume may be incomplete"],
        ),
        (
            lungs(),
            np.diag([-5, 5, 5, 1.0]),
            ["left lung is not on the left of right lung: check the orientation of the image"],
        ),
        (lungs(), np.diag([3, 3, 9, 1.0]), ["slices 9.0 mm apart: borders are uncertain above 5 mm"]),
        (
            lungs(),
            np.diag([2, 2, 2, 1.0]),
            ["the total volume of 63 mL is implausible (usual are 500 to 10,000 mL)"],
        ),
    ],
)
def test_warnings(mask: np.ndarray, affine: np.ndarray, expected: list[str]) -> None:
    assert measure(mask, affine, NAMES)["warnings"] == expected


def test_volume_of_an_oblique_sheared_voxel() -> None:
    affine = nib.affines.from_matvec(_turn @ [[2, 0, 0], [0, 3, 1], [0, 0, 4]])
    found = measure(lungs(), affine, NAMES)
    assert found["labels"]["left lung"] == {"value": 1, "voxels": 14 * 20 * 14, "volume_ml": 94.08}


def coloured(png: bytes, colour: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Rows and columns of pixels near a colour, and the picture's size; the legend left out."""
    picture = matplotlib.image.imread(BytesIO(png), format="png")[..., :3]
    rows, columns = np.nonzero(np.abs(picture - np.array(colour) / 255).max(axis=-1) < 0.1)
    keep = rows < 0.85 * picture.shape[0]
    return np.stack([rows[keep], columns[keep]]), picture.shape[:2]


def test_preview_is_in_radiological_convention() -> None:
    """A label at the patient's left, posterior and inferior is right, down and down in the three panels."""
    image = np.full((60, 60, 60), -1000.0)
    mask = np.zeros(image.shape, np.uint8)
    mask[5:15, 10:20, 8:18] = 1
    png = render_preview(image, mask, (2.0, 2.0, 2.0), {1: "left lung"}, "title")
    (rows, columns), (height, width) = coloured(png, (0xFF, 0x5A, 0x5F))
    panel = columns * 3 // width
    for number, right in ((0, True), (1, True), (2, True)):  # posterior is right in the sagittal panel
        within = columns[panel == number] - number * width / 3
        assert len(within), f"no outline in panel {number}"
        assert (within.mean() > width / 6) == right
        assert rows[panel == number].mean() > height / 2


@pytest.mark.parametrize("shape", [(40, 30, 1), (1, 30, 20), (12, 12, 90)])
@pytest.mark.parametrize("filled", [True, False])
def test_preview_of_any_volume(shape: tuple[int, int, int], filled: bool) -> None:
    mask = np.full(shape, int(filled), np.uint8)
    png = render_preview(np.zeros(shape), mask, (1.0, 1.0, 4.0), NAMES, "name with $ and _{", ["a $ note"])
    (rows, _), _ = coloured(png, (0xFF, 0x5A, 0x5F))
    assert bool(len(rows)) == filled


def test_sagittal_slice_goes_through_the_largest_label() -> None:
    """Between the lungs there is none of them to see."""
    mask = np.zeros((60, 40, 40), np.uint8)
    mask[5:20, 5:35, 5:35] = 1
    mask[40:58, 5:35, 5:35] = 2
    png = render_preview(np.zeros(mask.shape), mask, (2.0, 2.0, 2.0), NAMES, "")
    (_, columns), (_, width) = coloured(png, (0x3F, 0xB8, 0xFF))
    assert (columns > 0.75 * width).any()


def test_mean_hu_on_request(tmp_path: Path, weights: Path) -> None:
    """Of each label, in HU; of one that is not there, none."""
    make_ct(tmp_path / "ct.nii.gz", GRIDS["flipped"])
    make_evaluator([tmp_path / "ct.nii.gz"], tmp_path / "out", weights, mean_hu=True).run()
    labels = json.loads((tmp_path / "out" / "ct_seg.json").read_text())["labels"]
    assert all(-805 < labels[name]["mean_hu"] < -700 for name in LABELS.values())
    nib.save(nib.Nifti1Image(np.full(SHAPE, 40, np.int16), GRIDS["flipped"]), tmp_path / "body.nii.gz")
    make_evaluator([tmp_path / "body.nii.gz"], tmp_path / "out", weights, mean_hu=True).run()
    labels = json.loads((tmp_path / "out" / "body_seg.json").read_text())["labels"]
    assert [one["mean_hu"] for one in labels.values()] == [None, None]
