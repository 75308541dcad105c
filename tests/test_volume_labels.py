"""Several labels per volume: tables, splits, losses and scores; intensities by modality; records of older trainings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from med3d_nets import InputError, IntensityByModalityd, class_loss, read_record
from med3d_nets.class_scores import prediction, summarise_labels
from med3d_nets.label_table import class_weights, known_classes, read_labels, sample_weights, split_cases
from tests.feature_runs import write_labels, write_nifti


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for name in "abcd":
        write_nifti(tmp_path / "scans" / f"{name}.nii.gz", np.zeros((2, 2, 2), np.float32))
    return tmp_path / "scans"


def table(folder: Path, *labels: str) -> Path:
    return write_labels(folder / "t.csv", list(zip("abcd", labels, strict=True)))


def test_a_cell_names_several_classes_or_none(scans: Path, tmp_path: Path) -> None:
    cases = read_labels(table(tmp_path, "y|x", "none", " x ", "z | y"), scans, multi_label=True)
    assert known_classes(cases) == ["x", "y", "z"]
    assert [case["label"].tolist() for case in cases] == [[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1]]
    assert [case["class"] for case in cases] == ["x|y", "none", "x", "y|z"]
    assert cases[0]["label"].dtype == np.float32
    cases = read_labels(table(tmp_path, "y|x", "none", "x", "y"), scans, ["y", "x"], multi_label=True)
    assert [case["label"].tolist() for case in cases] == [[1, 1], [0, 0], [0, 1], [1, 0]]
    assert cases[0]["class"] == "y|x"


def test_with_one_label_the_separator_is_a_letter_like_others(scans: Path, tmp_path: Path) -> None:
    cases = read_labels(table(tmp_path, "y|x", "none", "x", "y|x"), scans)
    assert known_classes(cases) == ["none", "x", "y|x"] and [case["label"] for case in cases] == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (
            ("x|y", "x", "q", "y"),
            ["x", "y"],
            r"case c: unknown label 'q'. The classes: x, y; several are parted by '|'",
        ),
        (("x|x", "x", "y", "y"), [], r"case a: the label 'x\|x' names a class twice"),
        (("x|", "x", "y", "y"), [], r"The class '' cannot be one of several labels"),
        (("x|none", "x", "y", "y"), [], "The class 'none' cannot be one of several"),
        (("x", "x", "y", "y"), ["a|b", "x", "y"], r"The class 'a\|b' cannot be one of several"),
    ],
)
def test_refusals(labels: tuple[str, ...], classes: list[str], words: str, scans: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        read_labels(table(tmp_path, *labels), scans, classes, multi_label=True)


def make(sets: str) -> list[dict]:
    """A case of a patient of its own per word: ``ab`` has both classes, ``-`` none."""
    rows = []
    for index, word in enumerate(sets.split()):
        names = [name for name in "ab" if name in word]
        label = np.array([name in names for name in "ab"], np.float32)
        one = {"case": str(index), "patient": f"p{index}", "label": label, "class": "|".join(names) or "none"}
        rows.append({**one, "split": ""})
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_split_keeps_the_shares_of_the_sets(seed: int) -> None:
    train, val = split_cases(make("a a a a a b b b b b ab ab ab ab ab - - - - -"), 2, 0.2, seed)
    assert sorted(case["class"] for case in val) == ["a", "a|b", "b", "none"] and len(train) == 16


def test_sets_of_one_patient_are_drawn_from_together() -> None:
    train, val = split_cases(make("a b - ab"), 2, 0.5, val_patients=["p0", "p1"])
    assert len(val) == 2 and len(train) == 2
    assert sum(len(split_cases(make("a a a a b b b b ab -"), 2, 0.25, seed)[1]) for seed in range(3)) == 9


@pytest.mark.parametrize(
    ("sets", "patients", "words"),
    [
        ("a a b b", ["p0"], "No case of class b is for validation"),
        ("ab a ab a", ["p0", "p1"], "Every case for training is of class a"),
        ("a b ab a", ["p2", "p3"], "Every case for validation is of class a"),
    ],
)
def test_a_class_needs_cases_with_and_without_it(sets: str, patients: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        split_cases(make(sets), 2, val_patients=patients)


def test_balance_by_hand() -> None:
    """Class a is had by three of four, b by one."""
    cases = make("a a ab -")
    a, b = {1: 1 / 3, 0: 1.0}, {1: 1.0, 0: 1 / 3}
    assert sample_weights(cases) == pytest.approx([(a[1] + b[0]) / 2] * 2 + [(a[1] + b[1]) / 2, (a[0] + b[0]) / 2])
    assert class_weights(cases, 2, "loss") == pytest.approx([1 / 3, 3]) and class_weights(cases, 2) == [1, 1]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    p = logits.sigmoid()
    terms = -(truth * p.log() * torch.tensor([1.0, 3.0]) + (1 - truth) * (1 - p).log())
    torch.testing.assert_close(class_loss([1.0, 3.0], True)(logits, truth), terms.mean())
    index = torch.tensor([0, 1])
    by_hand = -(logits.log_softmax(1)[[0, 1], index] * torch.tensor([1.0, 3.0])).sum() / 4
    torch.testing.assert_close(class_loss([1.0, 3.0])(logits, index), by_hand)


def test_scores_by_hand() -> None:
    p = [[0.9, 0.2], [0.6, 0.7], [0.4, 0.8], [0.1, 0.6]]
    truth = [[1, 0], [0, 1], [1, 0], [0, 1]]
    cases = [{"probabilities": a, "truth": t, "patient": i} for i, (a, t) in enumerate(zip(p, truth, strict=True))]
    found = summarise_labels(cases, ["x", "y"], samples=200)
    # x: 0.9 and 0.4 against 0.6 and 0.1: 3 of 4 pairs in order; y: 0.7 and 0.6 against 0.2 and 0.8: 2 of 4
    assert found["per_class"]["x"]["auc"]["value"] == 0.75 and found["per_class"]["y"]["auc"]["value"] == 0.5
    assert found["auc"]["value"] == 0.625
    assert found["accuracy"]["value"] == 5 / 8  # x: right, wrong, wrong, right; y: right, right, wrong, right
    assert found["exact"]["value"] == 0.5
    x = found["per_class"]["x"]
    assert x["cases"] == 2 and x["accuracy"]["value"] == 0.5 and x["sensitivity_at_90_specificity"]["value"] == 0.5
    assert x["confusion"] == {"not x": {"not x": 1, "x": 1}, "x": {"not x": 1, "x": 1}}
    for score in (found["auc"], x["auc"], x["calibration_error"]):
        assert score["ci95"][0] <= score["value"] <= score["ci95"][1]
    assert found["patients"] == 4 and json.dumps(found)


def test_scores_of_a_class_that_no_case_has() -> None:
    cases = [{"probabilities": [0.9, 0.2], "truth": [i, 0], "patient": i} for i in (0, 1)]
    found = summarise_labels(cases, ["x", "y"], samples=20)
    assert found["auc"] == {"value": None, "ci95": None} and found["per_class"]["y"]["auc"]["value"] is None


def test_prediction_names_what_is_at_least_as_probable_as_not() -> None:
    assert prediction([0.5, 0.49, 0.9], ["x", "y", "z"], True) == "x|z"
    assert prediction([0.1, 0.2], ["x", "y"], True) == "none" and prediction([0.1, 0.2], ["x", "y"]) == "y"


def test_ct_by_its_window_and_mri_by_its_own_values() -> None:
    values = MetaTensor(torch.tensor([-2000.0, -200.0, 0.0, 50.0, 300.0, 900.0]).reshape(1, 1, 2, 3))
    ct = IntensityByModalityd("image", "ct", [-200, 300])({"image": values})["image"]
    torch.testing.assert_close(ct.flatten().as_tensor(), torch.tensor([-1.0, -1.0, -0.2, 0.0, 1.0, 1.0]))
    mr = IntensityByModalityd("image", "mr", clip_percentiles=[20, 80])({"image": values})["image"].flatten()
    clipped = np.clip(values.flatten().numpy(), *np.percentile(values.numpy(), [20, 80]))
    np.testing.assert_allclose(mr.numpy(), (clipped - clipped.mean()) / clipped.std(), rtol=1e-4)
    assert isinstance(ct, MetaTensor) and isinstance(mr, MetaTensor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pet",), "modality='pet': allowed are ct and mr"),
        (("ct", [300, -200]), r"hu_window=\[300, -200\]: needed are two rising numbers"),
        (("ct", "wide"), "hu_window='wide'"),
        (("mr", [0, 1], [0, 101]), r"clip_percentiles=\[0, 101\]"),
    ],
)
def test_modality_refusals(arguments: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        IntensityByModalityd("image", *arguments)


def test_a_record_without_modality_is_of_mri_and_one_label(tmp_path: Path) -> None:
    (tmp_path / "classifier.json").write_text('{"classes": ["x", "y"], "spacing": [1, 1, 1], "input_size": [8, 8, 8]}')
    record = read_record(tmp_path / "model.pt")
    assert record["modality"] == "mr" and record["multi_label"] is False and record["classes"] == ["x", "y"]
    assert read_record(tmp_path / "none" / "model.pt", untrained=True)["classes"] == ["0", "1"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").touch()
    with pytest.raises(InputError, match=r"classifier.json: no record of a trained classifier"):
        read_record(tmp_path / "other" / "model.pt", untrained=True)
