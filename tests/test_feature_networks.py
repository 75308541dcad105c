"""The classifier's network, what scales and groups its parameters, and the scores of classifications."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from med3d_nets import ClassificationNet, FeatureScale, PadAtEndd, parameter_groups
from med3d_nets.class_scores import calibration_error, mean_auc, sensitivity_at, summarise
from med3d_nets.classification import pool
from tests.test_bundle_tools import drop, put
from tools import bundles
from tools.bundle_check import check_bundle
from tools.bundle_folder import Bundle

NAME = "med3d_feature_extraction_resnet10"


@pytest.fixture(scope="module")
def net() -> ClassificationNet:
    torch.manual_seed(0)
    return ClassificationNet(10, 3).eval()


@pytest.mark.parametrize("depth", [18, 50, 200])
def test_every_block_type(depth: int) -> None:
    with torch.device("meta"):
        net = ClassificationNet(depth, 4, dropout=0.5, output_stride=16)
        assert net(torch.zeros(2, 1, 17, 16, 9), torch.ones(2, 3, dtype=torch.long)).shape == (2, 4)


def test_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=0: at least 1"):
        ClassificationNet(10, 0)


def test_average_leaves_padding_out() -> None:
    """Voxel i of a map of stride 8 has its centre at the image's voxel 8 i."""
    feature = torch.rand(2, 5, 4, 3, 2)
    size = torch.tensor([[32, 24, 16], [9, 8, 1]])
    found = pool(feature, 8, size)
    torch.testing.assert_close(found[0], feature[0].mean(dim=(1, 2, 3)))
    torch.testing.assert_close(found[1], feature[1, :, :2, :1, :1].mean(dim=(1, 2, 3)))


def test_padding_of_a_batch_hardly_shows(net: ClassificationNet) -> None:
    """What is left is the border, behind which convolutions see features of zeros in place of zeros."""
    image = torch.randn(1, 1, 24, 20, 18)
    padded = PadAtEndd("image", [40, 40, 40])({"image": MetaTensor(image[0])})
    assert padded["size"].tolist() == [24, 20, 18] and padded["image"].shape == (1, 40, 40, 40)
    assert (
        torch.equal(padded["image"][0, :24, :20, :18], image[0, 0]) and float(padded["image"][0, 24:].abs().max()) == 0
    )
    with torch.inference_mode():
        alone = pool(net.backbone(image)[4], 8)
        masked = pool(net.backbone(padded["image"][None])[4], 8, padded["size"][None])
        leaking = pool(net.backbone(padded["image"][None])[4], 8)
    assert (masked - alone).norm() < 0.5 * (leaking - alone).norm()
    with pytest.raises(ValueError, match="larger than"):
        PadAtEndd("image", [16, 40, 40])({"image": image[0]})


def test_torchscript_with_and_without_sizes(net: ClassificationNet) -> None:
    image, size = torch.randn(2, 1, 19, 17, 24), torch.tensor([[19, 17, 24], [5, 9, 17]])
    scripted = torch.jit.script(net)
    torch.testing.assert_close(scripted(image), net(image))
    torch.testing.assert_close(scripted(image, size), net(image, size))
    assert not torch.equal(net(image), net(image, size))


def test_feature_scale(net: ClassificationNet) -> None:
    net = copy.deepcopy(net)
    batches = [{"image": torch.randn(1, 1, 16, 16, 16), "size": torch.tensor([[16, 16, 16 - i]])} for i in range(6)]
    FeatureScale(net, batches, "cpu", enabled=False)(Engine(lambda *_: None))
    assert float(net.head[0].mean.abs().max()) == 0 and bool((net.head[0].std == 1).all())
    net.train()
    before = copy.deepcopy(net.backbone.state_dict())
    FeatureScale(net, batches, "cpu")(Engine(lambda *_: None))
    assert net.training and all(torch.equal(before[key], value) for key, value in net.backbone.state_dict().items())
    net.eval()
    with torch.inference_mode():
        scaled = torch.cat([net.head[0](pool(net.backbone(b["image"])[4], 8, b["size"])) for b in batches])
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(512), atol=1e-3, rtol=0)
    varied = scaled.std(dim=0, correction=0) > 0
    torch.testing.assert_close(
        scaled.std(dim=0, correction=0)[varied], torch.ones(int(varied.sum())), atol=1e-3, rtol=0
    )


