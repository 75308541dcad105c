"""The transfer benchmark: its plan, its splits, and its whole life on small domains."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from med3d_nets import InputError, Med3DResNet, read_manifest
from tests.small_domains import write_domain, write_manifest
from tools import transfer, transfer_report
from tools.transfer_tasks import Budget, Malignancy, Segmentation, Task, task_of

BUDGET = Budget(epochs=2, batches=2, batch_size=2)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Boxes of ten patients, and "nodules" of ten with a diagnosis that alternates."""
    folder = tmp_path / "data"
    write_domain(folder / "boxes", 10, classes=2)
    write_domain(folder / "nodule_ct", 10)
    names = [f"LIDC-IDRI-{number:04d}_R_{number}" for number in range(10)]
    index = json.loads((folder / "nodule_ct" / "dataset.json").read_text())
    for entry, name in zip(index["training"], names, strict=True):
        for kind in ("image", "label"):
            path = folder / "nodule_ct" / entry[kind]
            path.rename(path.with_name(f"{name}.nii.gz"))
            entry[kind] = str(Path(entry[kind]).with_name(f"{name}.nii.gz"))
    (folder / "nodule_ct" / "dataset.json").write_text(json.dumps(index))
    rows = [f"LIDC-IDRI-{n:04d},{n},{'Malign' if n % 2 else 'Benign'}\n" for n in range(10)]
    (folder / "nodule_ct" / "metadata.csv").write_text("patient_id,nodule_id,Diagnosis\n" + "".join(rows))
    write_manifest(
        folder,
        {"name": "boxes", "hold_out": 0.2},
        {"name": "nodule_ct", "hold_out": ["LIDC-IDRI-0000", "LIDC-IDRI-0001"], "patient_pattern": "^(.*)_R_"},
    )
    return folder


def task(target: str, data: Path, out: Path, budget: Budget = BUDGET) -> Task:
    return task_of(target, read_manifest(data / "manifest.json"), out, budget)


def test_no_patient_is_on_two_sides(data: Path, tmp_path: Path) -> None:
    for target, kind in (("boxes", Segmentation), ("malignancy", Malignancy)):
        one = task(target, data, tmp_path)
        assert isinstance(one, kind)
        sides = [set(one.test), set(one.val), set(one.pool)]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == 10
        assert one.chosen(1.0, 0) == one.pool
        assert one.chosen(0.5, 1) == one.chosen(0.5, 1) and set(one.chosen(0.5, 1)) < set(one.pool)


def test_a_share_has_both_classes(data: Path, tmp_path: Path) -> None:
    one = task("malignancy", data, tmp_path)
    assert isinstance(one, Malignancy)
    diagnoses = one._diagnoses()
    for seed in range(8):
        chosen = one.chosen(0.01, seed)
        assert len(chosen) == 2
        assert {diagnoses[f"{patient}_R_{int(patient[-4:])}"] for patient in chosen} == {"Benign", "Malign"}


def test_the_table_of_labels_parts_the_patients(data: Path, tmp_path: Path) -> None:
    one = task("malignancy", data, tmp_path)
    one._options(tmp_path, one.chosen(0.3, 0))
    with open(tmp_path / "labels.csv") as file:
        rows = list(csv.DictReader(file))
    assert {row["patient"] for row in rows if row["split"] == "test"} == set(one.test)
    assert {row["patient"] for row in rows if row["split"] == "training"} == set(one.chosen(0.3, 0))
    assert sum(row["split"] == "none" for row in rows) == len(one.pool) - len(one.chosen(0.3, 0))


def test_validation_patients_of_the_manifest(data: Path, tmp_path: Path) -> None:
    write_manifest(data, {"name": "boxes", "hold_out": ["case0"], "val_patients": ["case3", "case1"]})
    one = task("boxes", data, tmp_path)
    assert one.val == ["case1", "case3"] and len(one.pool) == 7 and not set(one.val) & set(one.pool)


