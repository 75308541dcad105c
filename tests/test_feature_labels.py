"""Tables of labels: which volume has which class, what is refused, and splits by patient and class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from med3d_nets.errors import InputError
from med3d_nets.label_table import (
    Case,
    cases_to_classify,
    class_weights,
    known_classes,
    read_labels,
    sample_weights,
    split_cases,
)
from tests.feature_runs import write_labels, write_nifti


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Four volumes, one of them in a folder of its own."""
    for name in ("a", "b", "c"):
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.zeros((2, 2, 2), np.float32))
    write_nifti(tmp_path / "scans" / "deep" / "d.nii", np.zeros((2, 2, 2), np.float32))
    return tmp_path / "scans"


def test_names_and_paths(scans: Path, tmp_path: Path) -> None:
    rows = [("b", "10"), ("a.nii.gz", "9"), ("deep/d.nii", "10"), ("c", "-1")]
    cases = read_labels(write_labels(tmp_path / "t.csv", rows), scans)
    assert [Path(case["image"]).name for case in cases] == ["b.nii.gz", "a.nii.gz", "d.nii", "c.nii.gz"]
    assert known_classes(cases) == ["-1", "9", "10"]  # as numbers
    assert [case["label"] for case in cases] == [2, 1, 2, 0]
    assert [case["patient"] for case in cases] == ["b", "a.nii.gz", "deep/d.nii", "c"]


def test_paths_alone_need_no_row_for_other_volumes(scans: Path, tmp_path: Path) -> None:
    cases = read_labels(write_labels(tmp_path / "t.csv", [("a.nii.gz", "x"), ("deep/d.nii", "y")]), scans)
    assert [case["class"] for case in cases] == ["x", "y"]


def test_columns_patient_and_split_and_others(scans: Path, tmp_path: Path) -> None:
    columns = ("age", "split", "case", "patient", "label")
    rows = [(1, "training", "a", "p1", "x"), (2, "test", "b", "p2", "y"), (3, "none", "c", "", "unsure")]
    cases = read_labels(write_labels(tmp_path / "t.csv", rows, columns), scans)
    assert [(case["case"], case["patient"], case["split"]) for case in cases] == [
        ("a", "p1", "training"),
        ("b", "p2", "test"),
    ]
    assert known_classes(cases) == ["x", "y"]


def test_given_classes_and_pattern(scans: Path, tmp_path: Path) -> None:
    rows = [("a", "x"), ("b", "y"), ("c", "x")]
    cases = read_labels(write_labels(tmp_path / "t.csv", rows), scans, ["y", "x", "z"], r"^(.)")
    assert [case["label"] for case in cases] == [1, 0, 1]


TABLES: dict[str, tuple[str, str]] = {
    "no label column": ("case,class\na,x\n", "has no column label. Its columns: case, class"),
    "no column at all": ("", "has no column case and no column label. Its columns: none"),
    "semicolons": ("case;label\na;x\n", "has no column case and no column label.*separated by commas"),
    "column twice": ("case,label,label\na,x,y\n", "a column comes twice"),
    "header alone": ("case,label\n", "has no row below its header"),
    "no label": ("case,label\na,x\nb,\nc,y\n", "line 3: no label in this row"),
    "short row": ("case,label\na,x\nb\nc,y\n", "line 3: no label in this row"),
    "no case": ("case,label\n,x\n", "line 2: no case in this row"),
    "unknown case": ("case,label\na,x\nb,y\nc,x\nd,y\n", "line 5: there is no case 'd' in .*Its cases: a, b, c"),
    "unknown file": ("case,label\na.nii.gz,x\nz.nii,y\n", "line 3: there is no case 'z.nii'"),
    "volume without row": ("case,label\na,x\nc,y\n", r"no label for b \(1 of 3 volumes"),
    "case twice": ("case,label\na,x\na,y\n", "a: more than one row"),
    "volume twice": ("case,label\na,x\na.nii.gz,y\nb,x\nc,x\n", "names .*a.nii.gz more than once"),
    "unknown split": ("case,label,split\na,x,train\nb,y,test\nc,x,\n", "case a: unknown split 'train'. Allowed: tr"),
    "no UTF-8": ("case,label\na,\udcff\n", "is no CSV table in UTF-8"),
}


