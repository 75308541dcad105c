"""A picture of one finding: three slices through its middle, with its box.

Radiological convention: the patient's right is on the left of the picture, in the sagittal slice the front is.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from med3d_nets.preview import WINDOW_HU

_VIEWS = (("axial", (0, 1), 2, "R", "L"), ("coronal", (0, 2), 1, "R", "L"), ("sagittal", (1, 2), 0, "A", "P"))
_HALF_MM = 45.0  # of a slice's edge
_BACKGROUND, _TEXT, _BOX = "#101418", "#f2f4f6", "#ffd23f"


def draw_finding(
    hu: NDArray[np.floating],
    affine: NDArray[np.float64],
    centre: Sequence[float] | NDArray[np.float64],
    size: Sequence[float] | NDArray[np.float64],
    title: str,
    window: Sequence[float] = WINDOW_HU,
) -> bytes:
    """Draw a finding.

    Args:
        hu: HU, (X, Y, Z), axes to the patient's right, front and head (RAS).
        affine: voxel index to RAS mm, 4 × 4.
        centre: middle of the finding, RAS mm.
        size: of its box along the axes, mm.
        title: headline.
        window: HU that are black and white.

    Returns:
        The content of a PNG file.
    """
    step = nib.affines.voxel_sizes(affine)
    middle = nib.affines.apply_affine(np.linalg.inv(affine), centre)
    half = np.asarray(size) / 2
    reach = max(_HALF_MM, 1.3 * float(half.max()))
    figure = Figure(figsize=(10.2, 3.9), facecolor=_BACKGROUND)
    for column, (name, (across, up), cut, low_end, high_end) in enumerate(_VIEWS):
        axes = figure.add_axes((0.005 + 0.333 * column, 0.01, 0.323, 0.85))
        index = int(np.clip(round(middle[cut]), 0, hu.shape[cut] - 1))
        plane = np.take(hu, index, axis=cut).T
        left, right, below, above = (
            float((n - 0.5 - middle[a]) * step[a]) for a in (across, up) for n in (0, hu.shape[a])
        )
        axes.imshow(
            plane, cmap="gray", vmin=window[0], vmax=window[1], origin="lower", extent=(left, right, below, above)
        )
        corner = (-half[across], -half[up])
        axes.add_patch(Rectangle(corner, 2 * half[across], 2 * half[up], fill=False, edgecolor=_BOX, linewidth=1.2))
        axes.set_xlim(reach, -reach)  # the right and the front, the far ends of their axes, are drawn on the left
        axes.set_ylim(-reach, reach)
        axes.set_facecolor("black")
        axes.set_xticks([])
        axes.set_yticks([])
        for place, text in ((0.03, low_end), (0.97, high_end), (0.5, name)):
            axes.text(place, 0.94, text, transform=axes.transAxes, color=_TEXT, fontsize=9, ha="center")
    figure.text(0.01, 0.92, title, color=_TEXT, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, facecolor=_BACKGROUND)
    return buffer.getvalue()