@pytest.mark.slow
def test_run_goes_on_where_it_stopped(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": Med3DResNet(10).state_dict()}, tmp_path / "encoder.pt")
    left_out: list[str] = []

    def pretrain(*_: Any, leave_out: str, **__: Any) -> str:
        left_out.append(leave_out)
        return str(tmp_path / "encoder.pt")

    monkeypatch.setattr(transfer, "pretrain", pretrain)
    monkeypatch.setattr(transfer, "RATES", (1e-3,))
    where: dict[str, Any] = {"data": str(data), "out": str(tmp_path / "out"), "manifest": str(data / "manifest.json")}
    options = {**where, "to": str(tmp_path / "a.csv"), "seeds": 1, "modes": "full,frozen", "epochs": 2, "batches": 2}
    transfer.run(**options, targets="boxes", fractions=0.5, batch_size=2)
    rows = transfer.read(tmp_path / "a.csv")
    assert [(row["arm"], row["mode"]) for row in rows] == [
        ("scratch", "full"),
        ("med3d_real8", "full"),
        ("med3d_real8", "frozen"),
    ]
    assert set(left_out) == {"boxes"}
    for row in rows:
        assert float(row["low"]) <= float(row["score"]) <= float(row["high"])
        assert row["metric"] == "dice" and row["budget"] == "2 epochs of 2 batches of 2" and row["commit"]
        assert row["train_cases"] == "4" and row["epochs_to_95"] in ("1", "2")
    runs = tmp_path / "out" / "runs" / "2_epochs_of_2_batches_of_2"
    weights = [
        torch.load(
            runs / f"boxes-med3d_real8_{tmp_path.name}-{mode}-0.5-0-rate_0.001" / "model_last.pt", weights_only=True
        )
        for mode in ("full", "frozen")
    ]
    start = torch.load(tmp_path / "encoder.pt", weights_only=True)["state_dict"]["layer4.0.conv1.weight"]
    assert not torch.equal(weights[0]["backbone.layer4.0.conv1.weight"], start)
    assert torch.equal(weights[1]["backbone.layer4.0.conv1.weight"], start)

    monkeypatch.setattr(Task, "train", lambda *_: pytest.fail("what is in the CSV is not run again"))
    transfer.run(**options, targets="boxes", fractions=0.5, batch_size=2)


@pytest.mark.slow
def test_malignancy(data: Path, tmp_path: Path) -> None:
    one = task("malignancy", data, tmp_path / "out", Budget(epochs=2, batches=2, batch_size=2, val_fraction=0.4))
    outcome = one.train_and_score("a", "", 0, 1.0, 0, 1e-3)
    assert outcome.metric == "auc" and 0 <= outcome.low <= outcome.score <= outcome.high <= 1
    assert outcome.train_cases == 5 and outcome.surface_dice == ""


def test_the_rate_is_searched_uphill(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[float, int]] = []

    def train(self: Task, name: str, encoder: str, frozen: int, fraction: float, seed: int, rate: float) -> float:
        tried.append((rate, seed))
        lucky = 0.2 if (rate, seed) == (1e-2, 1000) else 0
        return {1e-4: 0.1, 3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.8, 1e-2: 0.7}[rate] + lucky

    monkeypatch.setattr(Task, "train", train)
    one = transfer.Run("boxes", "scratch", "full", 0.1, 0)

    def rate(seeds: int, budget: Budget = BUDGET) -> float:
        settings = {one.setting: (one, task("boxes", data, tmp_path, budget), "")}
        return transfer._tuned_rates(settings, tmp_path, seeds, jobs=2)[one.setting]

    for _ in range(2):  # the second time from tuning.csv
        assert rate(seeds=3) == 3e-3
        assert sorted({rate for rate, _ in tried}) == [3e-4, 1e-3, 3e-3, 1e-2]
        assert len(tried) == len(set(tried)) == 12
    assert rate(seeds=1) == 1e-2
    rate(seeds=3, budget=Budget(epochs=3))
    assert len(tried) == 24  # a rate that was found with another budget is not taken


def test_budgets_are_not_mixed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Task, "train", lambda *_: pytest.fail("nothing is trained"))
    rows = tmp_path / "rows.csv"
    rows.write_text("target,arm,mode,fraction,seed,budget\nboxes,scratch,full,1,7,20 epochs of 25 batches of 4\n")
    where: dict[str, Any] = {"data": str(data), "out": str(tmp_path), "manifest": str(data / "manifest.json")}
    with pytest.raises(InputError, match="20 epochs of 25 batches of 4, now 20 epochs of 25 batches of 2 is asked for"):
        transfer.run(**where, to=str(rows), targets="boxes", batch_size=2)


