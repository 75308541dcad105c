"""A picture of a volume with the outlines of its mask: one axial, one coronal and one sagittal slice.

Radiological convention: the patient's right is on the left of the picture, in the sagittal slice anterior is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

WINDOW_HU = (-1350.0, 150.0)  # the usual lung window: width 1500, level -600
COLOURS = ("#ff5a5f", "#3fb8ff", "#ffd23f", "#5ee08a", "#d58cff", "#ff9f43")
_BACKGROUND, _TEXT, _MUTED, _MARK = "#101418", "#f2f4f6", "#9aa4ae", "#ffb454"
_HEAD, _LINE = 0.68, 0.22  # inches: the headline with the panels' names, and a line of notes

# name, axes shown (horizontal, vertical), axis cut, marks on the left, right, upper and lower side
_VIEWS = (
    ("axial", (0, 1), 2, "RLAP"),
    ("coronal", (0, 2), 1, "RLSI"),
    ("sagittal", (1, 2), 0, "APSI"),
)
_REVERSED = (0, 1)  # right and anterior, the far ends of axes 0 and 1, are drawn on the left


def render_preview(
    image: NDArray[np.floating],
    mask: NDArray[np.integer],
    spacing: Sequence[float],
    labels: Mapping[int, str],
    title: str,
    notes: Sequence[str] = (),
    window: Sequence[float] | None = WINDOW_HU,
    heat: NDArray[np.floating] | None = None,
) -> bytes:
    """Draw three slices through the centre of the mask, the sagittal one through its largest label.

    With a heat map they go through its peak instead.

    Args:
        image: HU or other intensities, shape (X, Y, Z), axes to the patient's right, anterior and superior (RAS).
        mask: label values on the same grid; an empty mask is shown at the volume's centre.
        spacing: voxel size in mm along the three axes.
        labels: text of the legend for each label value.
        title: headline.
        notes: lines below the picture, for example warnings.
        window: intensities that are black and white; None takes the 1st and 99th percentile of the image.
        heat: values from 0, not drawn, to 1 on the same grid, drawn in colour over the image.

    Returns:
        The content of a PNG file.
    """
    size = np.array(image.shape) * spacing  # mm
    low, high = np.percentile(image, [1, 99]) if window is None else window
    widths = [size[view[1][0]] for view in _VIEWS]
    panel_height = float(np.clip(12.0 * max(size[1], size[2]) / sum(widths), 2.5, 9.0))  # inches
    below = 0.5 + _LINE * len(notes)  # inches for legend and notes
    height = _HEAD + panel_height + below
    figure = Figure(figsize=(12.6, height), facecolor=_BACKGROUND)
    grid = figure.add_gridspec(1, 3, width_ratios=widths, wspace=0.03, left=0.02, right=0.98)
    grid.update(top=1 - _HEAD / height, bottom=below / height)
    centre = _centre(mask, labels) if heat is None or not heat.any() else np.unravel_index(heat.argmax(), heat.shape)
    for column, (name, shown, cut, marks) in enumerate(_VIEWS):
        axes = figure.add_subplot(grid[column])
        _draw_slice(axes, np.take(image, centre[cut], axis=cut), shown, spacing, (low, high))
        if heat is not None:
            _draw_heat(axes, np.take(heat, centre[cut], axis=cut), shown, spacing)
        _draw_outlines(axes, np.take(mask, centre[cut], axis=cut), shown, spacing, list(labels))
        _decorate(axes, name, marks)
    _write(figure, labels, title, notes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=_BACKGROUND)
    return buffer.getvalue()


def _centre(mask: NDArray[np.integer], labels: Mapping[int, str]) -> list[int]:
    """Voxel where the slices cross: the mask's centre of mass, along axis 0 that of the largest label.

    Between two lungs the sagittal slice would show the mediastinum alone.
    """
    centre = [n // 2 for n in mask.shape]
    if mask.any():
        largest = max(labels, key=lambda value: np.count_nonzero(mask == value))
        centre = [_centre_along(mask > 0, axis) for axis in range(3)]
        centre[0] = _centre_along(mask == largest, 0)
    return centre


def _centre_along(mask: NDArray[np.bool_], axis: int) -> int:
    counts = mask.sum(axis=tuple({0, 1, 2} - {axis}))
    return round(float(np.average(np.arange(len(counts)), weights=counts)))


def _draw_slice(
    axes: Axes, pixels: NDArray[Any], shown: tuple[int, int], spacing: Sequence[float], window: Sequence[float]
) -> None:
    """Draw in mm, voxel centres at index × spacing."""
    axes.imshow(
        pixels.T,
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        origin="lower",
        extent=_extent(pixels, shown, spacing),
        interpolation="bicubic",
        aspect="equal",
    )
    if shown[0] in _REVERSED:
        axes.invert_xaxis()


def _draw_heat(axes: Axes, heat: NDArray[Any], shown: tuple[int, int], spacing: Sequence[float]) -> None:
    """The hotter, the less of the image shows through."""
    left, right = axes.get_xlim()  # imshow would turn the axis back
    axes.imshow(
        heat.T,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.6 * np.clip(heat.T, 0, 1),
        origin="lower",
        extent=_extent(heat, shown, spacing),
        interpolation="bilinear",
        aspect="equal",
    )
    axes.set_xlim(left, right)


def _extent(
    pixels: NDArray[Any], shown: tuple[int, int], spacing: Sequence[float]
) -> tuple[float, float, float, float]:
    """Borders in mm, voxel centres at index × spacing."""
    dx, dy = spacing[shown[0]], spacing[shown[1]]
    return (-dx / 2, (pixels.shape[0] - 0.5) * dx, -dy / 2, (pixels.shape[1] - 0.5) * dy)


def _draw_outlines(
    axes: Axes,
    labels_2d: NDArray[Any],
    shown: tuple[int, int],
    spacing: Sequence[float],
    values: Sequence[int],
) -> None:
    padded = np.pad(labels_2d, 1)  # closes outlines at the border, and a contour needs two pixels
    x, y = (np.arange(-1, n - 1) * spacing[axis] for n, axis in zip(padded.shape, shown, strict=True))
    for colour, value in zip(_cycle(values), values, strict=True):
        region = value == padded.T
        if region.any():
            axes.contour(x, y, region.astype(float), levels=[0.5], colors=[colour], linewidths=1.3)


def _decorate(axes: Axes, name: str, marks: str) -> None:
    axes.set_axis_off()
    axes.set_title(name, color=_MUTED, fontsize=10, pad=4)
    places = [(0.015, 0.5, "left", "center"), (0.985, 0.5, "right", "center")]
    width, height = (abs(high - low) for low, high in (axes.get_xlim(), axes.get_ylim()))
    if height > 0.15 * width:  # no room in a strip of a few slices
        places += [(0.5, 0.985, "center", "top"), (0.5, 0.015, "center", "bottom")]
    for mark, (x, y, horizontal, vertical) in zip(marks, places, strict=False):
        text = axes.text(x, y, mark, ha=horizontal, va=vertical, transform=axes.transAxes)
        text.set(
            color=_MARK,
            fontsize=11,
            weight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground=_BACKGROUND)],
        )


def _write(figure: Figure, labels: Mapping[int, str], title: str, notes: Sequence[str]) -> None:
    """Headline, legend and notes; names may hold characters that matplotlib would read as mathematics."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.12 / height, title, color=_TEXT, fontsize=14, weight="bold", va="top", parse_math=False)
    handles = [Line2D([], [], color=c, linewidth=3) for c in _cycle(list(labels))]
    legend = figure.legend(
        handles,
        list(labels.values()),
        loc="lower left",
        bbox_to_anchor=(0.012, (0.05 + _LINE * len(notes)) / height),
        ncols=len(labels),
        frameon=False,
        labelcolor=_TEXT,
        fontsize=11,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    for row, note in enumerate(reversed(notes)):
        figure.text(0.02, (0.08 + _LINE * row) / height, note, color=_MARK, fontsize=10, parse_math=False)


def _cycle(values: Sequence[int]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(values))]
