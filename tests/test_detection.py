"""The detector's network, its boxes and its training, without torchvision."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.data import MetaTensor

from med3d_nets import BoxDetector, DetectionInferer, DetectionLoss, DetectionNet, InputError, WorldBoxesd
from med3d_nets.detection import LEVEL_STRIDES, FeaturePyramid
from med3d_nets.detection_data import IGNORED, NOTHING
from med3d_nets.weights import initialise

SIZE = (64, 64, 32)


@pytest.fixture(scope="module")
def net() -> DetectionNet:
    torch.manual_seed(0)
    return DetectionNet(10, width=8).eval()


def label(*boxes: list[float]) -> torch.Tensor:
    """A label of RandBoxPatchd."""
    rows = torch.zeros(4, 7)
    rows[:, 6] = NOTHING
    for row, box in zip(rows, boxes, strict=False):
        row[:] = torch.tensor(box)
    return rows


class TestPyramid:
    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    def test_levels_have_the_same_strides_at_every_output_stride(self, output_stride: int) -> None:
        net = DetectionNet(10, width=8, output_stride=output_stride).eval()
        levels = net.feature_extractor(net.backbone(torch.zeros(1, 1, *SIZE)))
        assert [tuple(one.shape[1:]) for one in levels] == [(8, *(n // s for n in SIZE)) for s in LEVEL_STRIDES]

    def test_all_output_strides_share_weights(self, net: DetectionNet) -> None:
        shapes = {key: value.shape for key, value in net.state_dict().items()}
        for stride in (8, 16):
            other = DetectionNet(10, width=8, output_stride=stride)
            assert {key: value.shape for key, value in other.state_dict().items()} == shapes
            other.load_state_dict(net.state_dict())

    def test_odd_sizes(self) -> None:
        pyramid = FeaturePyramid((8, 8, 8, 8, 8), (2, 4, 8, 8, 8), 8)
        maps = [torch.zeros(1, 8, n, n, n) for n in (17, 9, 5, 5, 5)]
        assert [one.shape[2] for one in pyramid(maps)] == [9, 5, 3, 2]

    def test_the_encoder_loads_released_weights(self, net: DetectionNet, tmp_path: Any) -> None:
        path = tmp_path / "encoder.pt"
        torch.save({"state_dict": {f"module.{k}": v for k, v in net.backbone.state_dict().items()}}, path)
        other = initialise(DetectionNet(10, width=8), str(path))
        torch.testing.assert_close(other.backbone.state_dict(), net.backbone.state_dict())


class TestNetwork:
    def test_is_monais_retinanet_with_one_tensor(self, net: DetectionNet) -> None:
        assert isinstance(net, RetinaNet)
        with torch.inference_mode():
            output = net(torch.rand(1, 1, *SIZE))
        anchors, places = BoxDetector(net).anchors_of(SIZE)
        assert output.shape == (1, 7, len(anchors))
        assert sum(places) * net.num_anchors == len(anchors)

    def test_order_is_that_of_monais_detector(self, net: DetectionNet) -> None:
        """The one tensor holds what RetinaNet's own forward and the detector's reshaping give."""
        image = torch.rand(1, 1, *SIZE)
        with torch.inference_mode():
            output = net(image)
            levels = net.feature_extractor(net.backbone(image))
            detector = BoxDetector(net)
            logits = detector._reshape_maps(net.classification_head(levels))
            boxes = detector._reshape_maps(net.regression_head(levels))
        torch.testing.assert_close(output.transpose(1, 2), torch.cat((logits, boxes), dim=2))

    def test_frozen_encoder(self) -> None:
        net = DetectionNet(10, width=8, freeze_backbone=True).train()
        assert not net.backbone.training and net.classification_head.training
        assert not any(parameter.requires_grad for parameter in net.backbone.parameters())

    @pytest.mark.parametrize("wrong", [{"width": 12}, {"anchor_sizes": []}, {"num_classes": 0}, {"output_stride": 4}])
    def test_wrong_arguments(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="allowed|needed"):
            DetectionNet(10, **wrong)

    @pytest.mark.parametrize("depth", [18, 50])
    def test_other_depths(self, depth: int) -> None:
        with torch.inference_mode():
            output = DetectionNet(depth, width=16).eval()(torch.zeros(1, 1, 32, 32, 32))
        assert output.shape == (1, 7, 2 * (512 + 64 + 8 + 1))


class TestAnchors:
    def test_their_middle_is_the_voxel_of_the_map(self, net: DetectionNet) -> None:
        """A map of stride s has its voxel i at the image's voxel s * i."""
        anchors, places = BoxDetector(net).anchors_of(SIZE)
        middles = ((anchors[:, :3] + anchors[:, 3:]) / 2).split([n * net.num_anchors for n in places])
        for level, stride in zip(middles, LEVEL_STRIDES, strict=True):
            assert level[0].tolist() == [0, 0, 0]
            assert level[-1].tolist() == [n - stride for n in SIZE]

    def test_sizes_double_with_the_stride(self, net: DetectionNet) -> None:
        anchors, places = BoxDetector(net).anchors_of(SIZE)
        edges = (anchors[:, 3] - anchors[:, 0]).split([n * net.num_anchors for n in places])
        assert [sorted(set(one.tolist())) for one in edges] == [[4, 6], [8, 12], [16, 24], [32, 48]]


