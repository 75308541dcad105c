"""Points in scans: which coordinates are read, which scan is theirs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from med3d_nets import LoadVolumed, nodules_to_classify
from med3d_nets.errors import InputError
from med3d_nets.point_crop import CropAtPointd, LoadScand
from med3d_nets.seed_points import cases_at_points, read_points

HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
# flipped, anisotropic, oblique: voxel (i, j, k) to mm in RAS
AFFINE = nib.affines.from_matvec(
    np.array([[-0.8, 0.1, 0.0], [0.1, 0.8, 0.3], [0.0, -0.2, 2.0]]), np.array([40.0, -30.0, 12.0])
)
SHAPE = (60, 50, 24)


def table(folder: Path, text: str) -> Path:
    path = folder / "points.csv"
    path.write_text(text)
    return path


def scan(path: Path, voxel: tuple[int, int, int] = (20, 30, 9), affine: np.ndarray = AFFINE) -> np.ndarray:
    """Lung with one bright voxel and its neighbours; returns the voxel's position in mm, RAS."""
    voxels = np.full(SHAPE, -850, np.float32)
    voxels[tuple(slice(v - 1, v + 2) for v in voxel)] = 100
    voxels[voxel] = 200
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return nib.affines.apply_affine(affine, voxel)


def test_lps_is_turned_and_ras_is_not(tmp_path: Path) -> None:
    path = table(tmp_path, HEADER + "1.2.3,10,-20,30,5.5\n")
    point = read_points(path)[0]
    assert (point.row, point.series, point.position, point.diameter) == (2, "1.2.3", (-10.0, 20.0, 30.0), 5.5)
    assert read_points(path, "RAS")[0].position == (10.0, -20.0, 30.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column"),
        (HEADER, "no row below its header"),
        ("seriesuid,x,y,z\na,1,2,3\n", "no column coordX"),
        ("coordX,coordY,coordZ\n1,2,3\n", "neither a column seriesuid nor a column path"),
        (HEADER + "a,1,two,3,\n", "line 2: coordY is 'two'"),
        (HEADER + "a,1,inf,3,\n", "line 2: coordY is 'inf'"),
        (HEADER + "a,1,2,3,4\n,1,2,3,4\n", "line 3: no seriesuid"),
        (HEADER + "a,1,2,3,0\n", "line 2: diameter_mm is 0"),
        ("case,path,coordX,coordY,coordZ\nn,a.nii,1,2,3\nN,a.nii,4,5,6\n", "the name n comes twice"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_points(table(tmp_path, text))


def test_unknown_space(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="space='XYZ': allowed are LPS and RAS"):
        read_points(table(tmp_path, HEADER + "a,1,2,3,4\n"), "XYZ")


@pytest.mark.parametrize("place", ["a.nii.gz", "subset3/a.nii.gz"])
def test_series_are_found_by_name_also_in_subsets(tmp_path: Path, place: str) -> None:
    scan(tmp_path / "scans" / place)
    cases = nodules_to_classify(tmp_path / "scans", table(tmp_path, HEADER + "a,1,2,3,4\na,2,2,3,4\n"))
    assert [Path(case["image"]).name for case in cases] == ["a.nii.gz"] * 2
    assert [case["case"] for case in cases] == ["a_2", "a_3"]


def test_paths_are_found(tmp_path: Path) -> None:
    scan(tmp_path / "deep" / "a.nii.gz")
    points = read_points(table(tmp_path, "case,path,coordX,coordY,coordZ\nn,deep/a.nii.gz,1,2,3\n"))
    assert cases_at_points(points, tmp_path)[0]["case"] == "n"


def test_a_missing_scan_names_its_row(tmp_path: Path) -> None:
    scan(tmp_path / "scans" / "a.nii.gz")
    with pytest.raises(InputError, match=r"line 3: there is no scan 'b'.*Its scans: a"):
        nodules_to_classify(tmp_path / "scans", table(tmp_path, HEADER + "a,1,2,3,4\nb,1,2,3,4\n"))


def test_the_cube_is_centred_on_the_point(tmp_path: Path) -> None:
    """In a flipped, oblique, anisotropic scan the bright voxel comes to the cube's middle."""
    position = scan(tmp_path / "a.nii.gz")
    item = {"image": str(tmp_path / "a.nii.gz"), "point": tuple(position)}
    cube = CropAtPointd("image", [1.0, 1.0, 1.0], [17, 17, 17])(LoadScand("image")(item))["image"]
    assert cube.shape == (1, 17, 17, 17)
    assert np.unravel_index(int(cube.argmax()), (17, 17, 17)) == (8, 8, 8)
    assert float(cube.max()) == pytest.approx(200, abs=1)
    np.testing.assert_allclose(nib.affines.apply_affine(np.asarray(cube.affine), [8, 8, 8]), position, atol=1e-6)


def test_without_a_point_the_middle_is_taken_and_lung_lies_outside(tmp_path: Path) -> None:
    """A crop of two slices, as LIDC has them."""
    voxels = np.full((21, 21, 2), 50, np.float32)
    nib.save(nib.Nifti1Image(voxels, np.diag([0.7, 0.7, 2.5, 1])), tmp_path / "a.nii.gz")
    item = LoadVolumed("image")({"image": str(tmp_path / "a.nii.gz")})
    cube = CropAtPointd("image", [1.0, 1.0, 1.0], [9, 9, 16], outside=-850, air=None)(item)["image"][0]
    assert float(cube[4, 4, 7]) == float(cube[4, 4, 8]) == pytest.approx(50)
    assert float(cube[4, 4, 0]) == float(cube[4, 4, 15]) == pytest.approx(-850)


def test_a_scan_is_read_once_for_all_its_points_and_stays_as_it_is(tmp_path: Path) -> None:
    position = scan(tmp_path / "a.nii.gz")
    load, crop = LoadScand("image"), CropAtPointd("image", [1.0, 1.0, 1.0], [9, 9, 9])
    item = {"image": str(tmp_path / "a.nii.gz"), "point": tuple(position)}
    first = crop(load(item))["image"]
    (tmp_path / "a.nii.gz").unlink()
    assert np.array_equal(crop(load(item))["image"], first)


def test_a_point_outside_names_its_row_and_the_other_space(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [-20, -60, 0]
    scan(tmp_path / "a.nii.gz", affine=affine)
    item = {"image": str(tmp_path / "a.nii.gz"), "where": "points.csv, line 7"}
    crop = CropAtPointd("image", [1.0, 1.0, 1.0], [9, 9, 9])
    with pytest.raises(InputError, match=r"points.csv, line 7: the point .*\(RAS\) is outside .*other of LPS and RAS"):
        crop(LoadScand("image")({**item, "point": (10.0, 30.0, 5.0)}))
    with pytest.raises(InputError, match=r"x -20 to 39, y -60 to -11, z 0 to 23 mm.*Check the row"):
        crop(LoadScand("image")({**item, "point": (500.0, 30.0, 5.0)}))


def test_a_point_in_air_is_a_warning(tmp_path: Path) -> None:
    voxels = np.full((40, 40, 40), -1000, np.float32)
    voxels[20:] = -800
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    load, crop = LoadScand("image"), CropAtPointd("image", [1.0, 1.0, 1.0], [9, 9, 9])
    item = {"image": str(tmp_path / "a.nii.gz")}
    assert "only air around the point" in crop(load({**item, "point": (8.0, 20.0, 20.0)}))["warning"]
    assert crop(load({**item, "point": (30.0, 20.0, 20.0)}))["warning"] == ""


@pytest.mark.parametrize(("spacing", "size"), [([1, 1], [8, 8, 8]), ([1, 1, 1], [8, 8]), ([1, 1, 1], [8, 8, 0])])
def test_bad_cubes(spacing: list[float], size: list[int]) -> None:
    with pytest.raises(InputError, match="needed are three"):
        CropAtPointd("image", spacing, size)
