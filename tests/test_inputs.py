"""Paths to checked volumes: every good form loads on its own grid, every bad one is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import LoadImage
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from med3d_nets import volume_files
from med3d_nets.errors import InputError
from med3d_nets.inputs import LoadVolumed, find_cases

SHAPE = (16, 12, 5)
AFFINE = np.array([[-0.8, 0, 0, 10], [0, 0.9, 0.2, -20], [0, -0.1, 3, 30], [0, 0, 0, 1]])


def ct(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Air, lung, fat, soft tissue and bone with noise, in HU."""
    rng = np.random.default_rng(0)
    tissues = rng.choice([-1000, -850, -100, 40, 300], size=shape, p=[0.3, 0.25, 0.1, 0.3, 0.05])
    return (tissues + rng.normal(0, 12, shape)).astype(np.int16)


def load(path: Path) -> MetaTensor:
    return LoadVolumed("image")({"image": str(path)})["image"]


def write_nifti(path: Path, data: np.ndarray | None = None, affine: np.ndarray | None = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(ct() if data is None else data, affine), path)
    return path


def write_itk(path: Path, data: np.ndarray | None = None, vector: bool = False, zipped: bool = False) -> Path:
    """Write an array in ITK's order, (Z, Y, X) and then the vector's components."""
    image = itk.image_from_array(ct().T.copy() if data is None else data, is_vector=vector)
    image.SetSpacing([0.75, 0.875, 3.0, 1.0][: image.GetImageDimension()])
    itk.imwrite(image, str(path), compression=zipped)
    return path


