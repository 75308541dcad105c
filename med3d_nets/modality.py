"""Intensities of a scan by its modality: what a number means is fixed in CT and is not in MRI."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.transforms import ClipIntensityPercentiles, Compose, MapTransform, NormalizeIntensity

from med3d_nets.errors import InputError

MODALITIES = ("ct", "mr")


class IntensityByModalityd(MapTransform):
    """Bring intensities to about -1 to 1: CT by a fixed window, MRI by the volume's own percentiles and z-score.

    ``ct``: HU are clipped to the window, whose ends become -1 and 1, so that a tissue has one value in every scan.
    ``mr``: clipped to percentiles of the volume, then mean 0 and deviation 1, the paper's (arXiv 1904.00625, section
    3); for everything else without a scale of its own, too. In either case 0, with which volumes are padded, is a
    middle grey.

    Args:
        keys: the image, (1, X, Y, Z).
        modality: ``ct`` or ``mr``.
        hu_window: HU that become -1 and 1, of CT.
        clip_percentiles: of MRI.

    Raises:
        InputError: an unknown modality, or a window or percentiles that are not two rising numbers.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modality: str,
        hu_window: Sequence[float] = (-1000.0, 1000.0),
        clip_percentiles: Sequence[float] = (0.5, 99.5),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        if modality not in MODALITIES:
            raise InputError(
                f"modality={modality!r}: allowed are {' and '.join(MODALITIES)} (ct: values in HU; mr: MRI and "
                "whatever else has no fixed scale)."
            )
        low, high = _pair("hu_window", hu_window, (-float("inf"), float("inf")))
        self.window = (low + high) / 2, (high - low) / 2
        percentiles = _pair("clip_percentiles", clip_percentiles, (0.0, 100.0))
        self.modality = modality
        self.normalise = Compose([ClipIntensityPercentiles(*percentiles), NormalizeIntensity()])

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Normalise each key's image."""
        d = dict(data)
        centre, half = self.window
        for key in self.key_iterator(d):
            image = d[key]
            d[key] = ((image - centre) / half).clamp(-1, 1) if self.modality == "ct" else self.normalise(image)
        return d


def _pair(name: str, values: Any, limits: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not limits[0] <= low < high <= limits[1]:
        raise InputError(f"{name}={values!r}: needed are two rising numbers, for example [-1000, 1000] or [0.5, 99.5].")
    return low, high