class TestTraining:
    def test_a_step_without_torchvision(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
        net = DetectionNet(10, width=8)
        loss = DetectionLoss(BoxDetector(net), SIZE)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        image, truth = torch.rand(2, 1, *SIZE), torch.stack([label([20, 20, 10, 27, 27, 17, 0]), label()])
        first = None
        for _ in range(6):
            optimizer.zero_grad()
            value = loss(net(image), truth)
            value.backward()
            optimizer.step()
            first = first or float(value)
        assert float(value) < first

    def test_every_parameter_has_a_gradient_without_a_nodule(self) -> None:
        net = DetectionNet(10, width=8)
        DetectionLoss(BoxDetector(net), SIZE)(net(torch.rand(2, 1, *SIZE)), torch.stack([label(), label()])).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    def test_excluded_findings_are_no_background(self, net: DetectionNet) -> None:
        detector = BoxDetector(net)
        anchors, places = detector.anchors_of(SIZE)
        target = {
            "boxes": torch.tensor([[40.0, 40, 10, 48, 48, 18]]),
            "labels": torch.zeros(1, dtype=torch.long),
            "ignored": torch.tensor([[0.0, 0, 0, 20, 20, 20]]),
        }
        (matched,) = detector.compute_anchor_matched_idxs([anchors], [target], places)
        middle = (anchors[:, :3] + anchors[:, 3:]) / 2
        inside = (middle <= 20).all(dim=1)
        assert (matched[inside] == -2).all()
        assert set(matched[~inside].tolist()) == {-1, 0}

    def test_matched_anchors_lie_on_the_nodule(self, net: DetectionNet) -> None:
        detector = BoxDetector(net)
        anchors, places = detector.anchors_of(SIZE)
        for size in (3.0, 8.0, 24.0):
            box = torch.tensor([[30.0, 30, 14, 30 + size, 30 + size, 14 + size]])
            target = {"boxes": box, "labels": torch.zeros(1, dtype=torch.long)}
            (matched,) = detector.compute_anchor_matched_idxs([anchors], [target], places)
            found = anchors[matched == 0]
            assert len(found)
            apart = ((found[:, :3] + found[:, 3:]) / 2 - (box[:, :3] + box[:, 3:]) / 2).abs()
            assert apart.max() <= max(4.0, size)
            assert IGNORED not in matched.tolist()


class OneBox(torch.nn.Module):
    """Finds what is bright: of the smallest anchors those whose middle is."""

    def __init__(self, detector: BoxDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        anchors, _ = self.detector.anchors_of(x.shape[2:])
        middle = ((anchors[:, :3] + anchors[:, 3:]) / 2).long()
        output = torch.zeros(1, 7, len(anchors))
        output[0, 0] = -20
        smallest = (anchors[:, 3] - anchors[:, 0]) == 4
        inside = (middle < torch.tensor(x.shape[2:])).all(dim=1) & smallest
        x0, y0, z0 = middle[inside].T
        output[0, 0, inside] = torch.where(x[0, 0, x0, y0, z0] > 0.5, 5.0, -20.0)
        return output


class TestInferer:
    @pytest.mark.parametrize("window", [[32, 32, 32], [64, 32, 64], [160, 160, 160]])
    def test_one_box_whatever_the_windows(self, net: DetectionNet, window: list[int]) -> None:
        detector = BoxDetector(net)
        image = torch.zeros(1, 1, 100, 70, 50)
        for place in ((4, 8, 12), (48, 32, 20), (96, 66, 46), (52, 36, 24)):
            image[:] = 0
            x, y, z = place
            image[0, 0, x : x + 4, y : y + 4, z : z + 4] = 1  # one anchor of each phase of the windows
            inferer = DetectionInferer(detector, window, overlap=0.5)
            found = inferer(image, OneBox(detector), torch.ones_like(image))[0]
            assert len(found) == 1
            middle = (found[0, :3] + found[0, 3:6]) / 2
            assert (middle - torch.tensor(place) - 1.5).abs().max() <= 2.5

    def test_nothing_is_looked_for_outside_of_the_field(self, net: DetectionNet) -> None:
        detector = BoxDetector(net)
        image = torch.ones(1, 1, 40, 40, 40)

        class Never(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise AssertionError("computed a window without lungs")

        assert DetectionInferer(detector)(image, Never(), torch.zeros_like(image)).shape == (1, 0, 7)

    @pytest.mark.parametrize(("lungs", "kept"), [(19, False), (20, True)], ids=["a mass in the heart", "at the wall"])
    def test_a_mass_may_have_its_middle_outside_of_the_field(self, net: DetectionNet, lungs: int, kept: bool) -> None:
        detector = BoxDetector(net)
        image = torch.zeros(1, 1, 64, 64, 64)
        field = torch.zeros_like(image)
        field[:, :, :lungs] = 1  # of a box over voxels 16 to 48

        class Mass(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                anchors, _ = detector.anchors_of(x.shape[2:])
                output = torch.zeros(1, 7, len(anchors))
                own = (anchors == torch.tensor([16.0, 16, 16, 48, 48, 48])).all(dim=1)
                output[0, 0] = torch.where(own, 5.0, -20.0)
                return output

        found = DetectionInferer(detector, [64, 64, 64])(image, Mass(), field)[0]
        assert (found[:, :6].tolist() == [[16.0, 16, 16, 48, 48, 48]]) is kept

    @pytest.mark.parametrize(("largest_mm", "kept"), [(0, [32.0]), (24, [4.0])])
    def test_what_is_too_large_takes_no_place(self, net: DetectionNet, largest_mm: float, kept: list[float]) -> None:
        detector = BoxDetector(net)
        image = torch.zeros(1, 1, 64, 64, 64)

        class Two(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                anchors, _ = detector.anchors_of(x.shape[2:])
                output = torch.full((1, 7, len(anchors)), 0.0)
                output[0, 0] = -20
                output[0, 0, (anchors == torch.tensor([16.0, 16, 16, 48, 48, 48])).all(dim=1)] = 5.0
                output[0, 0, (anchors == torch.tensor([50.0, 50, 50, 54, 54, 54])).all(dim=1)] = 4.0
                return output

        spacing = (0.5, 1.0, 1.0)  # the larger has a diameter of 27 mm, the smaller of 3.3 mm
        inferer = DetectionInferer(detector, [64, 64, 64], spacing=spacing, largest_mm=largest_mm, max_boxes=1)
        found = inferer(image, Two(), torch.ones_like(image))[0]
        assert (found[:, 3] - found[:, 0]).tolist() == kept

    @pytest.mark.parametrize("wrong", [{"window": [50, 64, 64]}, {"window": "auto"}, {"overlap": 1.0}])
    def test_wrong_arguments(self, net: DetectionNet, wrong: dict[str, Any]) -> None:
        with pytest.raises(InputError, match="allowed"):
            DetectionInferer(BoxDetector(net), **wrong)


def rotation(degrees: float) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


def moved(affine: np.ndarray, by: list[float]) -> np.ndarray:
    affine[:3, 3] = by
    return affine


class TestWorld:
    @pytest.mark.parametrize(
        "affine",
        [
            np.diag([1.0, 1.0, 1.0, 1.0]),
            np.diag([-0.7, -0.7, 2.5, 1.0]),
            moved(rotation(20) @ np.diag([0.8, 0.8, 1.5, 1.0]), [-30, 12, 7]),
        ],
        ids=["plain", "flipped", "oblique"],
    )
    def test_centres_are_where_the_affine_puts_them(self, affine: np.ndarray) -> None:
        image = MetaTensor(torch.zeros(1, 8, 8, 8), affine=torch.from_numpy(affine))
        boxes = torch.tensor([[2.0, 3, 4, 6, 7, 10, 0.5]])
        found = WorldBoxesd("pred")({"pred": boxes, "image": image})["pred"][0]
        np.testing.assert_allclose(found[:3], (affine @ [4, 5, 7, 1])[:3])
        np.testing.assert_allclose(found[3:6], [4, 4, 6] * np.linalg.norm(affine[:3, :3], axis=0))
        assert found[6] == 0.5

    def test_no_box(self) -> None:
        image = MetaTensor(torch.zeros(1, 8, 8, 8), affine=torch.eye(4))
        assert WorldBoxesd("pred")({"pred": torch.zeros(0, 7), "image": image})["pred"].shape == (0, 7)