def write_slices(
    folder: Path, heights: list[float] | None = None, uid: str = "", name: str = "{}", **fields: object
) -> Path:
    """Write one CT slice per height in mm, stored from the top down, with intercept -1024."""
    folder.mkdir(exist_ok=True)
    uid = uid or generate_uid()
    heights = [3.0 * z for z in range(SHAPE[2])] if heights is None else heights
    for i, height in enumerate(reversed(heights)):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item = pydicom.Dataset()
        item.file_meta = meta
        item.SOPClassUID, item.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        item.SeriesInstanceUID, item.Modality, item.SeriesDescription = uid, "CT", "Lung 3 mm"
        item.ImagePositionPatient = [-10.0, 20.0, height]
        item.ImageOrientationPatient, item.PixelSpacing, item.SliceThickness = (
            [1, 0, 0, 0, 1, 0],
            [0.9, 0.8],
            3,
        )
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated = item.BitsStored = 16
        item.HighBit, item.PixelRepresentation, item.RescaleSlope, item.RescaleIntercept = 15, 0, 1, -1024
        pixels = (ct()[:, :, (len(heights) - 1 - i) % SHAPE[2]].T + 1024).clip(0).astype(np.uint16)
        item.Rows, item.Columns = pixels.shape
        item.PixelData = pixels.tobytes()
        for key, value in fields.items():
            setattr(item, key, value)
        item.save_as(folder / name.format(i), enforce_file_format=True)
    return folder


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def flip(path: Path) -> Path:
    """Invert the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def replace(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def nifti_field(path: Path, offset: int, value: float, affine: np.ndarray | None = None) -> Path:
    """Write a NIfTI file and put a float32 into its header, as another program could."""
    content = bytearray(write_nifti(path, affine=affine).read_bytes())
    content[offset : offset + 4] = np.float32(value).tobytes()
    path.write_bytes(bytes(content))
    return path


def two_series(folder: Path) -> Path:
    write_slices(folder, uid="1.2.3", name="a{}")
    return write_slices(folder, [0.0], uid="1.2.4", name="scout{}", SeriesDescription="Topogram")


def unequal(folder: Path, **fields: object) -> Path:
    write_slices(folder, [0.0, 3.0, 6.0], uid="1.2.3", name="a{}")
    return write_slices(folder, [9.0], uid="1.2.3", name="b{}", **fields)


def cut_slice(folder: Path) -> Path:
    cut(write_slices(folder) / "2", 0.8)
    return folder


def spacing_affine(x: float) -> np.ndarray:
    return np.diag([x, 1.0, 1.0, 1.0])


def with_value(value: float) -> np.ndarray:
    data = ct().astype(np.float32)
    data[3, 3, :3] = value
    return data


PIXDIM_Y, SROW_X = 84, 280  # byte offsets in a NIfTI-1 header
RGB = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
SINGULAR = np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
SIDEWAYS = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}

BAD: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing": (lambda d: d / "none.nii.gz", ["does not exist"]),
    "empty nifti": (lambda d: cut(write_nifti(d / "x.nii.gz"), 0), ["cannot be read"]),
    "truncated nii.gz": (
        lambda d: cut(write_nifti(d / "x.nii.gz"), 0.6),
        ["cannot be read", "end-of-stream"],
    ),
    "nii.gz without its checksum": (lambda d: cut(write_nifti(d / "x.nii.gz"), 0.999), ["truncated"]),
    "truncated nii": (lambda d: cut(write_nifti(d / "x.nii"), 0.6), ["truncated"]),
    "damaged nii.gz": (lambda d: flip(write_nifti(d / "x.nii.gz")), ["cannot be read"]),
    "truncated nrrd": (lambda d: cut(write_itk(d / "x.nrrd"), 0.6), ["truncated"]),
    "truncated zipped nrrd": (lambda d: cut(write_itk(d / "x.nrrd", zipped=True), 0.6), ["truncated"]),
    "truncated mha": (lambda d: cut(write_itk(d / "x.mha"), 0.6), ["truncated"]),
    "damaged zipped mha": (lambda d: flip(write_itk(d / "x.mha", zipped=True)), ["cannot be read"]),
    "mhd without data": (lambda d: replace(write_itk(d / "x.mhd"), b"x.raw", b"y.raw"), ["cannot be read"]),
    "2-D nifti": (lambda d: write_nifti(d / "x.nii.gz", ct((16, 12))), ["2-D", "16 x 12"]),
    "4-D nifti": (lambda d: write_nifti(d / "x.nii.gz", ct((8, 8, 4, 3))), ["4-D", "8 x 8 x 4 x 3"]),
    "2-D nrrd": (lambda d: write_itk(d / "x.nrrd", ct((12, 16))), ["2-D"]),
    "4-D mha": (lambda d: write_itk(d / "x.mha", ct((2, 5, 12, 16))), ["4-D", "16 x 12 x 5 x 2"]),
    "RGB nifti": (lambda d: write_nifti(d / "x.nii.gz", RGB), ["RGB"]),
    "complex nifti": (lambda d: write_nifti(d / "x.nii", ct().astype(np.complex64)), ["complex"]),
    "RGB nrrd": (lambda d: write_itk(d / "x.nrrd", ct((5, 12, 16, 3)), vector=True), ["3 values per voxel"]),
    "no voxels": (lambda d: write_nifti(d / "x.nii", ct((16, 0, 5))), ["no voxels"]),
    "NaN": (lambda d: write_nifti(d / "x.nii", with_value(np.nan)), ["3 NaN or infinite"]),
    "inf nrrd": (lambda d: write_itk(d / "x.nrrd", with_value(np.inf)), ["3 NaN or infinite"]),
    "zero pixdim": (lambda d: nifti_field(d / "x.nii", PIXDIM_Y, 0), ["spacing", "1 x 0 x 1", "0.05 to 30"]),
    "negative pixdim": (lambda d: nifti_field(d / "x.nii", PIXDIM_Y, -2), ["spacing", "1 x -2 x 1"]),
    "zero column": (lambda d: nifti_field(d / "x.nii", SROW_X, 0, np.eye(4)), ["spacing is 0 x 1 x 1"]),
    "huge spacing": (lambda d: write_nifti(d / "x.nii", affine=spacing_affine(700)), ["spacing is 700 x"]),
    "tiny spacing": (lambda d: write_nifti(d / "x.nii", affine=spacing_affine(1e-3)), ["0.001 x 1"]),
    "zero mha spacing": (
        lambda d: replace(write_itk(d / "x.mha"), b"Spacing = 0.75", b"Spacing = 0"),
        ["0 x 0.875 x 3"],
    ),
    "negative mha spacing": (
        lambda d: replace(write_itk(d / "x.mha"), b"Spacing = 0.75", b"Spacing = -0.75"),
        ["-0.75 x 0.875 x 3"],
    ),
    "singular nifti": (lambda d: write_nifti(d / "x.nii", affine=SINGULAR), ["singular"]),
    "singular nrrd": (lambda d: replace(write_itk(d / "x.nrrd"), b"(0,0.875", b"(0.875,0"), ["singular"]),
    "NaN affine": (
        lambda d: nifti_field(d / "x.nii", SROW_X, np.nan, np.eye(4)),
        ["NaN or infinite entries"],
    ),
    "two series": (lambda d: two_series(d / "s"), ["2 DICOM series", "1.2.3", "5", "1.2.4", "Topogram", "1"]),
    "missing slice": (
        lambda d: write_slices(d / "s", [0.0, 3.0, 9.0, 12.0]),
        ["missing slice", "3.00 mm (2) and 9.00 mm (1)", "gap is 6.00 mm"],
    ),
    "missing one of three": (lambda d: write_slices(d / "s", [0.0, 3.0, 9.0]), ["missing slice"]),
    "duplicate slice": (lambda d: write_slices(d / "s", [0.0, 3.0, 3.0, 6.0]), ["1 and 2 are duplicates"]),
    "uneven slices": (lambda d: write_slices(d / "s", [0.0, 3.0, 6.0, 10.0, 14.0, 18.0, 22.0]), ["unevenly"]),
    "unequal orientation": (lambda d: unequal(d / "s", **SIDEWAYS), ["orientations", "a0", "b0"]),
    "unequal size": (lambda d: unequal(d / "s", Rows=6, PixelData=bytes(192)), ["16 x 12", "16 x 6", "b0"]),
    "truncated slice": (lambda d: cut_slice(d / "s"), ["pixels of 2 cannot be read"]),
    "no position": (lambda d: write_slices(d / "s", ImagePositionPatient=None), ["ImagePositionPatient"]),
    "multi-frame": (lambda d: write_slices(d / "s", [0.0], NumberOfFrames=4), ["multi-frame", "dcm2niix"]),
    "only a report": (lambda d: write_slices(d / "s", Modality="SR"), ["no image"]),
    "zero pixel spacing": (lambda d: write_slices(d / "s", PixelSpacing=[0, 0.8]), ["0.8 x 0 x 3"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_volume_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build, words = BAD[name]
    path = build(tmp_path)
    with pytest.raises(InputError) as caught:
        load(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".NII.GZ"])
def test_nifti_loads_on_its_grid(suffix: str, tmp_path: Path) -> None:
    image = load(write_nifti(tmp_path / f"x{suffix}"))
    assert image.shape == (1, *SHAPE) and image.dtype == torch.float32
    np.testing.assert_array_equal(image[0].numpy(), ct())
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(image.meta["original_affine"], AFFINE, atol=1e-6)
    assert image.meta["filename_or_obj"] == str(tmp_path / f"x{suffix}")


@pytest.mark.parametrize(("sform", "qform"), [(1, 0), (0, 1), (0, 0), (2, 1)])
def test_nifti_affine_is_nibabels(sform: int, qform: int, tmp_path: Path) -> None:
    image = nib.Nifti1Image(ct(), None)
    image.header.set_zooms((0.7, 0.8, 2.5))
    image.set_sform(AFFINE if sform else None, sform)
    image.set_qform(np.diag([0.7, 0.8, 2.5, 1]) if qform else None, qform)
    nib.save(image, tmp_path / "x.nii")
    np.testing.assert_allclose(load(tmp_path / "x.nii").affine, nib.load(tmp_path / "x.nii").affine, atol=1e-6)


def test_scaled_and_big_endian_nifti(tmp_path: Path) -> None:
    image = nib.Nifti1Image(ct() + 1024, AFFINE, nib.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(1, -1024)
    nib.save(image, tmp_path / "x.nii")
    np.testing.assert_allclose(load(tmp_path / "x.nii")[0], nib.load(tmp_path / "x.nii").get_fdata())


@pytest.mark.parametrize("name", ["x.nrrd", "x.nhdr", "x.mha", "x.mhd"])
@pytest.mark.parametrize("zipped", [False, True])
def test_itk_file_loads_as_monai_loads_it(name: str, zipped: bool, tmp_path: Path) -> None:
    image = load(write_itk(tmp_path / name, zipped=zipped))
    expected = LoadImage(reader="ITKReader", ensure_channel_first=True)(tmp_path / name)
    np.testing.assert_array_equal(image[0].numpy(), ct())
    torch.testing.assert_close(image.affine, expected.affine)


@pytest.mark.parametrize("data", [ct((16, 12, 1)), ct((16, 12, 5, 1)), ct((16, 12, 1, 1, 1))])
def test_singletons(data: np.ndarray, tmp_path: Path) -> None:
    expected = (1, 16, 12, data.shape[2])
    assert load(write_nifti(tmp_path / "x.nii", data)).shape == expected
    if data.ndim < 5:
        assert load(write_itk(tmp_path / "x.nrrd", data.T.copy())).shape == expected


def test_dicom_series_loads_with_rescale_and_order(tmp_path: Path) -> None:
    write_slices(tmp_path / "s", name="IM{}")
    (tmp_path / "s" / "notes.txt").write_text("not an image")
    write_slices(tmp_path / "s", [0.0], name="segmentation{}", Modality="SEG")
    image = load(tmp_path / "s")
    np.testing.assert_array_equal(image[0].numpy(), ct().clip(-1024))
    expected = [[-0.8, 0, 0, 10], [0, -0.9, 0, -20], [0, 0, 3, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(image.affine, expected, atol=1e-6)
    assert image.meta["filename_or_obj"] == str(tmp_path / "s")


def test_old_dicom_files_without_preamble(tmp_path: Path) -> None:
    write_slices(tmp_path / "s")
    for file in (tmp_path / "s").iterdir():
        content = file.read_bytes()
        file.write_bytes(content[content.index(b"\x08\x00\x16\x00UI") :])
    assert [case["case"] for case in find_cases(tmp_path)] == ["s"]
    np.testing.assert_array_equal(load(tmp_path / "s")[0].numpy(), ct().clip(-1024))


def test_dicom_series_of_one_slice(tmp_path: Path) -> None:
    image = load(write_slices(tmp_path / "s", [7.0]))
    assert image.shape == (1, 16, 12, 1)
    np.testing.assert_allclose(image.affine[:3, 2:], [[0, 10], [0, -20], [3, 7]], atol=1e-6)


def test_gantry_tilt_shears_the_affine(tmp_path: Path) -> None:
    tilt = [1, 0, 0, 0, np.cos(0.3), np.sin(0.3)]
    image = load(write_slices(tmp_path / "s", ImageOrientationPatient=tilt))
    np.testing.assert_allclose(image.affine[:3, 2], [0, 0, 3], atol=1e-6)
    np.testing.assert_allclose(image.affine[:3, 1], [0, -0.9 * tilt[4], 0.9 * tilt[5]], atol=1e-6)


def test_batch_of_one_collates(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz")
    write_itk(tmp_path / "b.nrrd")
    write_slices(tmp_path / "c")
    cases = find_cases(tmp_path)
    batches = list(DataLoader(Dataset(cases, LoadVolumed("image")), batch_size=1))
    assert [b["case"] for b in batches] == [["a"], ["b"], ["c"]]
    assert all(b["image"].shape == (1, 1, *SHAPE) and b["image"].affine.shape == (1, 4, 4) for b in batches)


def test_find_cases_mixes_files_and_series(tmp_path: Path) -> None:
    write_slices(tmp_path, name="{}.dcm")
    write_slices(tmp_path / "series1")
    write_slices(tmp_path / "1.2.840")
    for name in ("b.nii.gz", "A.NRRD", ".hidden.nii.gz", "notes.txt", "report.pdf", "picture.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "c.nii.gz").write_bytes(b"")
    found = find_cases(tmp_path)
    assert [c["image"] for c in found] == sorted(c["image"] for c in found)
    assert {c["case"]: c["image"] for c in found} == {
        tmp_path.name: str(tmp_path),
        "1.2.840": str(tmp_path / "1.2.840"),
        "A": str(tmp_path / "A.NRRD"),
        "b": str(tmp_path / "b.nii.gz"),
        "series1": str(tmp_path / "series1"),
    }


def test_find_cases_takes_one_file_or_one_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nifti(tmp_path / "scan.01.nii.gz")
    monkeypatch.chdir(tmp_path)
    assert find_cases("scan.01.nii.gz") == [{"image": str(tmp_path / "scan.01.nii.gz"), "case": "scan.01"}]
    write_slices(tmp_path / "s")
    assert find_cases(Path("s")) == [{"image": str(tmp_path / "s"), "case": "s"}]


def test_case_names_are_unique(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nrrd", "A.mha", "a_nrrd.nii", "b.nii"):
        (tmp_path / name).write_bytes(b"")
    names = [c["case"] for c in find_cases(tmp_path)]
    assert len({name.lower() for name in names}) == 5 and "b" in names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", ["does not exist"]),
        ("empty", ["holds no volume", ".nii.gz", "DICOM series"]),
        ("scan.png", ["not a known volume file", ".mha"]),
        ("series/0", ["DICOM slice", "folder"]),
        ("", ["does not exist"]),
    ],
)
def test_find_cases_refuses(name: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "scan.png").write_bytes(b"")
    write_slices(tmp_path / "series")
    with pytest.raises(InputError) as caught:
        find_cases(tmp_path / name if name else "")
    for word in [name, *words]:
        assert word in str(caught.value)


def table(folder: Path, text: str) -> Path:
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return folder / "list.csv"


def test_find_cases_of_a_table(tmp_path: Path) -> None:
    """Relative and absolute paths, a DICOM folder, names given or made; the order is the table's."""
    write_slices(tmp_path / "s")
    for folder in ("elsewhere", "sub"):
        (tmp_path / folder).mkdir()
    other = write_nifti(tmp_path / "elsewhere" / "b.nii.gz")
    write_nifti(tmp_path / "sub" / "a.nii.gz")
    text = f"image,note\nsub/a.nii.gz,x\n{other},\ns,y\n"
    images = [str(path) for path in (tmp_path / "sub" / "a.nii.gz", other, tmp_path / "s")]
    assert find_cases(table(tmp_path, text)) == [
        {"image": image, "case": case} for image, case in zip(images, ("a", "b", "s"), strict=True)
    ]
    named = f"case,image\np 3,{other}\np-1,s\n"
    assert [(one["case"], one["image"]) for one in find_cases(table(tmp_path, named))] == [
        ("p 3", images[1]),
        ("p-1", images[2]),
    ]


