"""The classical lung labels, on a chest of simple shapes whose anatomy is known exactly."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from tools.lung_data import CASES, _classical, include_mass, look, make
from tools.lung_labels import LEFT, RIGHT, central_airway, close, label_lungs, outside_air, part_sides

SPACING = (3.0, 3.0, 3.0)
SHAPE = (110, 80, 80)  # 330 x 240 x 240 mm


def _grid() -> tuple[np.ndarray, ...]:
    """Coordinates in mm from the middle of the volume: towards right, front and head."""
    return tuple((np.indices(SHAPE)[axis] - (SHAPE[axis] - 1) / 2) * SPACING[axis] for axis in range(3))


def _ball(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
    return sum(((x - c) / r) ** 2 for x, c, r in zip(_grid(), centre, radii, strict=True)) <= 1.0


@pytest.fixture(scope="module")
def chest() -> tuple[np.ndarray, np.ndarray]:
    """HU and true label: body, two lungs with vessels, trachea to the head, stomach bubble, table, noise."""
    x, y, z = _grid()
    hu = np.full(SHAPE, -1000.0)
    hu[(x / 145) ** 2 + (y / 100) ** 2 <= 1] = 40
    truth = np.zeros(SHAPE, np.uint8)
    truth[_ball((-70, 0, 10), (42, 65, 80))] = LEFT
    truth[_ball((70, 0, 10), (48, 65, 85))] = RIGHT
    hu[truth > 0] = -850
    for at in (-70, 70):
        hu[(x - at) ** 2 + (z - 10) ** 2 < 4**2] = np.where(np.abs(y) < 50, 50, hu)[
            (x - at) ** 2 + (z - 10) ** 2 < 4**2
        ]
    hu[((x / 9) ** 2 + ((y + 10) / 9) ** 2 <= 1) & (z > 10)] = -1000  # trachea
    hu[_ball((-60, 30, -105), (30, 30, 10))] = -1000  # stomach bubble
    hu[(np.abs(x) < 140) & (np.abs(y + 108) < 4)] = 0  # table
    return hu + np.random.default_rng(0).normal(0, 15, SHAPE), truth


@pytest.fixture(scope="module")
def label(chest: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return label_lungs(chest[0], SPACING)


def _dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2.0 * float((a & b).sum()) / float(a.sum() + b.sum())


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_both_lungs_are_found_on_their_sides(
    chest: tuple[np.ndarray, np.ndarray], label: np.ndarray, side: int
) -> None:
    _, truth = chest
    assert label.dtype == np.uint8
    assert _dice(label == side, truth == side) > 0.98


def test_vessels_belong_and_airway_bubble_and_outside_do_not(
    chest: tuple[np.ndarray, np.ndarray], label: np.ndarray
) -> None:
    hu, truth = chest
    vessel = (truth > 0) & (hu > -200)
    assert vessel.sum() > 100
    assert (label[vessel] > 0).mean() > 0.95
    assert not label[(truth == 0) & (hu < -930)].any()


def test_a_mirrored_chest_swaps_the_labels(chest: tuple[np.ndarray, np.ndarray], label: np.ndarray) -> None:
    hu, _ = chest
    swapped = np.array([0, RIGHT, LEFT], np.uint8)[label[::-1]]
    assert (label_lungs(hu[::-1], SPACING) == swapped).mean() > 0.999


def test_a_view_that_cuts_the_lungs_still_finds_them(chest: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = (volume[25:-25, 15:-15, 20:60] for volume in chest)
    label = label_lungs(hu, SPACING)
    assert _dice(label == LEFT, truth == LEFT) > 0.97
    assert _dice(label == RIGHT, truth == RIGHT) > 0.97


def test_no_lung_in_view_gives_an_empty_label(chest: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = chest
    assert not truth[:, :, :10].any()
    assert not label_lungs(hu[:, :, :10], SPACING).any()


def test_outside_air_measures_its_hu_and_leaves_the_lungs(chest: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = chest
    outside, air_hu = outside_air(hu, SPACING)
    assert outside[0, 0].all()
    assert not outside[truth > 0].any()
    assert air_hu == pytest.approx(-1000, abs=5)


def test_central_airway_is_the_trachea_only(chest: tuple[np.ndarray, np.ndarray]) -> None:
    hu, truth = chest
    outside, air_hu = outside_air(hu, SPACING)
    airway = central_airway(hu, (hu < -400) & ~outside, SPACING, air_hu)
    assert airway[SHAPE[0] // 2, 36, -10:].all()
    assert not airway[truth > 0].any()


def test_joined_lungs_are_parted_at_the_dense_line() -> None:
    lungs = np.zeros((60, 30, 30), bool)
    lungs[5:55, 5:25, 5:25] = True
    hu = np.full(lungs.shape, -850.0)
    hu[29] = -450  # a thin junction line that a threshold does not see
    sides = part_sides(lungs, hu, np.zeros_like(lungs), SPACING)
    assert (sides[5:29][lungs[5:29]] == LEFT).all()
    assert (sides[30:55][lungs[30:55]] == RIGHT).all()


@pytest.mark.parametrize(("airway_at", "side"), [(55, LEFT), (2, RIGHT)])
def test_a_single_lung_is_named_by_the_airway(airway_at: int, side: int) -> None:
    lungs = np.zeros((60, 30, 30), bool)
    lungs[15:40, 5:25, 5:25] = True
    airway = np.zeros_like(lungs)
    airway[airway_at, 15, 10:20] = True
    sides = part_sides(lungs, np.where(lungs, -850.0, 40.0), airway, SPACING)
    assert set(np.unique(sides)) == {0, side}


def test_closing_keeps_what_touches_the_border() -> None:
    mask = np.zeros((20, 20, 20), bool)
    mask[:8] = True
    mask[3:5, 9:11, 9:11] = False
    closed = close(mask, SPACING, 6.0)
    assert closed[:8].all()
    assert not closed[8:].any()


def test_a_mass_in_a_box_joins_the_lung_up_to_the_ribs() -> None:
    hu = np.full((100, 100, 5), 40.0)
    hu[20:60, 20:80] = -850
    hu[20:60, 20:35] = 40  # the mass, between lung and rib
    hu[:, 12:17] = 700  # rib
    label = np.where(hu < -400, LEFT, 0).astype(np.uint8)
    box = (99 - 58, 99 - 36, 99 - 22, 99 - 4)  # columns and rows run the other way in DICOM
    grown = include_mass(label, hu, (1.0, 1.0, 5.0), {2: box}, LEFT)
    assert grown[40, 22:35, 2].all()
    assert not grown[:, :17].any()
    assert (grown[:, :, [0, 1, 3, 4]] == label[:, :, [0, 1, 3, 4]]).all()


def test_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cip64\.nii\.gz.*--source"):
        make(str(tmp_path), str(tmp_path / "out"), phantoms=0)


def test_look_asks_for_make_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tools\.lung_data make"):
        look(str(tmp_path), str(tmp_path / "png"))


def test_one_scan_is_one_patient() -> None:
    patients = {case.name: case.patient for case in CASES}
    assert patients["totalseg_aorta"] == patients["totalseg_pulmonary"]
    assert patients["elastix_baseline"] == patients["elastix_followup"]
    held_out = {case.patient for case in CASES if case.held_out}
    assert held_out == {"cip64"}
    assert not held_out & {case.patient for case in CASES if not case.held_out}


def test_make_writes_a_decathlon_folder_once(
    tmp_path: Path, chest: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import tools.lung_data as lung_data

    hu, _ = chest
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])  # stored towards left and back, as DICOM is
    nib.save(nib.Nifti1Image(hu[::-1, ::-1].astype(np.int16), affine), tmp_path / "scan.nii.gz")
    case = lung_data.Case("scan", "scan.nii.gz", "somebody", _classical, 3.0, slices=(5, 75))
    monkeypatch.setattr(lung_data, "CASES", (case,))
    out = tmp_path / "out"
    make(str(tmp_path), str(out), phantoms=0)
    index = json.loads((out / "dataset.json").read_text())
    entry = {"image": "./imagesTr/scan.nii.gz", "label": "./labelsTr/scan.nii.gz", "patient": "somebody"}
    assert index["training"] == [{**entry, "weight": 3.0}]
    image, label = (nib.load(out / index["training"][0][key]) for key in ("image", "label"))
    assert image.get_data_dtype() == np.int16
    assert label.get_data_dtype() == np.uint8
    assert image.shape == label.shape == (110, 80, 70)
    assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    assert image.affine[2, 3] == pytest.approx(15.0)
    assert not list(out.rglob(".*"))
    monkeypatch.setattr(lung_data, "_real", lambda *_: pytest.fail("made again"))
    make(str(tmp_path), str(out), phantoms=0)
