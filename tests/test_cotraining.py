"""The co-training bundle: its whole life on small domains, resume, several processes, inference by domain."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from med3d_nets import DomainSampler, InputError, caching, load_backbone, read_manifest, sampling_weights, split_domains
from med3d_nets.domain_data import SeededDataset
from med3d_nets.resnet import Med3DResNet
from tests.small_domains import BUNDLE, METADATA, ROOT, config, make_case, small, write_manifest
from tests.torchrun import torchrun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("domains")
    write_manifest(folder)
    return folder


def run(names: str | list[str], **options: Any) -> ConfigWorkflow:
    """Run configs of the bundle in this process."""
    files = [config(name) for name in ([names] if isinstance(names, str) else names)]
    workflow = ConfigWorkflow(config_file=files, meta_file=METADATA, **options)
    workflow.initialize()
    workflow.run()
    return workflow


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    run("train", **small(dataset_dir=str(data), output_dir=str(out), max_epochs=4, freeze_norm_after=2))
    return out


def test_training_writes_all_that_inference_needs(trained: Path) -> None:
    records = json.loads((trained / "domains.json").read_text())
    assert records["boxes"] == {
        "modality": "MRI",
        "classes": ["near", "far"],
        "spacing": [1.2, 1.2, 1.2],
        "values": [[1], [2]],
        "background": [],
        "ignore": [],
        "clip_percentiles": [0.5, 99.5],
        "split": records["boxes"]["split"],
    }
    assert len(records["boxes"]["split"]) == 16
    assert (trained / "model.pt").is_file() and (trained / "checkpoints" / "checkpoint_epoch=4.pt").is_file()


def test_curves_of_every_domain(trained: Path) -> None:
    events = EventAccumulator(str(trained))
    events.Reload()
    assert {"train_loss", "val_mean_dice", "dice_balls", "dice_boxes"} <= set(events.Tags()["scalars"])
    [last] = [scalar.value for scalar in events.Scalars("val_mean_dice")][-1:]
    parts = [events.Scalars(f"dice_{name}")[-1].value for name in ("balls", "boxes")]
    assert last == pytest.approx(sum(parts) / 2, abs=1e-6)


def test_norms_are_kept_from_the_epoch_asked_for(trained: Path) -> None:
    states = [torch.load(trained / "checkpoints" / f"checkpoint_epoch={n}.pt", weights_only=True) for n in (3, 4)]
    norms = [{k: v for k, v in s["network"].items() if "running" in k or "tracked" in k} for s in states]
    assert norms[0] and all(torch.equal(norms[0][key], norms[1][key]) for key in norms[0])
    assert not torch.equal(states[0]["network"]["backbone.conv1.weight"], states[1]["network"]["backbone.conv1.weight"])


def test_the_encoder_starts_other_networks(trained: Path) -> None:
    encoder = Med3DResNet(10)
    account = load_backbone(encoder, trained / "model.pt")
    assert len(account.loaded) == 72 and not account.missing
    state = torch.load(trained / "model.pt", weights_only=True)
    assert torch.equal(encoder.layer4[0].conv2.weight, state["backbone.layer4.0.conv2.weight"])


def test_resuming_equals_not_stopping(data: Path, tmp_path: Path) -> None:
    options = small(dataset_dir=str(data), fingerprint_dir=str(tmp_path / "f"), max_epochs=3, freeze_norm_after=2)
    run("train", **options, output_dir=str(tmp_path / "whole"))
    half = {**options, "output_dir": str(tmp_path / "part")}
    part = ConfigWorkflow(config_file=config("train"), meta_file=METADATA, **half)
    part.initialize()
    trainer = part.parser.get_parsed_content("train#trainer")  # of three epochs, ended after the first
    trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), lambda engine: engine.terminate())
    part.run()
    run("train", **half, resume=True)
    states = [torch.load(tmp_path / name / "model_last.pt", weights_only=True) for name in ("whole", "part")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(
    "change",
    [{"leave_out": "balls"}, {"clip_percentiles": [1.0, 99.0]}, {"val_fraction": 0.5}],  # the last: other patients
)
def test_resuming_with_another_start_is_refused(data: Path, trained: Path, change: dict[str, Any]) -> None:
    options = small(dataset_dir=str(data), output_dir=str(trained), max_epochs=6, resume=True)
    with pytest.raises(Exception) as told:
        run("train", **{**options, **change})
    assert "other domains, classes, spacings, clip_percentiles or patients" in repr(told.getrepr(chain=True))


def test_faults_end_a_training_before_it_starts(data: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"domains": [{"name": "balls"}, {"name": "balls"}]}')
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config("train"), "--meta_file", METADATA]
    command += ["--dataset_dir", str(data), "--manifest", str(tmp_path / "manifest.json")]
    done = subprocess.run([*command, "--output_dir", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "the name 'balls' is given 2 times" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_train_as_one_that_accumulates(data: Path, tmp_path: Path) -> None:
    options = {**small(dataset_dir=str(data), norm_batches=0, freeze_norm_after=0, val_fraction=0.0), "dropout": 0.0}
    # in double precision: that of float32 is rounded to 1 % of so short a way, more on some processors
    options |= {"initialised": "$med3d_nets.initialise(@network_def, @backbone_file, @initial_weights).double()"}
    options |= {"train#random_transforms#7#dtype": ["$torch.float64", "$torch.uint8"]}
    configs = ["train", "multi_gpu_train"]
    done = torchrun(tmp_path / "start", BUNDLE, configs, **{**options, "output_dir": str(tmp_path / "two")})
    assert done.returncode == 0, done.stdout
    alone = ConfigWorkflow(
        config_file=config("train"),
        meta_file=METADATA,
        **options,
        output_dir=str(tmp_path / "one"),
        accumulation_steps=2,
    )
    alone.initialize()
    start = copy.deepcopy(alone.parser.get_parsed_content("initialised").state_dict())
    alone.run()
    two, one = (torch.load(tmp_path / name / "model_last.pt", weights_only=True) for name in ("two", "one"))
    # each process has norms of its own batches
    learnt = [key for key in start if "running" not in key and "tracked" not in key]
    moved = {key: float((one[key] - start[key]).norm()) for key in learnt}
    assert min(moved.values()) > 0
    apart = {key: float((two[key] - one[key]).norm()) / moved[key] for key in learnt}
    assert max(apart.values()) <= 1e-9, apart


def settings_of(data: Path, **options: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(config("train"))
    parser.read_meta(METADATA)
    parser.update({**small(dataset_dir=str(data)), **options})
    return parser


def test_what_is_drawn_does_not_depend_on_the_processes(data: Path, tmp_path: Path) -> None:
    parser = settings_of(data, output_dir=str(tmp_path))
    cases, shares = parser.get_parsed_content("train#cases"), parser.get_parsed_content("train#shares")

    def draw(rank: int, processes: int) -> list[Any]:
        torch.manual_seed(3)
        return list(DomainSampler(cases, shares, 2, 6, rank=rank, processes=processes))

    alone = draw(0, 1)
    assert [batch for pair in zip(draw(0, 2), draw(1, 2), strict=True) for batch in pair] == alone
    domains = [{cases[index]["domain"] for index, _ in batch} for batch in alone]
    assert all(len(names) == 1 for names in domains)
    torch.manual_seed(3)
    mixed = list(DomainSampler(cases, shares, 8, 6, mixed=True))
    assert any(len({cases[index]["domain"] for index, _ in batch}) == 2 for batch in mixed)


def test_temperature(data: Path) -> None:
    domains = read_manifest(data / "manifest.json")
    cases = [{"domain": "balls"}] * 100 + [{"domain": "boxes"}] * 4
    assert sampling_weights(cases, domains, 1.0)["balls"] == pytest.approx(100 / 104)
    assert sampling_weights(cases, domains, 2.0)["balls"] == pytest.approx(10 / 12)
    assert sampling_weights(cases, domains, math.inf)["balls"] == pytest.approx(0.5)
    assert sampling_weights(cases, domains, "inf")["balls"] == pytest.approx(0.5)  # as a command line gives it
    with pytest.raises(InputError, match="temperature=0: allowed is above 0"):
        sampling_weights(cases, domains, 0)
    sampler = DomainSampler([{**case, "weight": 1} for case in cases], sampling_weights(cases, domains, 2.0), 1, 4000)
    torch.manual_seed(0)
    drawn = Counter(cases[index]["domain"] for [(index, _)] in sampler)
    assert drawn["balls"] / 4000 == pytest.approx(10 / 12, abs=0.02)


def test_no_patient_is_on_two_sides(data: Path) -> None:
    domains = read_manifest(data / "manifest.json")
    train, val = split_domains(domains, 0.3, seed=1, min_patients=3)
    held_out = [case for domain in domains for case in domain.held_out_cases()]
    sides = [{case["image"] for case in side} for side in (train, val, held_out)]
    assert all(sides) and not sides[0] & sides[1] and not sides[2] & (sides[0] | sides[1])
    assert sum(map(len, sides)) == 9
    _, none = split_domains(domains, 0.3, min_patients=9)
    assert none == []


def test_a_patch_depends_on_its_seed_alone(data: Path, tmp_path: Path) -> None:
    dataset: SeededDataset = settings_of(data, output_dir=str(tmp_path)).get_parsed_content("train#dataset")
    first = dataset[0, 5]
    dataset[1, 6]
    again, other = dataset[0, 5], dataset[0, 7]
    assert torch.equal(first["image"], again["image"]) and torch.equal(first["label"], again["label"])
    assert not torch.equal(first["image"], other["image"])


def test_volumes_kept_in_files_are_those_of_the_memory(data: Path, tmp_path: Path) -> None:
    options = {"output_dir": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    in_memory: SeededDataset = settings_of(data, output_dir=str(tmp_path)).get_parsed_content("train#dataset")
    expected = in_memory[0, 5]
    for _ in range(2):  # made, then read
        found = settings_of(data, **options).get_parsed_content("train#dataset")[0, 5]
        assert all(torch.equal(found[key], expected[key]) for key in ("image", "label"))
        assert len(list((tmp_path / "cache").iterdir())) == 1
    settings_of(data, **options, clip_percentiles=[1.0, 99.0]).get_parsed_content("train#dataset")[0, 5]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_volumes_that_do_not_fit_into_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "free_memory", lambda _: 1e4)
    with pytest.raises(Exception) as told:
        settings_of(data, output_dir=str(tmp_path)).get_parsed_content("train#dataset")
    assert "Keep them in files (--cache_dir FOLDER" in repr(told.getrepr(chain=True))


def infer(weights: Path, scan: Path, out: Path, domain: str) -> ConfigWorkflow:
    return run(
        "inference", bundle_root=str(weights.parent), weights=str(weights), head_width=8, dataset_dir=str(scan),
        output_dir=str(out), domain=domain, device="cpu",
    )  # fmt: skip


def test_inference_picks_the_branch(trained: Path, tmp_path: Path) -> None:
    voxels, _ = make_case(50, 2, (30, 26, 22))
    affine = np.array([[0, -1.5, 0, 5], [1.1, 0, 0, -3], [0, 0, 1.3, 9], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "scan.nii.gz")
    infer(trained / "model.pt", tmp_path / "scan.nii.gz", tmp_path / "out", "boxes")
    mask = nib.load(tmp_path / "out" / "scan_seg.nii.gz")
    assert mask.shape == voxels.shape and mask.get_data_dtype() == np.uint8
    np.testing.assert_allclose(mask.affine, affine, atol=1e-5)
    report = json.loads((tmp_path / "out" / "scan_seg.json").read_text())
    assert report["domain"] == "boxes" and list(report["labels"]) == ["near", "far"]
    assert (tmp_path / "out" / "scan_seg.png").is_file()


def test_an_unknown_domain_lists_the_known_ones(trained: Path, data: Path, tmp_path: Path) -> None:
    for domain, start in (("liver", "domain='liver' is not known"), ("", "no domain is given")):
        with pytest.raises(Exception) as told:
            infer(trained / "model.pt", data / "balls" / "imagesTr", tmp_path, domain)
        text = repr(told.getrepr(chain=True))
        assert start in text and "balls: ball (MRI)" in text and "boxes: near, far (MRI)" in text


def test_weights_without_their_domains(trained: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes((trained / "model.pt").read_bytes())
    with pytest.raises(Exception) as told:
        infer(tmp_path / "model.pt", data / "balls" / "imagesTr", tmp_path / "out", "balls")
    assert "no record of the domains" in repr(told.getrepr(chain=True))


def evaluate(trained: Path, data: Path, out: Path, **options: Any) -> dict[str, Any]:
    run("evaluate", **{
        "bundle_root": str(trained), "weights": str(trained / "model.pt"), "head_width": 8, "device": "cpu",
        "dataset_dir": str(data), "output_dir": str(out), **options,
    })  # fmt: skip
    return json.loads((out / "scores.json").read_text())


def test_evaluation_scores_the_held_out_cases(trained: Path, data: Path, tmp_path: Path) -> None:
    scores = evaluate(trained, data, tmp_path / "a", manifest=str(data / "manifest.json"), domain="boxes")
    [held_out] = read_manifest(data / "manifest.json")[1].held_out_cases()
    assert list(scores["cases"]) == [held_out["case"]]
    whole = evaluate(trained, data / "boxes", tmp_path / "b", domain="boxes")
    assert len(whole["cases"]) == 5
    assert whole["cases"][held_out["case"]] == scores["cases"][held_out["case"]]


def test_nothing_held_out_is_an_error(trained: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception) as told:
        evaluate(trained, data, tmp_path, manifest=str(data / "manifest.json"), domain="balls")
    assert "holds no patient out" in repr(told.getrepr(chain=True))


@pytest.mark.slow
def test_a_few_epochs_find_the_structures(data: Path, tmp_path: Path) -> None:
    budget = {"max_epochs": 16, "batches_per_epoch": 8, "val_interval": 16, "norm_batches": 8, "learning_rate": 3e-3}
    workflow = run("train", **small(dataset_dir=str(data), output_dir=str(tmp_path), **budget))
    metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    assert metrics["dice_balls"] > 0.3 and metrics["dice_boxes"] > 0.2, metrics


@pytest.mark.real_data
def test_the_shipped_weights_on_real_patients(real_data: Path, tmp_path: Path) -> None:
    """Held-out prostate MRI and the held-out chest CT."""
    manifest = str(ROOT / "tools" / "manifests" / "real8.json")
    options: dict[str, Any] = {"bundle_root": str(BUNDLE), "device": "cpu", "dataset_dir": str(real_data)}
    for domain, least in (("prostate_mr", 0.75), ("lung_ct", 0.85)):
        out = tmp_path / domain
        run("evaluate", **options, manifest=manifest, domain=domain, output_dir=str(out))
        [one] = json.loads((out / "scores.json").read_text())["summary"].values()
        assert one["dice"]["mean"] > least
