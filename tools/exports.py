"""Which exports give each task's network, and how far they are from it: a table that is measured, not promised.

    python -m tools.exports measure       writes docs/results/exports.csv, and the table in docs/exports.md from it

TorchScript and ONNX are exported once and run at another image size too. A difference is the largest of an output's
elements, as a share of the output's largest. TensorRT needs an NVIDIA GPU: where there is an overlay for it,
``tests/test_tensorrt.py`` holds it against the network, and nothing is measured here.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fire
import onnxruntime
import torch
from torch import nn

from med3d_nets.errors import clear_errors
from med3d_nets.files import replacing
from med3d_nets.tables import csv_text
from med3d_nets.weights import load_network
from tools.bundle_folder import Bundle
from tools.bundle_run import ROOT

CSV, PAGE = ROOT / "docs" / "results" / "exports.csv", ROOT / "docs" / "exports.md"
COLUMNS = ("bundle", "weights", "form", "size", "difference", "reason")
SIZES = ((64, 64, 64), (96, 64, 80))  # the first is exported with
DYNAMIC = {axis: torch.export.Dim.DYNAMIC for axis in (2, 3, 4)}
Run = Callable[[torch.Tensor], torch.Tensor]


def measure(*bundles: str, to: str = str(CSV), page: str = str(PAGE)) -> None:
    """Export the networks of bundles, compare, and write the CSV and the table of the page.

    Args:
        bundles: folders; the ResNet-10 of every task by default.
        to: CSV file.
        page: Markdown file whose part between ``<!-- exports -->`` and ``<!-- /exports -->`` is written anew.
    """
    folders = [Path(one) for one in bundles] or sorted((ROOT / "bundles").glob("*_resnet10"))
    rows = [row for folder in folders for row in differences(folder)]
    with replacing(to) as hidden:
        hidden.write_text(csv_text(COLUMNS, rows), encoding="utf-8")
    before = Path(page).read_text(encoding="utf-8")
    marks = r"(<!-- exports -->\n).*?(<!-- /exports -->)"
    with replacing(page) as hidden:
        hidden.write_text(re.sub(marks, lambda m: f"{m[1]}{table(rows)}\n{m[2]}", before, flags=re.DOTALL))
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Make a Markdown table: a row per bundle, the largest difference over the sizes in each column."""
    lines = ["| bundle | weights | TorchScript | ONNX, onnxruntime | TensorRT overlay |", "|---|---|---|---|---|"]
    for bundle in dict.fromkeys(row["bundle"] for row in rows):
        own = [row for row in rows if row["bundle"] == bundle]
        cells = [_cell([row for row in own if row["form"] == form]) for form in ("TorchScript", "ONNX")]
        overlay = (ROOT / "bundles" / bundle / "configs" / "inference_trt.json").is_file()
        lines.append(f"| `{bundle}` | {own[0]['weights']} | {' | '.join(cells)} | {'yes' if overlay else 'no'} |")
    return "\n".join(lines)


def differences(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of the CSV for one bundle: each form at each size.

    Args:
        folder: the bundle; its shipped weights are used where there are any, random ones otherwise.
    """
    torch.manual_seed(0)
    bundle = Bundle(folder)
    network = bundle.network
    if bundle.weights:
        load_network(network, bundle.weights)
    common = {"bundle": folder.name, "weights": "shipped" if bundle.weights else "random"}
    images = [torch.rand(1, 1, *size) for size in SIZES]
    for form, export in (("TorchScript", _torchscript), ("ONNX", _onnx)):
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as place, torch.inference_mode():
            warnings.simplefilter("ignore")
            try:
                run = export(network, images[0], Path(place) / "net")
                found = [(image, _difference(run(image), network(image))) for image in images]
            except Exception as error:  # exporters raise many types, and what they say is the result
                yield {**common, "form": form, "size": "", "difference": "", "reason": _first_line(error)}
                continue
        for image, value in found:
            size = "x".join(map(str, image.shape[2:]))
            yield {**common, "form": form, "size": size, "difference": f"{value:.1e}", "reason": ""}


def _torchscript(network: nn.Module, image: torch.Tensor, path: Path) -> Run:
    torch.jit.save(torch.jit.script(network), str(path))
    return torch.jit.load(str(path))  # type: ignore[no-any-return]


def _onnx(network: nn.Module, image: torch.Tensor, path: Path) -> Run:
    program = torch.export.export(network, (image,), dynamic_shapes=({**DYNAMIC},))
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    failed = [row["reason"] for row in rows if row["reason"]]
    return f"no: {failed[0]}" if failed else f"{max(float(row['difference']) for row in rows):.0e}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"measure": measure})
