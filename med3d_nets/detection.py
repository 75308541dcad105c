"""RetinaNet on a Med3D encoder: a feature pyramid at strides 4, 8, 16 and 32, and MONAI's heads and detector.

Lin et al., Feature Pyramid Networks (CVPR 2017), section 3, and Focal Loss for Dense Object Detection (ICCV 2017),
section 4. A level is as wide apart as what it finds is large: at 1.25 mm, 5 to 60 mm.

Boxes are (x0, y0, z0, x1, y1, z1) in voxel indices of the network's input, where a voxel's middle is its index. An
encoder's map of stride s has its voxel i at index s * i, and so have the anchors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from torch import nn

from med3d_nets.heads import upsample
from med3d_nets.resnet import Med3DResNet

LEVEL_STRIDES = (4, 8, 16, 32)
DIVISOR = LEVEL_STRIDES[-1]


class FeaturePyramid(nn.Module):
    """Feature pyramid over layer1 to layer4, one level each, at ``LEVEL_STRIDES`` whatever the encoder's own strides.

    Where the encoder keeps a finer stride (it is dilated), every second or fourth voxel of its map is taken: these see
    the image at the same distances as the strided encoder's. So all output strides have the same levels and weights.

    Args:
        channels: channels of the encoder's five maps.
        strides: strides of the five maps.
        width: channels of each level.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__()
        self.out_channels = width
        self.steps = [level // stride for level, stride in zip(LEVEL_STRIDES, strides[1:], strict=True)]
        self.lateral = nn.ModuleList(nn.Conv3d(count, width, kernel_size=1) for count in channels[1:])
        self.smooth = nn.ModuleList(nn.Conv3d(width, width, kernel_size=3, padding=1) for _ in channels[1:])

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """Map the encoder's five maps to the four levels, (B, width, ceil(X / stride), …), finest first."""
        laterals: list[torch.Tensor] = []
        for index, lateral in enumerate(self.lateral):
            step = self.steps[index]
            laterals.append(lateral(features[index + 1][:, :, ::step, ::step, ::step]))
        merged = [laterals[3]]
        for index in (2, 1, 0):
            merged.insert(0, upsample(merged[0], 2, laterals[index]) + laterals[index])
        levels: list[torch.Tensor] = []
        for index, smooth in enumerate(self.smooth):
            levels.append(smooth(merged[index]))
        return levels


class DetectionNet(RetinaNet):
    """MONAI's RetinaNet with a Med3D encoder, ``.backbone``, and one tensor as output.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        num_classes: kinds of objects, without the background.
        anchor_sizes: edges of the cubic anchors at stride 4, in voxels; twice as large at each next level.
        width: channels of the pyramid, a multiple of 8.
        shortcut_type: see Med3DResNet.
        in_channels: channels of the input.
        output_stride: 8, 16 or 32; see Med3DResNet and FeaturePyramid.
        freeze_backbone: train pyramid and heads alone; the encoder's norms keep their running statistics.
        freeze_norm: the encoder's norms keep their running statistics while the rest is trained.

    Raises:
        ValueError: an argument is not one of the above.

    Example:
        >>> DetectionNet(10)(torch.zeros(1, 1, 64, 64, 64)).shape
        torch.Size([1, 7, 9362])
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 1,
        anchor_sizes: Sequence[float] = (4.0, 6.0),
        width: int = 64,
        shortcut_type: str | None = None,
        in_channels: int = 1,
        output_stride: int = 32,
        freeze_backbone: bool = False,
        freeze_norm: bool = False,
    ) -> None:
        if num_classes < 1 or not anchor_sizes or min(anchor_sizes) <= 0:
            raise ValueError(
                f"num_classes={num_classes}, anchor_sizes={list(anchor_sizes)}: at least one class and one anchor, of "
                "a positive size, are needed."
            )
        if width < 8 or width % 8:
            raise ValueError(f"width={width}: allowed are multiples of 8.")
        backbone = Med3DResNet(depth, shortcut_type, in_channels, output_stride)
        pyramid = FeaturePyramid(backbone.feature_channels, backbone.feature_strides, width)
        super().__init__(3, num_classes, len(anchor_sizes), pyramid, DIVISOR, use_list_output=True)
        self.backbone = backbone
        self.anchor_sizes = [float(size) for size in anchor_sizes]
        self.freeze_backbone = freeze_backbone
        self.freeze_norm = freeze_norm
        if freeze_backbone:
            backbone.requires_grad_(False)
        self.train()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Compute logits and box regressions of all anchors.

        Args:
            images: (B, in_channels, X, Y, Z), each axis a multiple of 32 where boxes are wanted.

        Returns:
            (B, num_classes + 6, anchors): logits, then the regression of ``BoxCoder``. Anchors come level by level, of
            each level voxel by voxel, of each voxel by size, as MONAI's anchor generators order them.
        """
        levels = self.feature_extractor(self.backbone(images))
        logits = self.classification_head(levels)
        boxes = self.regression_head(levels)
        columns: list[torch.Tensor] = []
        for index in range(len(levels)):
            both = torch.cat((self._by_anchor(logits[index]), self._by_anchor(boxes[index])), dim=1)
            columns.append(both)
        return torch.cat(columns, dim=2)

    def _by_anchor(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (B, num_anchors * C, x, y, z) to (B, C, x * y * z * num_anchors)."""
        split = maps.unflatten(1, [self.num_anchors, -1])
        return split.permute(0, 2, 3, 4, 5, 1).flatten(2)

    def train(self, mode: bool = True) -> DetectionNet:
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        elif self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class _Anchors(AnchorGeneratorWithAnchorShape):
    """MONAI's anchors with their middle on the map's voxels, not half a stride beside them."""

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        moved = []
        for anchors, steps in zip(super().grid_anchors(grid_sizes, strides), strides, strict=True):
            moved.append(anchors - torch.stack([*steps, *steps]) // 2)
        return moved


class BoxDetector(RetinaNetDetector):
    """MONAI's RetinaNetDetector with matching by ATSS, which needs no torchvision.

    MONAI asks whether its matcher is torchvision's before it uses its own, so that training fails where torchvision
    cannot be imported; overriding that method is what MONAI's own message advises.

    Args:
        network: a DetectionNet.
        min_probability: boxes below are dropped.
        nms_threshold: of two boxes of one class that overlap more (IoU), the less probable is dropped.
        max_boxes: most boxes of an image, or of a window of one; ``DetectionInferer`` has its own limit for the whole.
        negatives: anchors of the background that the loss takes for each patch, the hardest ones by chance; more where
            ``positive_fraction`` asks for it.
        positive_fraction: share of the anchors in the loss that may lie on objects.
        pool: the negatives are drawn among this many times as many hardest ones.
        candidates: of ATSS (Zhang et al., CVPR 2020), anchors of each level that an object considers.
    """

    def __init__(
        self,
        network: DetectionNet,
        min_probability: float = 0.02,
        nms_threshold: float = 0.2,
        max_boxes: int = 1000,
        negatives: int = 32,
        positive_fraction: float = 0.25,
        pool: float = 20,
        candidates: int = 4,
    ) -> None:
        shapes = [[size] * 3 for size in network.anchor_sizes]
        super().__init__(network, _Anchors([stride // LEVEL_STRIDES[0] for stride in LEVEL_STRIDES], shapes))
        self.set_target_keys("boxes", "labels")
        self.set_box_selector_parameters(min_probability, 1000, nms_threshold, max_boxes)
        self.set_atss_matcher(candidates, center_in_gt=False)
        self.set_hard_negative_sampler(4 * negatives, positive_fraction, negatives, pool)
        self.set_cls_loss(nn.BCEWithLogitsLoss(reduction="mean"))
        self.set_box_regression_loss(nn.SmoothL1Loss(beta=1 / 9), encode_gt=True, decode_pred=False)

    def anchors_of(self, size: Sequence[int], device: Any = "cpu") -> tuple[torch.Tensor, list[int]]:
        """List the anchors of an image.

        Args:
            size: voxels along its axes, multiples of ``DIVISOR``.
            device: where to put them.

        Returns:
            Boxes, (anchors, 6), and the number of voxels of each level.
        """
        grids = [[n // stride for n in size] for stride in LEVEL_STRIDES]
        maps = [torch.empty((1, 0, *grid), device=device) for grid in grids]
        anchors = self.anchor_generator(torch.empty((1, 0, *size), device=device), maps)[0]
        return anchors, [grid[0] * grid[1] * grid[2] for grid in grids]

    def select(self, output: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the network's output for one image into boxes.

        Args:
            output: (classes + 6, anchors).
            size: voxels of the image along its axes, multiples of ``DIVISOR``.

        Returns:
            Boxes, (n, 6), and probabilities, (n,), of the first class.
        """
        anchors, places = self.anchors_of(size, output.device)
        found = self.postprocess_detections(
            {key: value[None] for key, value in self._parted(output).items()}, [anchors], [list(size)], places
        )[0]
        return found[self.target_box_key], found[self.pred_score_key]

    def losses(
        self, output: torch.Tensor, targets: list[dict[str, torch.Tensor]], size: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Compute MONAI's losses for a batch.

        Args:
            output: (B, classes + 6, anchors).
            targets: per image ``boxes`` (n, 6), ``labels`` (n,), and ``ignored`` (m, 6): anchors with their middle in
                one of these are neither right nor wrong.
            size: voxels of the images.

        Returns:
            ``classification`` and ``box_regression``.
        """
        anchors, places = self.anchors_of(size, output.device)
        parts = [self._parted(one) for one in output]
        heads = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        return self.compute_loss(heads, targets, [anchors] * len(targets), places)

    def compute_anchor_matched_idxs(
        self,
        anchors: list[torch.Tensor],
        targets: list[dict[str, torch.Tensor]],
        num_anchor_locs_per_level: Sequence[int],
    ) -> list[torch.Tensor]:
        """Match anchors to boxes by ATSS: an index into the boxes, -1 for background, -2 for ignored."""
        matcher: ATSSMatcher = self.proposal_matcher
        matches = []
        for own, target in zip(anchors, targets, strict=True):
            boxes = target[self.target_box_key]
            if len(boxes):
                _, matched = matcher(boxes, own, num_anchor_locs_per_level, self.num_anchors_per_loc)
            else:
                matched = torch.full((len(own),), matcher.BELOW_LOW_THRESHOLD, device=own.device)
            ignored = target.get("ignored")
            if ignored is not None and len(ignored):
                middle = (own[:, None, :3] + own[:, None, 3:]) / 2
                inside = ((middle >= ignored[:, :3]) & (middle <= ignored[:, 3:])).all(dim=2).any(dim=1)
                matched[inside & (matched < 0)] = matcher.BETWEEN_THRESHOLDS
            matches.append(matched)
        return matches

    def _parted(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """Part (classes + 6, anchors) as the detector wants it, (anchors, …) each."""
        columns = output.T
        return {self.cls_key: columns[:, : self.num_classes], self.box_reg_key: columns[:, self.num_classes :]}
