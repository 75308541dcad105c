"""CaseScores against values worked out by hand on boxes with anisotropic voxels."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, MapTransform

from med3d_nets import processes
from med3d_nets.errors import InputError
from med3d_nets.evaluator import CaseEvaluator
from med3d_nets.region_scores import METRICS, score
from med3d_nets.scores import CaseScores

LABELS = {"1": "left lung", "2": "right lung"}
SPACING = (1.0, 2.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])


def box(*start: int, shape: tuple[int, int, int] = (24, 24, 24)) -> torch.Tensor:
    """A cube of 10 voxels, bool."""
    region = torch.zeros(shape, dtype=torch.bool)
    region[tuple(slice(s, s + 10) for s in start)] = True
    return region


def shifted(tolerance_mm: float) -> dict[str, float]:
    """Scores of a cube moved by one slice of 3 mm."""
    return score(box(5, 5, 6), box(5, 5, 5), AFFINE, tolerance_mm)


def test_perfect() -> None:
    assert score(box(5, 5, 5), box(5, 5, 5), AFFINE, 0.0) == {
        "dice": 1.0,
        "surface_dice": 1.0,
        "hd95_mm": 0.0,
        "predicted_ml": pytest.approx(6.0),
        "true_ml": pytest.approx(6.0),
        "predicted_voxels": 1000,
        "true_voxels": 1000,
    }


def test_dice_and_hausdorff_of_a_shifted_box() -> None:
    """9 of 10 layers agree; 100 of each 488 border voxels, the outer layer, are 3 mm off."""
    found = shifted(2.0)
    assert found["dice"] == pytest.approx(0.9)
    assert found["hd95_mm"] == pytest.approx(3.0)


def test_surface_dice_of_a_shifted_box() -> None:
    """Each cube has 488 border voxels.

    More than 2 mm from the other's border are the 100 of the outer layer (3 mm) and those of the inner layer
    that are also more than 2 mm from the sides: 3 or more voxels of 1 mm along x (4 of 10), 2 or more of 2 mm
    along y (6 of 10).
    """
    assert shifted(2.0)["surface_dice"] == pytest.approx((488 - 100 - 4 * 6) / 488)
    assert shifted(2.9)["surface_dice"] == pytest.approx((488 - 100 - 4 * 6) / 488)
    assert shifted(3.0)["surface_dice"] == 1.0


def test_distances_follow_the_axes_own_spacing() -> None:
    assert score(box(8, 5, 5), box(5, 5, 5), AFFINE, 1.0)["hd95_mm"] == pytest.approx(3.0)
    assert score(box(5, 8, 5), box(5, 5, 5), AFFINE, 1.0)["hd95_mm"] == pytest.approx(6.0)
    assert score(box(5, 5, 8), box(5, 5, 5), AFFINE, 1.0)["hd95_mm"] == pytest.approx(9.0)


def test_an_oblique_affine_changes_nothing() -> None:
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.5) * SPACING, [5, 6, 7])
    assert score(box(5, 5, 6), box(5, 5, 5), turned, 2.0) == pytest.approx(shifted(2.0))


def test_a_region_at_the_border_of_the_image_has_a_surface_there() -> None:
    """Cropping to the region must not change what is its surface."""
    inside = score(box(5, 5, 6), box(5, 5, 5), AFFINE, 2.0)
    corner = score(box(0, 0, 1, shape=(10, 10, 11)), box(0, 0, 0, shape=(10, 10, 11)), AFFINE, 2.0)
    assert corner == pytest.approx(inside)


def test_a_class_that_is_absent() -> None:
    nothing = torch.zeros(24, 24, 24, dtype=torch.bool)
    both = score(nothing, nothing, AFFINE, 2.0)
    assert all(math.isnan(both[name]) for name in ("dice", "surface_dice", "hd95_mm"))
    diagonal = 24 * math.sqrt(1 + 4 + 9)
    for pred, label in ((box(5, 5, 5), nothing), (nothing, box(5, 5, 5))):
        one = score(pred, label, AFFINE, 2.0)
        assert (one["dice"], one["surface_dice"]) == (0.0, 0.0)
        assert one["hd95_mm"] == pytest.approx(diagonal)


LITS = ("voe", "rvd", "assd_mm", "mssd_mm", "rmsd_mm")


class TestLiTS:
    """The challenge's measures, on cubes of 10 voxels of 1 x 2 x 3 mm."""

    def of(self, pred: torch.Tensor, label: torch.Tensor) -> dict[str, float]:
        return score(pred, label, AFFINE, metrics=LITS)

    def test_shifted_by_one_slice(self) -> None:
        """900 of 1100 voxels in common.

        Of each cube's 488 surface voxels, the 100 of the outer layer are 3 mm off. Of the inner layer, what is not
        at the cube's sides (8 x 8 voxels) is as far from the nearest side as it is: along x 1 mm a voxel, along y 2 mm,
        at most 3 mm, for the other surface's layer is one slice off.
        """
        found = self.of(box(5, 5, 6), box(5, 5, 5))
        assert found["voe"] == pytest.approx(2 / 11) and found["rvd"] == 0
        inner = [min(min(i, 9 - i) * 1.0, min(j, 9 - j) * 2.0, 3.0) for i in range(1, 9) for j in range(1, 9)]
        apart = np.array([3.0] * 100 + inner + [0.0] * (488 - 100 - 64))
        assert found["assd_mm"] == pytest.approx(apart.mean())
        assert found["rmsd_mm"] == pytest.approx(np.sqrt((apart**2).mean()))
        assert found["mssd_mm"] == pytest.approx(3.0)

    def test_volume_difference_has_a_sign(self) -> None:
        half = box(5, 5, 5)
        half[:, :, 10:] = False
        assert self.of(half, box(5, 5, 5))["rvd"] == pytest.approx(-0.5)
        assert self.of(box(5, 5, 5), half)["rvd"] == pytest.approx(1.0)
        assert METRICS["rvd"].worst([-0.5, 0.2]) == -0.5

    def test_a_class_that_is_absent(self) -> None:
        nothing = torch.zeros(24, 24, 24, dtype=torch.bool)
        diagonal = 24 * math.sqrt(1 + 4 + 9)
        missed = self.of(nothing, box(5, 5, 5))
        assert [missed[name] for name in LITS] == pytest.approx([1.0, -1.0, *[diagonal] * 3])
        invented = self.of(box(5, 5, 5), nothing)
        assert math.isnan(invented["rvd"]) and invented["voe"] == 1.0
        assert all(math.isnan(self.of(nothing, nothing)[name]) for name in LITS)

    def test_files(self, tmp_path: Path) -> None:
        run(tmp_path, {"a": 0, "b": 2}, metrics=LITS)
        report = strict_json(tmp_path / "scores.json")
        assert list(report["summary"]["left lung"]) == ["dice", *LITS]
        assert report["summary"]["left lung"]["mssd_mm"]["worst_case"] == "b"
        header = (tmp_path / "scores.csv").read_text().splitlines()[0]
        assert header == f"case,class,dice,{','.join(LITS)},predicted_ml,true_ml"

    def test_unknown_metric(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="allowed are dice, surface_dice"):
            CaseScores(tmp_path, LABELS, metrics=["jaccard"])


