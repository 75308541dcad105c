"""Registers the Med3D encoders as backbones of MONAI's FlexibleUNet.

``FlexibleUNet(in_channels=1, out_channels=2, backbone="med3d_resnet50", spatial_dims=3)`` works once ``med3d_nets``
is imported. Its decoder doubles the scale at every step, so the encoder runs at output stride 32; the weights are the
same. The output has the input's size where every axis is a multiple of 32 voxels.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE, BaseEncoder

from med3d_nets.registry import DEPTHS
from med3d_nets.resnet import Med3DResNet


class Med3DEncoder(Med3DResNet, BaseEncoder):
    """Med3DResNet behind the interface that FlexibleUNet asks of an encoder.

    Args:
        depth: 10, 18, 34, 50, 101, 152 or 200.
        in_channels: channels of the input.
        spatial_dims: must be 3.
        pretrained: must be False; load weights into ``net.encoder`` with ``med3d_nets.weights.load_backbone``.

    Raises:
        ValueError: ``spatial_dims`` is not 3 or ``pretrained`` is True.
    """

    def __init__(self, depth: int, in_channels: int = 1, spatial_dims: int = 3, pretrained: bool = False) -> None:
        if spatial_dims != 3:
            raise ValueError(f"spatial_dims={spatial_dims}: the Med3D encoders are 3D, pass spatial_dims=3.")
        if pretrained:
            raise ValueError(
                "pretrained=True: no weights are downloaded here; build with pretrained=False, then call "
                "med3d_nets.weights.load_backbone(net.encoder, PATH)."
            )
        super().__init__(depth, in_channels=in_channels, output_stride=32)

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        """Names of the backbones, one per depth."""
        return [f"med3d_resnet{depth}" for depth in DEPTHS]

    @classmethod
    def get_encoder_parameters(cls) -> list[dict[str, Any]]:
        """Constructor arguments of each backbone."""
        return [{"depth": depth, "in_channels": 1, "spatial_dims": 3, "pretrained": False} for depth in DEPTHS]

    @classmethod
    def num_channels_per_output(cls) -> list[tuple[int, ...]]:
        """Channels of the five feature maps of each backbone."""
        return [record.feature_channels for record in DEPTHS.values()]

    @classmethod
    def num_outputs(cls) -> list[int]:
        """Number of feature maps of each backbone."""
        return [5] * len(DEPTHS)


def register() -> None:
    """Add the encoders to MONAI's registry; a second call changes nothing."""
    if any(name not in FLEXUNET_BACKBONE.register_dict for name in Med3DEncoder.get_encoder_names()):
        FLEXUNET_BACKBONE.register_class(Med3DEncoder)


register()