def test_a_rate_that_is_given_is_not_searched(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def train_and_score(*arguments: Any) -> Any:
        rates.append(arguments[-1])
        raise InputError("enough")

    monkeypatch.setattr(Task, "train", lambda *_: pytest.fail("no rate is searched"))
    monkeypatch.setattr(Task, "train_and_score", train_and_score)
    where: dict[str, Any] = {"data": str(data), "out": str(tmp_path), "manifest": str(data / "manifest.json")}
    with pytest.raises(InputError, match="enough"):
        transfer.run(**where, to=str(tmp_path / "a.csv"), targets="boxes", arms="scratch", rate=2e-3)
    assert set(rates) == {2e-3}


def test_budgets_tell_what_is_not_usual() -> None:
    assert str(Budget(4, 3, 2)) == "4 epochs of 3 batches of 2"
    assert str(Budget(4, 3, 2, val_fraction=0.05)) == "4 epochs of 3 batches of 2, val_fraction 0.05"


def test_encoders_are_not_mixed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "pretrain", lambda *_, **__: pytest.fail("nothing is trained"))
    head = "target,arm,mode,fraction,seed,budget,pretraining\n"
    row = 'boxes,med3d_real8,full,1,7,20 epochs of 25 batches of 4,"9 batches of patches of 48 voxels, without_boxes"\n'
    (tmp_path / "rows.csv").write_text(head + row)
    where: dict[str, Any] = {"data": str(data), "out": str(tmp_path), "manifest": str(data / "manifest.json")}
    with pytest.raises(
        InputError, match="of boxes from an encoder of 9 batches .* now one of 8 batches of patches of 48"
    ):
        transfer.run(
            **where,
            to=str(tmp_path / "rows.csv"),
            targets="boxes",
            pretrain_epochs=2,
            pretrain_batches=4,
            pretrain_patch=48,
        )


def test_encoders_of_one_file_name_have_folders_of_their_own() -> None:
    names = {transfer.Run("boxes", arm, "full", 0.1, 0).name(arm, 1e-3) for arm in ("a/model.pt", "b/model.pt")}
    names |= {
        transfer.Run("boxes", "med3d_real8", "full", 0.1, 0).name(f"out/{run}/model_last.pt", 1e-3) for run in "cd"
    }
    assert len(names) == 4 and not any("/" in name for name in names)


def write_rows(path: Path) -> str:
    columns = ["target", "arm", "mode", "fraction", "seed", "metric", "score", "epochs_to_95", "surface_dice"]
    scores = {"scratch": (0.50, 0.52, 0.54), "med3d_real8": (0.60, 0.63, 0.66)}
    rows = [
        ["boxes", arm, "full", "0.1", seed, "dice", score, 10 if arm == "scratch" else 4, score + 0.1]
        for arm, values in scores.items()
        for seed, score in enumerate(values)
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return str(path)


def test_table(tmp_path: Path) -> None:
    lines = transfer_report.table(write_rows(tmp_path / "a.csv")).splitlines()
    assert lines[2] == "| boxes | 10% | scratch | 3 | dice 0.520 |  | 0.620 |  | 10.0 |"
    # gains 0.10, 0.11, 0.12: mean 0.11, half the interval 4.303 * 0.01 / sqrt(3)
    gain = "+0.110 (+0.085 to +0.135)"
    assert lines[3] == f"| boxes | 10% | med3d_real8, full | 3 | dice 0.630 | {gain} | 0.730 | {gain} | 4.0 |"


def test_summary(tmp_path: Path) -> None:
    lines = transfer_report.summary(write_rows(tmp_path / "a.csv")).splitlines()
    assert lines[0] == "| target | from | 10% | gain at 10% (95 % interval) | epochs to 95 % |"
    assert lines[2] == "| boxes (dice) | scratch | 0.520 |  | 10.0 |"
    assert lines[3] == "| boxes (dice) | med3d_real8 | 0.630 | +0.110 (+0.085 to +0.135) | 4.0 |"
    assert lines[5] == "| boxes (surface dice) | med3d_real8 | 0.730 | +0.110 (+0.085 to +0.135) | 4.0 |"
    other = transfer_report.summary(str(tmp_path / "a.csv"), at=0.5).splitlines()  # a share that was not run
    assert other[2] == "| boxes (dice) | scratch | 0.520 |  | – |"


def test_plot(tmp_path: Path) -> None:
    transfer_report.plot(write_rows(tmp_path / "a.csv"), str(tmp_path / "figures"))
    assert (tmp_path / "figures" / "transfer_boxes.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(data: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"data": str(data), "out": str(tmp_path), "manifest": str(data / "manifest.json")}
    with pytest.raises(InputError, match=r"target 'liver': in no manifest. Targets: malignancy, boxes, nodule_ct"):
        transfer.run(**where, targets="liver", to=str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="target 'boxes': both manifests have a domain of this name"):
        transfer.run(**where, target_manifest=where["manifest"], targets="boxes", to=str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match=r"modes \['half'\]: allowed are frozen, partial, full"):
        transfer.run(**where, modes="half", to=str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="allowed is above 0 to 1"):
        transfer.run(**where, fractions=10, to=str(tmp_path / "a.csv"))
    with pytest.raises(InputError, match="no results yet"):
        transfer_report.table(str(tmp_path / "a.csv"))