@pytest.mark.parametrize("name", TABLES)
def test_refusals(name: str, scans: Path, tmp_path: Path) -> None:
    text, words = TABLES[name]
    (tmp_path / "t.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"t.csv.*{words}"):
        read_labels(tmp_path / "t.csv", scans)


def test_more_refusals(scans: Path, tmp_path: Path) -> None:
    table = write_labels(tmp_path / "t.csv", [("a", "x"), ("b", "y"), ("c", "x")])
    with pytest.raises(InputError, match=r"case b: unknown label 'y'. The classes: x, z"):
        read_labels(table, scans, ["x", "z"])
    with pytest.raises(InputError, match=r"patient_pattern='\(\\\\d\)' finds no patient in 'a'"):
        read_labels(table, scans, patient_pattern=r"(\d)")
    with pytest.raises(InputError, match="is not a pattern with one group"):
        read_labels(table, scans, patient_pattern="a")
    with pytest.raises(InputError, match="absent.csv: no such file"):
        read_labels(tmp_path / "absent.csv", scans)


def make(patients: str, labels: str, splits: str = "") -> list[Case]:
    """One case per letter; split by its first letter, ``-`` is an empty cell."""
    words = {"t": "training", "v": "validation", "x": "test", "-": ""}
    return [
        {"case": str(i), "patient": p, "label": int(label), "class": f"class{label}", "split": words[s]}
        for i, (p, label, s) in enumerate(zip(patients, labels, splits or "-" * len(labels), strict=True))
    ]


def patients_of(cases: list[Case]) -> set[str]:
    return {case["patient"] for case in cases}


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_has_each_class_on_both_sides_and_no_patient(seed: int) -> None:
    cases = make("aabbccddeeffgghhiijjkkll", "000000000000000000001111")
    train, val = split_cases(cases, 2, 0.2, seed)
    assert len(train) + len(val) == 24 and not patients_of(train) & patients_of(val)
    assert {case["label"] for case in train} == {case["label"] for case in val} == {0, 1}
    assert len(patients_of(val)) == 3  # 2 of 10 and 1 of 2
    assert split_cases(cases, 2, 0.2, seed) == (train, val)


def test_given_splits() -> None:
    train, val = split_cases(make("abcdef", "010101", "tt-vvx"), 2)
    assert patients_of(train) == {"a", "b", "c"} and patients_of(val) == {"d", "e"}
    train, val = split_cases(make("abcd", "0101"), 2, val_patients=["a", "b"])
    assert patients_of(val) == {"a", "b"}
    assert split_cases(make("abcd", "0101"), 2, val_fraction=0)[1] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((make("ab", "00"), 1), "The labels have 1 class; at least two"),
        ((make("aabbcd", "010101", "tvtvtv"), 2), "Patients in more than one split: a, b (2 in all)"),
        ((make("aabbc", "00111", "tx-tv"), 2), "Patients in more than one split: a"),
        ((make("abcd", "0011", "tttv"), 2), "No case of class class0 is for validation"),
        ((make("abcd", "0011", "ttvv"), 2), "No case of class class1 is for training"),
        ((make("aaabcd", "000001"), 2), "No case of class class1 is for validation"),
        ((make("ab", "01", "xx"), 2), "No case is for training"),
        ((make("ab", "01"), 2, 0.2, 0, ["z"]), "val_patients ['z'] are not in the data"),
    ],
)
def test_splits_that_are_refused(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError) as caught:
        split_cases(*arguments)
    assert words in str(caught.value)


def test_cases_of_an_evaluation(scans: Path, tmp_path: Path) -> None:
    assert [case["case"] for case in cases_to_classify(scans)] == ["a", "b", "c"]
    rows = [("a", "x", "test"), ("b", "y", "training"), ("c", "x", "")]
    table = write_labels(tmp_path / "t.csv", rows, ("case", "label", "split"))
    assert [case["case"] for case in cases_to_classify(scans, table, ["x", "y"])] == ["a"]
    with pytest.raises(InputError, match="no case of the split 'validation'. There are: none given, test, training"):
        cases_to_classify(scans, table, ["x", "y"], "validation")
    table = write_labels(tmp_path / "t.csv", [row[:2] for row in rows])
    assert len(cases_to_classify(scans, table, ["x", "y"])) == 3


def test_balance() -> None:
    cases = make("abcd", "0001")
    assert sample_weights(cases) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1])
    assert sample_weights(cases, "loss") == class_weights(cases, 4, "none") == [1] * 4
    weights = class_weights(cases, 2, "loss")
    assert weights == pytest.approx([2 / 3, 2]) and 3 * weights[0] + weights[1] == pytest.approx(4)
    with pytest.raises(InputError, match="allowed are sampling, loss and none"):
        sample_weights(cases, "yes")