TABLES = {
    "no column": ("path\na.nii\n", r"list.csv: has no column image. Its columns: path. Needed: image"),
    "empty": ("", r"list.csv: has no column image. Its columns: none"),
    "no row": ("image,case\n", r"list.csv: has no row below its header"),
    "no image": ("image,case\na.nii,x\n,y\n", r"list.csv, line 3: no image in this row"),
    "no case": ("image,case\na.nii,x\na.nii,\n", r"list.csv, line 3: no case in this row"),
    "case twice": ("image,case\na.nii,x\na.nii,X\n", r"list.csv, line 3: the case 'X' is that of line 2 too"),
    "case with a path": ("image,case\na.nii,../x\n", r"list.csv, line 2: '../x' cannot be part of a file's name"),
    "absent": ("image\na.nii\nb.nii\n", r"list.csv, line 3: .*b.nii does not exist. Allowed as image: .*relative"),
    "no volume": ("image\nlist.csv\n", r"list.csv, line 2: .*list.csv is no volume. Allowed as image: .*DICOM series"),
    "folder without volume": ("image\nempty\n", r"list.csv, line 2: .*empty is no volume"),
}


@pytest.mark.parametrize("name", TABLES)
def test_find_cases_refuses_a_table(name: str, tmp_path: Path) -> None:
    text, words = TABLES[name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.nii").write_bytes(b"")
    with pytest.raises(InputError, match=words):
        find_cases(table(tmp_path, text))


def test_missing_key_follows_the_flag() -> None:
    assert LoadVolumed("image", allow_missing_keys=True)({"other": 1}) == {"other": 1}
    with pytest.raises(KeyError):
        LoadVolumed("image")({"other": 1})


@pytest.mark.real_data
def test_real_series_and_its_gap(real_data: Path, tmp_path: Path) -> None:
    series = real_data / "chest_ct_dicom" / "series"
    assert load(series).shape == (1, 512, 512, 64)
    shutil.copytree(series, tmp_path / "gap", ignore=shutil.ignore_patterns("1-20.dcm"))
    with pytest.raises(InputError, match=r"missing slice.*1-21.dcm.*1-19.dcm.*gap is 10.00 mm"):
        load(tmp_path / "gap")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("scaling", [(None, None), (0.37, -1024.3)], ids=str)
def test_voxels_read_in_parts(
    suffix: str, dtype: type, scaling: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The values are those of nibabel, to the bit, and no part is larger than it may be."""
    monkeypatch.setattr(volume_files, "_CHUNK", 100)
    read = []
    parts = volume_files.ArrayProxy
    monkeypatch.setattr(
        volume_files, "ArrayProxy", lambda *args, **kwargs: read.append(args[1][0]) or parts(*args, **kwargs)
    )
    image = nib.Nifti1Image(np.abs(ct()).clip(0, 255).astype(dtype)[..., None], AFFINE)
    image.header.set_slope_inter(*scaling)
    nib.save(image, tmp_path / f"a{suffix}")
    wanted = nib.load(tmp_path / f"a{suffix}").get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(load(tmp_path / f"a{suffix}")[0], wanted[..., 0])
    assert len(read) == 10 and max(read) == (100,)