def test_global_dice_counts_voxels(tmp_path: Path) -> None:
    """Of 1000 voxels each, 1000 and 800 in common; of the second class only one case has any."""
    run(tmp_path, {"a": 0, "b": -2})
    report = strict_json(tmp_path / "scores.json")
    assert report["global_dice"] == {"left lung": pytest.approx(0.9), "right lung": pytest.approx(1.0)}
    run(tmp_path, {"a": -1})
    assert strict_json(tmp_path / "scores.json")["global_dice"]["right lung"] is None


class Make(MapTransform):
    """Builds a case's label maps from the boxes that its item names."""

    def __call__(self, data: Any) -> dict[str, Any]:
        if data["case"].startswith("broken"):
            raise InputError(f"{data['case']}: cannot be read")
        maps = {
            key: MetaTensor((box(*data[key]) + 2 * box(*data["right"]).int() * data["has_right"])[None].float(), AFFINE)
            for key in ("image", "label")
        }
        return {**data, **maps}


def run(out: Path, cases: dict[str, int], **options: Any) -> CaseEvaluator:
    """Evaluate cases whose left lung is so many slices off; a negative number: without a right lung."""
    data = [
        {
            "case": name,
            "image": (1, 1, 1 + abs(off)),
            "label": (1, 1, 1),
            "right": (13, 13, 13),
            "has_right": int(off >= 0),
        }
        for name, off in cases.items()
    ]
    evaluator = CaseEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(data, Compose([Make("image")])), batch_size=1),
        network=torch.nn.Identity(),
        val_handlers=[CaseScores(out, LABELS, **options)],
    )
    try:
        evaluator.run()
    except InputError as error:
        assert "broken" in str(error)
    return evaluator


