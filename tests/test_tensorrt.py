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

from med3d_nets import (
    ClassificationNet,
    ClassifierEnsemble,
    EmbeddingNet,
    InputError,
    SegmentationNet,
    tensorrt_net,
    with_tensorrt,
)
from tests import bundle_runs
from tests.bundle_runs import refusal, small_scan, write_volume

ROOT = Path(__file__).parents[1]
UNTRAINED = {"network": "$@network_def.eval()"}  # these ship no weights
TASKS: dict[str, dict[str, Any]] = {
    "lung_ct_segmentation": {},
    "liver_ct_segmentation": UNTRAINED,
    "med3d_multidomain_segmentation": {"domain": "liver_ct"},
    "med3d_feature_extraction": {"network": EmbeddingNet(10)},
    "lung_nodule_ct_classification": {},
    "lung_nodule_ct_detection": UNTRAINED,
    "volume_classification": {"network": ClassificationNet(10, 2)},
}


@pytest.fixture(params=TASKS)
def parser(request: pytest.FixtureRequest) -> ConfigParser:
    """inference.json with the overlay, as ``monai.bundle run`` merges them."""
    folder = ROOT / "bundles" / f"{request.param}_resnet10"
    base, overlay = (
        json.loads((folder / f"configs/{name}.json").read_text()) for name in ("inference", "inference_trt")
    )
    assert set(overlay) - set(base) == {"trt_args"} and base["evaluator"]["network"] == "@inference_network"
    parser = ConfigParser(base | overlay)
    parser.update({"bundle_root": str(folder), "device": torch.device("cpu")} | TASKS[request.param])
    return parser


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trt_compile, replaced, was called with."""
    calls: list[dict[str, Any]] = []

    def compile(model: torch.nn.Module, base_path: str, **more: Any) -> torch.nn.Module:
        calls.append({"model": model, "base_path": base_path, **more})
        return model

    monkeypatch.setattr(tensorrt_net, "trt_compile", compile)
    monkeypatch.setattr(tensorrt_net, "_missing", list)
    return calls


def test_the_evaluator_runs_what_the_overlay_makes(
    parser: ConfigParser, compiled: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Network, weights' file and arguments as MONAI and the encoder take them."""
    key = "weights_file" if "weights_file" in parser else "weights"
    weights = Path(parser.get_parsed_content(key) if key == "weights" else "")
    if not weights.is_file():
        weights = tmp_path / "model.pt"
        weights.touch()
        parser.update({key: str(weights)})
    network = parser.get_parsed_content("inference_network")
    assert parser.get_parsed_content("amp") is False
    (seen,) = compiled
    assert seen.keys() == {"model", "base_path", "args", "submodule"}
    assert seen["model"] in list(network.modules()) and seen["base_path"].startswith(f"{weights}.")
    assert seen["args"]["timestamp"] == int(weights.stat().st_mtime)  # a newer file makes a new engine
    assert seen["args"].keys() <= inspect.signature(trt_compiler.TrtCompiler.__init__).parameters.keys()
    encoder = seen["model"].get_submodule(seen["submodule"])
    (profile,) = seen["args"]["input_profiles"]
    assert list(profile) == list(inspect.signature(encoder.forward).parameters)
    least, usual, most = profile["x"]
    assert all(a <= b <= c for a, b, c in zip(least, usual, most, strict=True))
    assert len(encoder(torch.zeros(least))) == 5


def test_each_member_of_an_ensemble_has_its_own_engine(compiled: list[dict[str, Any]], tmp_path: Path) -> None:
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file in files:
        file.touch()
    ensemble = ClassifierEnsemble([ClassificationNet(10, 2) for _ in files])
    copied = with_tensorrt(ensemble, [str(file) for file in files], {})
    assert [call["base_path"].rpartition(".")[0] for call in compiled] == [str(file) for file in files]
    assert [call["model"] for call in compiled] == list(copied.networks)
    assert copied.networks[0] is not ensemble.networks[0]  # whose gradients Grad-CAM needs


def test_an_engine_is_of_one_network_and_one_precision(compiled: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same weights at another stride, or in another precision, must not find the first engine."""
    weights = tmp_path / "model.pt"
    weights.touch()
    for stride, precision in ((32, "fp16"), (32, "fp16"), (8, "fp16"), (32, "fp32")):
        with_tensorrt(EmbeddingNet(10, output_stride=stride), weights, {"precision": precision})
    names = [call["base_path"] for call in compiled]
    assert names[0] == names[1] and len(set(names)) == 3


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
