"""Everything known about a depth or a weight file, as plain data.

One record per depth and one per weights file, the authors' and this project's own; the networks, the bundles, the
tables in the documentation and the tests read them here and nowhere else. Sources: Chen, Ma, Zheng, "Med3D: Transfer
Learning for 3D Medical Image Analysis", arXiv 1904.00625, and the MedicalNet release (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Depth:
    """One depth of the Med3D ResNet.

    Attributes:
        depth: name of the network, number of its weighted layers.
        block: ``"basic"`` (two 3³ convolutions) or ``"bottleneck"`` (1³, 3³, 1³; four times the channels).
        layers: number of blocks in layer1 to layer4.
        shortcut: shortcut type of the released weights, ``"A"`` (no parameters) or ``"B"`` (1³ convolution).
        encoder_parameters: number of parameters with the released shortcut and one input channel.
        tensors: number of state-dict entries with the released shortcut.
    """

    depth: int
    block: str
    layers: tuple[int, int, int, int]
    shortcut: str
    encoder_parameters: int
    tensors: int

    @property
    def expansion(self) -> int:
        """Output channels of a block per channel of its 3³ convolution."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def feature_channels(self) -> tuple[int, int, int, int, int]:
        """Channels of the five feature maps: stem, layer1, layer2, layer3, layer4."""
        return (64, *(width * self.expansion for width in (64, 128, 256, 512)))  # type: ignore[return-value]


DEPTHS: dict[int, Depth] = {
    record.depth: record
    for record in (
        Depth(10, "basic", (1, 1, 1, 1), "B", 14_355_520, 72),
        Depth(18, "basic", (2, 2, 2, 2), "A", 32_986_176, 102),
        Depth(34, "basic", (3, 4, 6, 3), "A", 63_295_808, 198),
        Depth(50, "bottleneck", (3, 4, 6, 3), "B", 46_155_072, 318),
        Depth(101, "bottleneck", (3, 4, 23, 3), "B", 85_201_216, 624),
        Depth(152, "bottleneck", (3, 8, 36, 3), "B", 117_359_936, 930),
        Depth(200, "bottleneck", (3, 24, 36, 3), "B", 126_559_552, 1218),
    )
}

SHORTCUT_TYPES = ("A", "B")
OUTPUT_STRIDES = (8, 16, 32)

# The paper's Table 1; the counts are the paper's.
THREE_D_SEG_8 = (
    "brain tumour (Decathlon Task01, 485 MRI)",
    "hippocampus (Decathlon Task04, 261 MRI)",
    "prostate (Decathlon Task05, 33 MRI)",
    "liver (Decathlon Task03 = LiTS, 131 CT)",
    "heart (Decathlon Task02, 100 MRI)",
    "pancreas (Decathlon Task07, 282 CT)",
    "vessel (Decathlon Task08, 304 CT)",
    "spleen (Decathlon Task09, 42 CT)",
)
UNKNOWN_23 = ("unknown (the list of the 23 datasets was never published)",)


_DECATHLON_LICENCE = "CC BY-SA 4.0 (Medical Segmentation Decathlon; the challenges behind it may set other terms)"
_UNKNOWN_LICENCE = "unknown"

HUB = "https://huggingface.co"
MIRRORS = ("https://hf-mirror.com",)
"""Roots that serve the files of HUB under the same paths; whoever serves a file, its sha256 is checked."""


@dataclass(frozen=True)
class Weight:
    """One weights file.

    The sha256 pins the content. A revision is given where public records tie one to the file's hash; ``main`` stands
    where there is none.

    Attributes:
        name: name of the record; of a released file its name without suffix.
        depth: depth of the network.
        shortcut: shortcut type of the tensors.
        output_stride: output stride that the weights were trained for.
        size: bytes, None where only the hash is known.
        sha256: hash of the file.
        licence: SPDX identifier of the weights' licence.
        datasets: what the weights were trained on.
        note: anything else a user must know.
        kind: ``"encoder"`` (no head) or ``"network"`` (a bundle's ``models/model.pt``).
        data_licence: licence of the training data.
        revision: commit of the authors' repository.
        path: where the file lies in a clone of this repository; empty for released files.
    """

    name: str
    depth: int
    shortcut: str
    output_stride: int
    size: int | None
    sha256: str
    licence: str
    datasets: tuple[str, ...]
    note: str = ""
    kind: str = "encoder"
    data_licence: str = _UNKNOWN_LICENCE
    revision: str = "main"
    path: str = ""

    @property
    def file(self) -> str:
        """Name of the file in the store."""
        return f"{self.name}{PurePosixPath(self.path).suffix or '.pth'}"

    @property
    def repository(self) -> str:
        """Repository of the authors' release on HUB; empty for this project's own weights."""
        return "" if self.path else f"TencentMedicalNet/MedicalNet-Resnet{self.depth}"

    @property
    def url(self) -> str:
        """Address of the file in the authors' release; empty for this project's own weights."""
        return f"{HUB}/{self.repository}/resolve/{self.revision}/{self.file}" if self.repository else ""


