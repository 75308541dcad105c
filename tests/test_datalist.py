"""Reading dataset.json and splitting by patient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from med3d_nets.datalist import read_datalist, split_by_patient
from med3d_nets.errors import InputError


def write(folder: Path, *images: str, **more: Any) -> list[dict[str, Any]]:
    """Files with labels of the same names, and a dataset.json that lists them; ``more`` goes into every entry."""
    entries = [{"image": f"./images/{name}", "label": f"./labels/{name}", **more} for name in images]
    for entry in entries:
        for key in ("image", "label"):
            path = folder / entry[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (folder / "dataset.json").write_text(json.dumps({"training": entries, "name": "lungs", "test": []}))
    return entries


def cases(*patients: str) -> list[dict[str, Any]]:
    return [{"case": f"{index}", "patient": patient} for index, patient in enumerate(patients)]


def test_cases(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "b.nrrd")
    first, second = read_datalist(tmp_path)
    assert first == {
        "image": str(tmp_path / "images" / "a.nii.gz"),
        "label": str(tmp_path / "labels" / "a.nii.gz"),
        "case": "a",
        "patient": "a",
        "weight": 1.0,
    }
    assert (second["case"], second["patient"]) == ("b", "b")


def test_a_case_is_the_name_without_suffix_only(tmp_path: Path) -> None:
    """Dots are common in names; two scans must not become one case."""
    write(tmp_path, "1.2.840.nii.gz", "1.2.841.nii.gz", "p.1.nii", "p.2.mha")
    assert [case["case"] for case in read_datalist(tmp_path)] == ["1.2.840", "1.2.841", "p.1", "p.2"]


def test_equal_names_in_different_folders(tmp_path: Path) -> None:
    write(tmp_path, "p1/ct.nii.gz", "p2/ct.nii.gz", "other.nii.gz")
    found = read_datalist(tmp_path)
    assert [case["case"] for case in found] == ["images/p1/ct", "images/p2/ct", "other"]
    assert len({case["patient"] for case in found}) == 3


def test_a_dicom_folder_is_a_case(tmp_path: Path) -> None:
    write(tmp_path, "series.12/slice.dcm")
    entry = {"image": "images/series.12", "label": "labels/series.12"}
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [entry]}))
    assert read_datalist(tmp_path)[0]["case"] == "series.12"


def test_patient_and_weight_of_an_entry_count(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", patient=12, weight=2.5)
    (case,) = read_datalist(tmp_path, patient_pattern="(.)")
    assert (case["patient"], case["weight"]) == ("12", 2.5)


def test_patient_pattern(tmp_path: Path) -> None:
    write(tmp_path, "anna_1.nii.gz", "anna_2.nii.gz", "bert_1.nii.gz")
    found = read_datalist(tmp_path, patient_pattern=r"^([a-z]+)_\d$")
    assert [case["patient"] for case in found] == ["anna", "anna", "bert"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [("^([0-9]+)_", "finds no patient in the name 'anna_1'"), ("^[a-z]+", "one group"), ("([a-z", "one group")],
)
def test_patterns_that_fail(tmp_path: Path, pattern: str, words: str) -> None:
    """A patient that is not recognised would be split into training and validation."""
    write(tmp_path, "anna_1.nii.gz")
    with pytest.raises(InputError, match=words):
        read_datalist(tmp_path, patient_pattern=pattern)


def test_another_section(tmp_path: Path) -> None:
    entries = write(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "dataset.json").write_text(json.dumps({"training": entries[:1], "test": entries[1:]}))
    assert [case["case"] for case in read_datalist(tmp_path, "test")] == ["b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no dataset.json in it"),
        ('{"training": [', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        ("[]", "has no list 'training'.* Its lists: none"),
        ('{"validation": [{}]}', "has no list 'training'.* Its lists: validation"),
        ('{"training": []}', "has no list 'training', or an empty one"),
        ('{"training": ["images/a.nii.gz"]}', "'images/a.nii.gz' names no image"),
        ('{"training": [{"image": "images/a.nii.gz"}]}', "names no label"),
        ('{"training": [{"image": 5, "label": "images/a.nii.gz"}]}', "names no image"),
        ('{"training": [{"image": "images/x.nii.gz", "label": "a"}]}', "names images/x.nii.gz, but there is no such"),
        ('{"training": [{"image": "images/a.nii.gz", "label": "gone"}]}', "names gone, but there is no such file"),
    ],
)
def test_refused(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    write(tmp_path, "a.nii.gz")
    path = tmp_path / "dataset.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=words) as error:
        read_datalist(tmp_path)
    assert str(error.value).startswith(str(tmp_path))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no dataset\.json in it"):
        read_datalist(tmp_path / "nowhere")


def test_an_image_listed_twice(tmp_path: Path) -> None:
    write(tmp_path, "a.nii.gz", "b.nii.gz", "../images/a.nii.gz")
    with pytest.raises(InputError, match=r"lists .*a\.nii\.gz more than once"):
        read_datalist(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_on_both_sides(seed: int) -> None:
    data = cases(*"aabbbcdeefgh")
    train, val = split_by_patient(data, 0.4, seed)
    assert {case["patient"] for case in train}.isdisjoint(case["patient"] for case in val)
    assert len({case["patient"] for case in val}) == 3
    assert sorted(train + val, key=data.index) == data
    assert train == sorted(train, key=data.index) and val == sorted(val, key=data.index)


def test_the_seed_decides() -> None:
    data = cases(*"abcdefghijklmnopqrst")
    assert split_by_patient(data, 0.3, 1) == split_by_patient(data, 0.3, 1)
    assert split_by_patient(data, 0.3, 1) != split_by_patient(data, 0.3, 2)
    mixed = split_by_patient(data[::-1], 0.3, 1)[1]
    assert mixed[::-1] == split_by_patient(data, 0.3, 1)[1], "the order in the file must not decide"


def test_share_of_the_validation() -> None:
    data = cases(*"abcdefghij")
    assert [len(split_by_patient(data, share)[1]) for share in (0, 0.01, 0.2, 0.5)] == [0, 1, 2, 5]


def test_given_patients() -> None:
    data = cases("a", "1", "b", "b", "c")
    train, val = split_by_patient(data, 0.9, 0, ["b", 1])  # type: ignore[list-item]  # numbers, as fire reads them
    assert [case["patient"] for case in val] == ["1", "b", "b"] and len(train) == 2
    assert [case["patient"] for case in split_by_patient(data, val_patients="c")[1]] == ["c"]


def test_unknown_patients() -> None:
    with pytest.raises(InputError, match=r"val_patients \['x', 'y'\] are not in the data. Its patients: a, b"):
        split_by_patient(cases("a", "b"), val_patients=["y", "a", "x"])


@pytest.mark.parametrize("share", [-0.1, 1, 1.5])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(InputError, match="allowed is 0 to below 1"):
        split_by_patient(cases("a", "b"), share)


def test_nothing_left_to_train_on() -> None:
    with pytest.raises(InputError, match="All 2 patients went into validation"):
        split_by_patient(cases("a", "b"), val_patients=["a", "b"])
    with pytest.raises(InputError, match="All 1 patients went into validation"):
        split_by_patient(cases("a"), 0.2)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


class TestLiTS:
    def test_volumes_and_their_segmentations(self, tmp_path: Path) -> None:
        """By number, whatever the folders of the batches; what belongs to no pair of names is left alone."""
        touch(tmp_path, "Training Batch 1/volume-10.nii", "Training Batch 1/segmentation-10.nii")
        touch(tmp_path, "b/volume-2.nii.gz", "labels/segmentation-2.nii", "b/test-volume-3.nii", "notes.txt")
        found = read_datalist(tmp_path)
        assert [case["case"] for case in found] == ["volume-2", "volume-10"]
        assert found[0]["label"] == str(tmp_path / "labels" / "segmentation-2.nii")

    def test_dataset_json_comes_first(self, tmp_path: Path) -> None:
        write(tmp_path, "a.nii.gz")
        touch(tmp_path, "volume-1.nii", "segmentation-1.nii")
        assert [case["case"] for case in read_datalist(tmp_path)] == ["a"]

    @pytest.mark.parametrize(
        ("names", "section", "told"),
        [
            (["volume-1.nii"], "training", "no segmentation-1.nii for volume-1.nii"),
            (["volume-1.nii", "segmentation-1.nii"], "test", "has the section training alone, not 'test'"),
            (["a/volume-1.nii", "b/volume-1.nii", "segmentation-1.nii"], "training", "volume 1 is there twice"),
            (["segmentation-1.nii"], "training", "no dataset.json in it, nor volume-N.nii of LiTS"),
        ],
    )
    def test_refused(self, names: list[str], section: str, told: str, tmp_path: Path) -> None:
        touch(tmp_path, *names)
        with pytest.raises(InputError, match=told):
            read_datalist(tmp_path, section)
