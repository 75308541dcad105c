"""The overlay for TensorRT, as far as it goes without a GPU: it parses, fits its base, tells what is missing."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks import trt_compiler

from med3d_nets import EmbeddingNet, InputError, SegmentationNet, tensorrt_net, with_tensorrt
from tests import bundle_runs
from tests.bundle_runs import refusal, small_scan, write_volume

ROOT = Path(__file__).parents[1]
TASKS = {
    "lung_ct_segmentation": {},
    "liver_ct_segmentation": {"network": "$@network_def.eval()"},  # ships no weights
    "med3d_multidomain_segmentation": {"domain": "liver_ct"},
    "med3d_feature_extraction": {},
}


@pytest.fixture(params=TASKS)
def parser(request: pytest.FixtureRequest) -> ConfigParser:
    """inference.json with the overlay, as ``monai.bundle run`` merges them."""
    folder = ROOT / "bundles" / f"{request.param}_resnet10"
    base, overlay = (
        json.loads((folder / f"configs/{name}.json").read_text()) for name in ("inference", "inference_trt")
    )
    assert set(overlay) - set(base) == {"trt_args"}
    parser = ConfigParser(base | overlay)
    parser.update({"bundle_root": str(folder), "device": torch.device("cpu")} | TASKS[request.param])
    return parser


def test_the_evaluator_runs_what_the_overlay_makes(parser: ConfigParser, monkeypatch: pytest.MonkeyPatch) -> None:
    """With trt_compile replaced: network, weights' file and arguments as MONAI and the encoder take them."""
    seen: dict[str, Any] = {}

    def compile(model: torch.nn.Module, base_path: str, **more: Any) -> torch.nn.Module:
        seen.update(model=model, base_path=base_path, **more)
        return model

    monkeypatch.setattr(tensorrt_net, "trt_compile", compile)
    monkeypatch.setattr(tensorrt_net, "_missing", list)
    if "weights_file" in parser:  # released weights are not here
        parser.update({"weights_file": "encoder.pth", "network": EmbeddingNet(10)})
    network = parser.get_parsed_content("inference_network")
    assert parser["evaluator"]["network"] == "@inference_network" and parser.get_parsed_content("amp") is False
    weights = parser.get_parsed_content("weights_file" if "weights_file" in parser else "weights")
    assert seen.keys() == {"model", "base_path", "args", "submodule"}
    assert seen["model"] is network and seen["base_path"] == weights
    assert seen["args"].keys() <= inspect.signature(trt_compiler.TrtCompiler.__init__).parameters.keys()
    encoder = network.get_submodule(seen["submodule"])
    (profile,) = seen["args"]["input_profiles"]
    assert list(profile) == list(inspect.signature(encoder.forward).parameters)
    least, usual, most = profile["x"]
    assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    assert len(encoder(torch.zeros(least))) == 5


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with the overlay ends where MONAI would go on without TensorRT."""
    monkeypatch.setattr(tensorrt_net, "find_spec", lambda name: None)
    scan = write_volume(tmp_path / "scan.nii.gz", *small_scan())
    configs = [str(bundle_runs.BUNDLE / "configs" / f"{name}.json") for name in ("inference", "inference_trt")]
    told = refusal(scan, tmp_path / "out", config_file=configs)
    assert "inference_trt.json: TensorRT cannot run here. Missing: " in told and "the package tensorrt" in told
    assert "run without this overlay" in told and "Traceback" not in told
    assert not list((tmp_path / "out").glob("*_seg*"))


def test_everything_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt_net, "find_spec", lambda name: ModuleType(name) if name == "onnx" else None)
    with pytest.raises(
        InputError, match="an NVIDIA GPU that PyTorch sees, the package tensorrt, the package polygraphy"
    ):
        with_tensorrt(SegmentationNet(10, 2), "model.pt", {})
