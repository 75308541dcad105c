"""What a user gets of a scan's findings: JSON, tables in LUNA16's columns, and a picture of each finding."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine
from numpy.typing import NDArray

from med3d_nets.archive import read_report, status
from med3d_nets.case_writer import CaseWriter, versions
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.finding_picture import draw_finding
from med3d_nets.processes import gather_rows, rank
from med3d_nets.tables import csv_text

COLUMNS = (
    *("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"),
    *("sizeX_mm", "sizeY_mm", "sizeZ_mm", "probability"),
)
ALL, SUMMARY = "findings.csv", "summary.csv"
SPACE = "LPS: x to the patient's left, y to the back, z to the head (ITK, DICOM, LUNA16); RAS (NIfTI) negates x and y"


class FindingsWriter(CaseWriter):
    """Handler of CaseEvaluator that writes ``{case}_findings.json``, ``.csv`` and a PNG per finding.

    It expects in the engine's output, after postprocessing, ``pred``: findings of WorldBoxesd, (n, 7), and ``image``:
    the network's input, RAS, (1, X, Y, Z), a MetaTensor; in the batch ``field``, where nodules were looked for. After
    several cases there are ``findings.csv``, the rows of all, and ``summary.csv``, what became of each case.

    Args:
        output_dir: see CaseWriter.
        hu_window: HU that are 0 and 1 in ``image``.
        weights: see CaseWriter.
        bundle: name and version of the bundle, for the JSON.
        min_probability: findings below are not reported.
        pictures: most pictures of a case, of the most probable findings.
        settings: what else shapes a result, for the JSON.
        skip_finished: see CaseWriter.
    """

    def __init__(
        self,
        output_dir: str | Path,
        hu_window: Sequence[float],
        weights: str | Path,
        bundle: Mapping[str, str],
        min_probability: float = 0.3,
        pictures: int = 20,
        settings: Mapping[str, Any] | None = None,
        skip_finished: bool = False,
    ) -> None:
        if not 0 <= float(min_probability) < 1:
            raise InputError(f"min_probability={min_probability}: allowed is 0 to below 1.")
        self.hu_window = [float(value) for value in hu_window]
        self.min_probability = float(min_probability)
        self.pictures = int(pictures)
        shaping = {"min_probability": self.min_probability, "pictures": self.pictures, **(settings or {})}
        super().__init__(
            output_dir, weights, {"bundle": dict(bundle), "settings": shaping}, [ALL, SUMMARY], skip_finished
        )

    def __call__(self, engine: Engine) -> None:
        """Have the files of the current case written."""
        state: Any = engine.state
        output = {key: state.output[0][key].cpu() for key in ("image", "pred")}
        output["field"] = state.batch[0]["field"].cpu()
        seconds = round(time.perf_counter() - state.started, 3)
        state.write = partial(self._write_case, state.case, output, self._origin, seconds)

    def _write_case(self, case: str, output: Mapping[str, Any], origin: Mapping[str, Any], seconds: float) -> None:
        image, values = output["image"], np.asarray(output["pred"], dtype=np.float64)
        values = values[values[:, 6] >= self.min_probability]
        native = np.asarray(image.meta["original_affine"], dtype=np.float64)
        names = [_picture(case, number) for number in range(1, min(len(values), self.pictures) + 1)]
        low, high = self.hu_window
        hu, files = image[0].numpy() * (high - low) + low, {}
        affine = np.asarray(image.affine, dtype=np.float64)
        for number, (name, value) in enumerate(zip(names, values, strict=False), start=1):
            title = f"{case}: finding {number} of {len(values)}, {_diameter(value):.1f} mm, p = {value[6]:.2f}"
            files[name] = draw_finding(hu, affine, value[:3], value[3:6], title)
        files[f"{case}_findings.csv"] = table([row(case, value) for value in values]).encode()
        report = {
            "case": case,
            **origin,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": seconds,
            "space": SPACE,
            "lungs_found": bool(output["field"].any()),
            "findings": [_entry(value, native, name) for value, name in _padded(values, names)],
            "versions": versions(),
        }
        self._write_files(case, report, files)
        lungs = "" if report["lungs_found"] else " (no lungs in view)"
        print(f"  {case}: {len(values)} findings{lungs} -> {self._report_path(case)}", flush=True)

    def _files_of(self, case: str) -> list[Path]:
        """Of an earlier run there may be more pictures than now: its report names them."""
        names = [f"{case}_findings.csv", *(_picture(case, number) for number in range(1, self.pictures + 1))]
        path = self._report_path(case)
        earlier = (read_report(path) or {"files": ()})["files"]
        names += [Path(one).name for one in earlier]
        return [path, *(self.output_dir / name for name in dict.fromkeys(names))]

    def _report_path(self, case: str) -> Path:
        return self.output_dir / f"{case}_findings.json"

    def _finish(self, engine: Engine) -> None:
        state: Any = engine.state
        mine = []
        for one in state.cases:
            name = str(one["case"])
            report = self._report_of(name) or {}
            found = report.get("findings", [])
            told: dict[str, Any] = {"case": name, "image": str(one["image"])}
            told["status"] = status(name, state.failed, state.skipped)
            told |= {"reason": state.failed.get(name, ""), "findings": len(found) if report else ""}
            mine.append((told, [_row_of(name, finding) for finding in found]))
        cases = gather_rows(mine)
        if rank() == 0 and len(cases) > 1:
            _write(self.output_dir / ALL, table([line for _, lines in cases for line in lines]))
            _write(self.output_dir / SUMMARY, csv_text(list(cases[0][0]), [told for told, _ in cases]))


def _picture(case: str, number: int) -> str:
    return f"{case}_finding{number:02d}.png"


def row(case: str, value: NDArray[np.float64]) -> list[str]:
    """One row of a table of findings, with ``COLUMNS``, of a finding in RAS mm."""
    x, y, z = value[:3] * [-1, -1, 1]
    return [case, *(f"{n:.3f}" for n in (x, y, z, _diameter(value), *value[3:6])), f"{value[6]:.6f}"]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of findings as CSV."""
    return csv_text(COLUMNS, rows)


def _entry(value: NDArray[np.float64], native: NDArray[np.float64], picture: str) -> dict[str, Any]:
    """A finding for JSON; ``voxel`` is an index of the scan as it was read."""
    centre = value[:3]
    voxel = nib.affines.apply_affine(np.linalg.inv(native), centre)
    return {
        "centre_lps_mm": [round(float(n), 3) for n in centre * [-1, -1, 1]],
        "centre_ras_mm": [round(float(n), 3) for n in centre],
        "voxel": [round(float(n), 2) for n in voxel],
        "size_mm": [round(float(n), 3) for n in value[3:6]],
        "diameter_mm": round(_diameter(value), 3),
        "probability": round(float(value[6]), 6),
        "picture": picture,
    }


def _row_of(case: str, finding: Mapping[str, Any]) -> list[str]:
    numbers = [*finding["centre_lps_mm"], finding["diameter_mm"], *finding["size_mm"]]
    return [case, *(f"{n:.3f}" for n in numbers), f"{finding['probability']:.6f}"]


def _diameter(value: NDArray[np.float64]) -> float:
    """Mean of the box's edges, as boxes of training are cubes as large as the nodule's diameter."""
    return float(value[3:6].mean())


def _padded(values: NDArray[np.float64], names: Sequence[str]) -> list[tuple[NDArray[np.float64], str]]:
    return [(value, names[index] if index < len(names) else "") for index, value in enumerate(values)]


def _write(path: Path, content: str) -> None:
    with replacing(path) as hidden:
        hidden.write_text(content, encoding="utf-8")