def strict_json(path: Path) -> Any:
    """Read JSON as a reader that knows no NaN or Infinity does."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_files(tmp_path: Path) -> None:
    evaluator = run(tmp_path / "out", {"c": 2, "a": 0, "broken": 0, "b": -1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["scores.csv", "scores.json"]
    report = strict_json(tmp_path / "out" / "scores.json")
    assert list(report["cases"]) == ["a", "b", "c"]
    assert report["failed"] == {"broken": "broken: cannot be read"}
    left = report["summary"]["left lung"]["dice"]
    assert left["mean"] == pytest.approx(0.9) and left["median"] == pytest.approx(0.9) and left["cases"] == 3
    assert left["worst"] == pytest.approx(0.8) and left["worst_case"] == "c"
    assert report["summary"]["left lung"]["hd95_mm"]["worst"] == pytest.approx(6.0)
    assert report["cases"]["b"]["right lung"]["dice"] is None
    assert report["summary"]["right lung"]["dice"]["cases"] == 2
    assert report["tolerance_mm"] == {"left lung": 2.0, "right lung": 2.0}
    assert evaluator.state.metrics["mean_dice"] == pytest.approx(0.95)
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert [(row["case"], row["class"]) for row in rows[:3]] == [
        ("a", "left lung"),
        ("a", "right lung"),
        ("b", "left lung"),
    ]
    assert float(rows[2]["dice"]) == pytest.approx(0.9) and float(rows[2]["true_ml"]) == pytest.approx(6.0)
    assert rows[3]["dice"] == "" and float(rows[3]["true_ml"]) == 0


def test_a_class_that_no_case_has(tmp_path: Path) -> None:
    run(tmp_path, {"a": -1})
    assert strict_json(tmp_path / "scores.json")["summary"]["right lung"]["dice"] == {
        "mean": None,
        "median": None,
        "worst": None,
        "worst_case": None,
        "cases": 0,
    }


def test_tolerance_by_class(tmp_path: Path) -> None:
    run(tmp_path, {"a": 1}, tolerance_mm={"left lung": 3.0, "right lung": 1.0})
    assert strict_json(tmp_path / "scores.json")["cases"]["a"]["left lung"]["surface_dice"] == 1.0
    with pytest.raises(InputError, match="tolerance_mm names.*needed are"):
        CaseScores(tmp_path, LABELS, {"left lung": 3.0})


def test_nothing_is_written_when_every_case_failed(tmp_path: Path) -> None:
    run(tmp_path, {"a": 1})
    run(tmp_path, {"broken": 0, "broken too": 0})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv.old", "scores.json.old"]


def test_a_label_of_another_size(tmp_path: Path) -> None:
    handler = CaseScores(tmp_path, LABELS)
    engine = type("Engine", (), {})()
    engine.state = type("State", (), {"case": "x"})()
    engine.state.output = [{"pred": MetaTensor(torch.zeros(1, 4, 4, 4)), "label": MetaTensor(torch.zeros(1, 4, 4, 5))}]
    with pytest.raises(InputError, match=r"x: the label's shape \(4, 4, 5\) differs .* \(4, 4, 4\)"):
        handler(engine)


def test_the_first_of_two_processes_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "other", {"b": 2})
    other = strict_json(tmp_path / "other" / "scores.json")["cases"]

    def gather(parts: list[Any], mine: dict[str, Any]) -> None:
        failed = {"broken": "reason"}
        parts[:] = [mine, (2, failed) if isinstance(mine, tuple) else other if "a" in mine else failed]

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(processes.dist, "all_gather_object", gather)
    run(tmp_path / "first", {"a": 0})
    report = strict_json(tmp_path / "first" / "scores.json")
    assert list(report["cases"]) == ["a", "b"] and report["failed"] == {"broken": "reason"}
    monkeypatch.setattr(processes.dist, "get_rank", lambda: 1)
    run(tmp_path / "second", {"a": 0})
    assert not (tmp_path / "second").exists()