def encoders(depth: int | None = None) -> list[Weight]:
    """Released encoders, in the registry's order.

    Args:
        depth: only those of this depth; None: all.
    """
    released = [weight for weight in WEIGHTS.values() if weight.kind == "encoder" and weight.url]
    return [weight for weight in released if depth in (None, weight.depth)]


def _released(name: str, size: int | None, sha256: str, revision: str = "main", note: str = "") -> Weight:
    depth = int(name.split("_")[1])
    unpublished = name.endswith("_23dataset")
    return Weight(
        name,
        depth,
        DEPTHS[depth].shortcut,
        8,
        size,
        sha256,
        "MIT",
        UNKNOWN_23 if unpublished else THREE_D_SEG_8,
        note,
        data_licence=_UNKNOWN_LICENCE if unpublished else _DECATHLON_LICENCE,
        revision=revision,
    )


# New weights of a bundle: size and sha256 (the metadata's weights_sha256) change in its line and nowhere else.
_LIVER_10 = (29_759_205, "30120f5725834ea7f50f37f89c57b7c71a143d7443029dc7edfccb61f5dd0531")
_LUNG_10 = (29_039_581, "1df0bb6ad001cf31cab4a70bfeef37c972ac80865aacaff4f94cb7213ca52d9e")
_DETECTION_10 = (29_539_297, "17637304c609b47ad2417187fdb563b9d3d6affc5ddacd3899bdb4f761919822")
_NODULES_10 = (28_776_471, "037fce918b34437f572dc2cdae0c4b9edf5e08e856793571b674d41d9ccedfb9")
_REAL8_10 = (29_547_445, "d42b8824dc0c36d7894a5b176894541bade021e1e13bf1ca9a21afa0a940d05e")
_REAL8_DATA = (
    "hippocampus MRI, 160 of the patients (Decathlon Task04)",
    "prostate MRI and ultrasound, 20 patients (DeepReg test data)",
    "lung nodule CT, 580 crops (LIDC-IDRI)",
    "multiple sclerosis FLAIR MRI, 2 patients (open_ms_data)",
    "spinal cord T1 and T2 MRI (spinalcordtoolbox test data)",
    "lung CT of one patient at two dates (elastix test data)",
    "abdomen CT, lung bases and liver (TotalSegmentator test data)",
)