def test_learning_rates() -> None:
    with torch.device("meta"):
        net = ClassificationNet(10, 2)
        groups = parameter_groups(net, 1.0, 100.0, 0.5)
        assert [group["lr"] for group in groups] == [100.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
        assert groups[1]["params"] == list(net.backbone.layer4.parameters())
        assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
        frozen = parameter_groups(ClassificationNet(10, 2, freeze_backbone=True), 1.0, 100.0)
    assert [group["lr"] for group in frozen] == [100.0]


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    with torch.device("meta"):
        probing = ClassificationNet(10, 2, freeze_backbone=True).train()
        tuned = ClassificationNet(10, 2, freeze_norm=True).train()
        free = ClassificationNet(10, 2).train()
    assert probing.head.training and not any(m.training for m in probing.backbone.modules())
    assert tuned.backbone.conv1.training and not tuned.backbone.layer4[0].bn2.training
    assert all(p.requires_grad for p in tuned.parameters()) and free.backbone.bn1.training


def cases(probabilities: list[list[float]], truth: list[int], patients: str) -> list[dict]:
    return [
        {"probabilities": p, "truth": t, "patient": patient}
        for p, t, patient in zip(probabilities, truth, patients, strict=True)
    ]


def test_scores_by_hand() -> None:
    p = [[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]]
    found = summarise(cases(p, [0, 0, 1, 1], "abcd"), ["x", "y"], samples=300)
    assert found["accuracy"]["value"] == 0.5 and found["auc"]["value"] == 0.75  # 3 of 4 pairs in order
    assert found["auc_per_class"] == {"x": 0.75, "y": 0.75}
    assert found["confusion"] == {"x": {"x": 1, "y": 1}, "y": {"x": 1, "y": 1}}
    low, high = found["accuracy"]["ci95"]
    assert low == 0 and high == 1 and found["patients"] == 4
    assert summarise(cases(p, [0, 0, 1, 1], "abcd"), ["x", "y"], samples=300) == found  # seeded


def test_interval_of_accuracy_is_that_of_the_binomial() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.8
    p = [[1.0, 0.0] if good else [0.0, 1.0] for good in right]
    alone = summarise([{"probabilities": q, "truth": 0, "patient": i} for i, q in enumerate(p)], ["x", "y"], 500)
    half = (alone["accuracy"]["ci95"][1] - alone["accuracy"]["ci95"][0]) / 2
    assert half == pytest.approx(1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400), rel=0.2)
    assert alone["auc"] == {"value": None, "ci95": None}  # one class
    # the same cases four times are no more patients
    copies = [{"probabilities": q, "truth": 0, "patient": i} for i, q in enumerate(p) for _ in range(4)]
    again = summarise(copies, ["x", "y"], 500)["accuracy"]["ci95"]
    assert again[1] - again[0] == pytest.approx(2 * half, rel=0.1)


def test_sensitivity_and_calibration_by_hand() -> None:
    """Ten of each class; one false alarm is allowed, so the threshold is the second highest of the first class."""
    negative, positive = np.linspace(0.05, 0.5, 10), np.linspace(0.41, 0.95, 10)
    p1 = np.concatenate((negative, positive))
    p, truth = np.stack((1 - p1, p1), axis=1), np.repeat([0, 1], 10)
    assert sensitivity_at(p, truth) == (positive > 0.45).mean() == 0.9
    assert sensitivity_at(p, truth, 1.0) == (positive > 0.5).mean() == 0.8
    assert np.isnan(sensitivity_at(p, np.zeros(20, int)))
    sure = np.array([[0.2, 0.8]] * 10)
    assert calibration_error(sure, np.repeat([1, 0], [8, 2])) == pytest.approx(0)
    assert calibration_error(sure, np.repeat([1, 0], [5, 5])) == pytest.approx(0.3)
    assert calibration_error(np.eye(2), np.array([0, 0])) == pytest.approx(0.5)
    found = summarise(cases(p.tolist(), truth.tolist(), "abcdefghijklmnopqrst"), ["x", "y"], samples=100)
    score = found["sensitivity_at_90_specificity"]
    assert score["value"] == 0.9 and score["ci95"][0] <= 0.9 <= score["ci95"][1]
    assert 0 < found["calibration_error"]["ci95"][0] < found["calibration_error"]["ci95"][1]


def test_auc_of_several_classes() -> None:
    rng = np.random.default_rng(2)
    p, truth = rng.random((30, 3)), rng.integers(3, size=30)
    by_hand = [(p[truth == i, i][:, None] > p[truth != i, i]).mean() for i in range(3)]
    assert mean_auc(p, truth, [0, 1, 2]) == pytest.approx(np.mean(by_hand))
    assert np.isnan(mean_auc(p, np.zeros(30, int), [0])) and np.isnan(mean_auc(p, truth, []))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for depth in (10, 50):
        bundles.make(NAME.replace("10", str(depth)), bundles=folder)
    return folder


def test_metadata_tells_the_stages_of_each_depth(made: Path) -> None:
    for depth, last, total in ((10, "512-1023", 1024), (50, "1856-3903", 3904)):
        bundle = Bundle(made / NAME.replace("10", str(depth)))
        pred = bundle.metadata["network_data_format"]["outputs"]["pred"]
        assert pred["num_channels"] == total and pred["channel_def"][last] == "layer4"
        assert f"embedding of {512 if depth == 10 else 2048} numbers" in bundle.text("docs/README.md")


@pytest.mark.parametrize(
    ("file", "id", "value", "words"),
    [
        (
            "metadata",
            "network_data_format#outputs#pred#channel_def#0-63",
            None,
            "has 1024 channels, channel_def has 64-",
        ),
        ("train", "network_def#num_classes", 2, r"train.json: network_def#num_classes is 2, in evaluate.json"),
        ("evaluate", "network_def#_target_", "med3d_nets.SegmentationNet", r"_target_ is .*SegmentationNet', in train"),
        ("inference", "network_def#depth", 18, "network_def has depth 18 in the bundle"),
    ],
)
def test_check_finds(file: str, id: str, value: object, words: str, made: Path) -> None:
    """In a bundle whose training has another network than its inference."""
    path = made / NAME / "configs" / f"{file}.json"
    before = path.read_bytes()
    (drop(file, id) if value is None else put(file, id, value))(made / NAME)
    report = "\n".join(str(fault) for fault in check_bundle(made / NAME, fast=True))
    path.write_bytes(before)
    assert re.search(words, report), report


def test_healthy(made: Path) -> None:
    assert [str(fault) for fault in check_bundle(made / NAME)] == []
