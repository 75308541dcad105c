"""Labels of nodules by both rules, folds by patient, and what of a table is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from med3d_nets import positive_weights, read_nodules, split_nodules, unseen
from med3d_nets.errors import InputError
from tests.nodule_runs import COLUMNS, write_nodules


def test_both_rules(tmp_path: Path) -> None:
    """Med3D's rule is the rating's: 4 and 5 are malignant; the other is the table's own diagnosis."""
    rows = [
        ("p1", 1, "Malign", 3, 8.5),
        ("p1", 2, "Benign", 3, 4),
        ("p2", 1, "Malign", 4, 20),
        ("p3", 1, "Malign", 1, ""),
    ]
    cases = read_nodules(write_nodules(tmp_path, rows))
    assert [case["label"] for case in cases] == [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    assert [case["case"] for case in cases] == ["p1_R_1", "p1_R_2", "p2_R_1", "p3_R_1"]
    assert [case["diameter"] for case in cases] == [8.5, 4.0, 20.0, None]
    assert [case["label"] for case in read_nodules(tmp_path, targets=["rating_4_5"])] == [[0.0], [0.0], [1.0], [0.0]]


def test_whole_scans_take_the_points_of_the_table(tmp_path: Path) -> None:
    columns = (*COLUMNS, "seriesuid", "coordX", "coordY", "coordZ")
    write_nodules(tmp_path, [("p1", 1, "Malign", 5, 8, "p1_R_1", 10, 20, 30)], columns)
    case = read_nodules(tmp_path / "imagesTr", tmp_path / "metadata.csv", scans=True)[0]
    assert (case["case"], case["point"], case["patient"]) == ("p1_R_1", (-10.0, -20.0, 30.0), "p1")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no row below its header"),
        ([("p1", 1, "malign", 5, 8)], "line 2: Diagnosis is 'malign'; allowed are Benign and Malign"),
        ([("p1", 1, "Malign", 6, 8)], "line 2: Malignancy_value is '6'; allowed are 1 to 5"),
        ([("p1", 1, "Malign", 5, "big")], "line 2: diameter_mm is 'big'"),
        ([("p1", 1, "Malign", 5, 8), ("p1", 1, "Benign", 1, 8)], "p1_R_1: more than one row"),
    ],
)
def test_bad_rows(tmp_path: Path, rows: list[tuple], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_nodules(write_nodules(tmp_path, rows))


def test_wrong_columns(tmp_path: Path) -> None:
    write_nodules(tmp_path, [("p1", 1, "Malign", 5, 8)])
    (tmp_path / "metadata.csv").write_text("patient_id,nodule_id,label\np1,1,1\n")
    with pytest.raises(InputError, match="no column Diagnosis and no column Malignancy_value"):
        read_nodules(tmp_path)


def test_crops_and_rows_belong_together(tmp_path: Path) -> None:
    write_nodules(tmp_path, [("p1", 1, "Malign", 5, 8), ("p2", 1, "Malign", 5, 8)])
    (tmp_path / "imagesTr" / "p2_R_1.nii.gz").rename(tmp_path / "imagesTr" / "p9_R_1.nii.gz")
    with pytest.raises(InputError, match="line 3: there is no crop 'p2_R_1'"):
        read_nodules(tmp_path)
    (tmp_path / "metadata.csv").write_text(",".join(COLUMNS) + "\np1,1,Malign,5,8\n")
    with pytest.raises(InputError, match=r"no row for p9_R_1 \(1 crops"):
        read_nodules(tmp_path)


@pytest.mark.parametrize("targets", [["malignant"], [], "malign"])
def test_unknown_targets(tmp_path: Path, targets: object) -> None:
    with pytest.raises(InputError, match="needed is a list of one or more of malign, rating_4_5"):
        read_nodules(tmp_path, targets=targets)


def cases_of(patients: int, each: int = 2) -> list[dict]:
    return [
        {"patient": f"p{p}", "case": f"p{p}_R_{n}", "label": [p % 2, 0]} for p in range(patients) for n in range(each)
    ]


def test_folds_part_patients_and_hold_the_same_ones_out() -> None:
    cases = cases_of(20)
    parts = [split_nodules(cases, fold) for fold in range(5)]
    tests = [{case["patient"] for case in test} for _, _, test in parts]
    vals = [{case["patient"] for case in val} for _, val, _ in parts]
    assert all(len(test) == 4 and test == tests[0] for test in tests)
    assert sorted(patient for val in vals for patient in val) == sorted({c["patient"] for c in cases} - tests[0])
    for train, val, test in parts:
        groups = [{case["patient"] for case in part} for part in (train, val, test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
        assert len(train) + len(val) + len(test) == len(cases)


@pytest.mark.parametrize(("fold", "folds", "count"), [(5, 5, 20), (0, 1, 20), (0, 5, 4)])
def test_impossible_folds(fold: int, folds: int, count: int) -> None:
    with pytest.raises(InputError, match="folds"):
        split_nodules(cases_of(count), fold, folds)


def test_patients_that_were_seen_are_left_out() -> None:
    cases = cases_of(3, 1)
    assert [case["patient"] for case in unseen(cases, {"patients": ["p0", "p2"]})] == ["p1"]
    assert unseen(cases, {}) == cases
    with pytest.raises(InputError, match="All 3 nodules are of patients"):
        unseen(cases, {"patients": ["p0", "p1", "p2"]})


def test_weights_of_the_malignant() -> None:
    cases = [{"label": [1.0, 0.0]}, {"label": [0.0, 1.0]}, {"label": [0.0, 0.0]}, {"label": [0.0, 1.0]}]
    assert positive_weights(cases) == [3.0, 1.0]
    with pytest.raises(InputError, match=r"malignant are \[1.0, 0.0\]"):
        positive_weights([{"label": [1.0, 0.0]}, {"label": [0.0, 0.0]}])