WEIGHTS: dict[str, Weight] = {
    record.name: record
    for record in (
        _released("resnet_10", 57_456_599, "2824951eaef30e115929b89bec72342380b08d14792bda1449974ac849e497c0"),
        _released(
            "resnet_10_23dataset",
            57_456_599,
            "afa8055f3e47f4a18239495d92a7abc587902c69c31c743de2b2784653b72605",
            "deeeaa1e2a342b63e28b61e9d993b63e79c4b437",
        ),
        _released("resnet_18", 131_992_196, "38b3a17444c5c18a795355a868e6a2d9ce9318054067f5373d337f55c0f61da3"),
        _released(
            "resnet_18_23dataset",
            131_992_196,
            "61224f9317fcce873366deb3703183e92cc47325b726b69691b33536244e10f4",
            "758fe285bc8ab565eb4f9f965810f1d1a3f79491",
        ),
        _released("resnet_34", 253_276_232, "977a1be79298602fa35980de9c03789229ad36087fb1f4d9bde468aec653c658"),
        _released(
            "resnet_34_23dataset", 253_276_232, "3ea7188e396774e4ef95b66e5e90a78273bb33f6e58d3d717bf24f5f1aaeaa28"
        ),
        _released(
            "resnet_50",
            184_885_051,
            "5b6189cafbee2f5604a7279b62bc163365aa6a86a377e1dc260a14275cacbd84",
            note="hash of the copy in the authors' archive",
        ),
        _released(
            "resnet_50_23dataset", 184_885_051, "ff48a62219073fb977fd3f4ddfb8dc1367f0ec156c8d6f6c37e205bd683a246e"
        ),
        _released("resnet_101", 341_330_267, "a26bbcf9b2ad35f048b0fa317234c003f171a4d719760e5c4aff9f793654ebcf"),
        _released("resnet_152", None, "e96c459f5317ef2cbb898c91575402da2c78b31a31f55c5d28943683fe0626da"),
        _released("resnet_200", 507_146_295, "df58525b0276117169782617a379480d2cbc75230e84e152c603bf22a1fabfa8"),
        Weight(
            "liver_ct_segmentation_resnet10",
            10,
            "B",
            8,
            *_LIVER_10,
            "Apache-2.0",
            (
                "abdomen CT (TotalSegmentator test data)",
                "synthetic CT of tools.liver_data, most of it of the same abdomen",
                "the encoder's: chest CT of one patient (Cancer Imaging Archive)",
                "the encoder's: chest CT of one patient at two dates (elastix test data)",
                "the encoder's: abdomen CT and crops of the thorax (TotalSegmentator test data)",
                "the encoder's: crops of CT from head to pelvis (CT-FM example data, of the TotalSegmentator dataset)",
            ),
            note="half precision; liver in two stages, heads linear and denseaspp",
            kind="network",
            data_licence="CC BY 4.0 and Apache-2.0, per scan in the bundle's docs/data_license.txt",
            path="bundles/liver_ct_segmentation_resnet10/models/model.pt",
        ),
        Weight(
            "lung_ct_segmentation_resnet10",
            10,
            "B",
            8,
            *_LUNG_10,
            "Apache-2.0",
            (
                "chest CT of one patient (Cancer Imaging Archive)",
                "chest CT of one patient at two dates (elastix test data)",
                "abdomen CT and crops of the thorax (TotalSegmentator test data)",
                "crops of CT from head to pelvis (CT-FM example data, from the TotalSegmentator dataset)",
                "synthetic CT of tools.phantom",
            ),
            note="half precision; left and right lung, head fpn",
            kind="network",
            data_licence="CC BY 4.0 and Apache-2.0, per scan in the bundle's docs/data_license.txt",
            path="bundles/lung_ct_segmentation_resnet10/models/model.pt",
        ),
        Weight(
            "lung_nodule_ct_classification_resnet10",
            10,
            "B",
            16,
            *_NODULES_10,
            "Apache-2.0",
            (
                "lung nodule CT, 580 crops with ratings (LIDC-IDRI)",
                *(f"the encoder's: {name}" for name in _REAL8_DATA),
            ),
            note="half precision; malignancy of nodules by two rules, calibrated",
            kind="network",
            data_licence="CC BY 3.0; the encoder's by domain in med3d_multidomain_segmentation's data_license.txt",
            path="bundles/lung_nodule_ct_classification_resnet10/models/model.pt",
        ),
        Weight(
            "lung_nodule_ct_detection_resnet10",
            10,
            "B",
            32,
            *_DETECTION_10,
            "Apache-2.0",
            (
                "lung nodule CT, crops with masks put into other scans (LIDC-IDRI)",
                "thorax CT, lungs (TotalSegmentator test data)",
                "lung CT of one patient at two dates (elastix test data)",
                "synthetic CT of tools.phantom",
                *(f"the encoder's: {name}" for name in _REAL8_DATA),
            ),
            note="half precision; nodules of 3 to 40 mm, trained on scans with nodules put into them",
            kind="network",
            data_licence="CC BY 3.0, Apache-2.0; the encoder's: med3d_multidomain_segmentation's data_license.txt",
            path="bundles/lung_nodule_ct_detection_resnet10/models/model.pt",
        ),
        Weight(
            "med3d_real8_resnet10",
            10,
            "B",
            8,
            *_REAL8_10,
            "Apache-2.0",
            _REAL8_DATA,
            note="half precision; co-trained on eight domains, branches fpn of width 32; scores in docs/co-training.md",
            kind="network",
            data_licence="CC BY-SA 4.0, CC BY 3.0, CC BY, Apache-2.0, MIT: by domain in the bundle's data_license.txt",
            path="bundles/med3d_multidomain_segmentation_resnet10/models/model.pt",
        ),
    )
}
