"""What the bundles need as models of MONAI Label, without its server (`tests/test_label_server.py` has one)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from med3d_nets import BestModel, InputError, MultiDomainNet, SegmentationNet, ServedInferer, UpdateModel, chosen
from med3d_nets.annotation import PREVIOUS
from med3d_nets.inferer import WholeVolumeInferer
from med3d_nets.uncertainty import dropout_only, uncertainty
from tests.small_training import BUNDLE, SMALL, write_dataset
from tools.label_server import prepare, start

MULTI = "med3d_multidomain_segmentation_resnet10"


class Spy(WholeVolumeInferer):
    """Remembers the network that computes."""

    def __call__(self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.network = network
        return super().__call__(inputs, network)


@pytest.fixture
def in_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monailabel", ModuleType("monailabel"))


class TestServedInferer:
    def test_a_plain_network_is_accelerated_once(self) -> None:
        net, x, spy = SegmentationNet(10, 2, "linear").eval(), torch.rand(1, 1, 32, 32, 32), Spy()
        with torch.no_grad():
            logits = ServedInferer(spy, "float32")(x, net)
            first = spy.network
            assert first is not net and torch.allclose(logits, net(x), atol=1e-3)
            ServedInferer(spy, "float32")(x, net)  # the next request has another inferer
            assert spy.network is first
            net.load_state_dict(SegmentationNet(10, 2, "linear").state_dict())
            changed = ServedInferer(spy, "float32")(x, net)
            assert spy.network is not first and torch.allclose(changed, net(x), atol=1e-3)

    def test_dropout_and_other_networks_run_as_they_are(self) -> None:
        x, spy = torch.rand(1, 1, 32, 32, 32), Spy()
        dropping = dropout_only(SegmentationNet(10, 2, "linear", dropout=0.5))
        plain = SegmentationNet(10, 2, "linear").eval()
        for network, backend in ((dropping, "torch"), (nn.Conv3d(1, 2, 1), "torch"), (plain, "tensorrt")):
            ServedInferer(spy, "float32", backend)(x, network)
            assert spy.network is network

    def test_branch(self) -> None:
        net, x = MultiDomainNet(10, {"a": 2, "b": 3}).eval(), torch.rand(1, 1, 32, 32, 32)
        with torch.no_grad():
            logits = ServedInferer(WholeVolumeInferer(), "float32", branch="b")(x, net)
            assert torch.allclose(logits, net.branch("b")(x), atol=1e-3)


def test_update_model(tmp_path: Path) -> None:
    """The best of the validation, or the last where there was none; what was there is kept."""
    net, path = nn.Linear(1, 1), tmp_path / "models" / "model.pt"
    best = BestModel(tmp_path / "best.pt", net)
    UpdateModel(path, net, best)(SimpleNamespace())
    assert torch.load(path)["weight"].equal(net.weight.detach()) and not path.with_name(PREVIOUS).exists()
    before = path.read_bytes()
    best.best = 0.5
    torch.save({"weight": torch.ones(1, 1)}, best.path)
    UpdateModel(path, net, best)(SimpleNamespace())
    assert torch.load(path)["weight"].item() == 1 and path.with_name(PREVIOUS).read_bytes() == before


def test_chosen() -> None:
    assert chosen(["a", "b"]) == "a" and chosen("b") == "b" and chosen("") == "" and chosen([]) == []


class TestUncertainty:
    def test_scores(self) -> None:
        sure = torch.zeros(2, 4, 4, 4)
        sure[1, 1:3] = 20.0
        sure[0] += 10.0
        assert uncertainty([sure, sure]) < 0.01
        assert uncertainty([sure, sure.flip(0)]) > 0.9  # they disagree
        assert uncertainty([-sure.abs() * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)]) == 1.0  # nothing is found
        with pytest.raises(ValueError, match="at least one"):
            uncertainty([])

    def test_norms_stay(self) -> None:
        net = dropout_only(SegmentationNet(10, 2, "fpn", dropout=0.3).train())
        training = {type(module).__name__ for module in net.modules() if module.training}
        assert training == {"Dropout3d"}


@pytest.mark.slow
def test_training_as_the_server_starts_it(in_server: None, tmp_path: Path) -> None:
    """Its cases in place of a folder's, and the empty run_id of 3D Slicer: the whole config is evaluated."""
    data = write_dataset(tmp_path / "data")
    root = tmp_path / "bundle"
    config = ConfigParser.load_config_file(str(BUNDLE / "configs" / "train.json"))
    cases = [{key: str(data / case[key]) for key in ("image", "label")} for case in _cases(data)]
    options = {"samples_per_epoch": 2, "batch_size": 1, "norm_batches": 1, "learning_rate": 1e-3}
    settings = {key: SMALL[key] for key in ("spacing", "patch_size", "val_window", "num_workers")}
    parts = {"train#dataset#data": cases[1:], "validate#dataset#data": [], "train#trainer#max_epochs": 1}
    shown = {**config["displayable_configs"], **options, "freeze_backbone": False, "update_model": True}
    monai.bundle.run(
        run_id="",
        meta_file=str(BUNDLE / "configs" / "metadata.json"),
        config_file=str(BUNDLE / "configs" / "train.json"),
        bundle_root=str(root),
        device="cpu",
        displayable_configs=shown,
        **settings,
        **parts,
    )
    last = torch.load(root / "runs" / "train" / "model_last.pt")
    served = torch.load(root / "models" / "model.pt")
    assert all(torch.equal(served[key], value) for key, value in last.items())


class TestPrepare:
    def test_one_domain(self, tmp_path: Path) -> None:
        copy = prepare(MULTI, str(tmp_path), "hippocampus_mr")
        assert copy.name == "med3d_hippocampus_mr_segmentation_resnet10" and (tmp_path / "main.py").is_file()
        metadata = json.loads((copy / "configs" / "metadata.json").read_text())
        pred = metadata["network_data_format"]["outputs"]["pred"]
        assert pred["channel_def"] == {"0": "background", "1": "anterior", "2": "posterior"}
        assert not list((copy / "configs").glob("*train.json"))
        (copy / "models" / "model.pt").write_bytes(b"learnt")
        prepare(MULTI, str(tmp_path), "hippocampus_mr")
        assert (copy / "models" / "model.pt").read_bytes() == b"learnt"

    @pytest.mark.parametrize(
        ("bundle", "domain", "told"),
        [
            ("lung_ct_segmentation_resnet18", "", "has no weights, models/model.pt. With weights: liver_ct"),
            ("nothing", "", "is no such bundle"),
            ("med3d_feature_extraction_resnet10", "", "does not segment"),
            (MULTI, "", "choose one, --domain hippocampus_mr"),
            (MULTI, "brain", "known are hippocampus_mr"),
            ("lung_ct_segmentation_resnet10", "liver_ct", "this bundle has none"),
        ],
    )
    def test_refused(self, bundle: str, domain: str, told: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=told):
            prepare(bundle, str(tmp_path / "app"), domain)
        assert not (tmp_path / "app").exists()

    def test_start_without_server_or_scans(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_server: None
    ) -> None:
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        monkeypatch.setattr("tools.label_server.find_spec", lambda name: None)
        with pytest.raises(InputError, match="has no MONAI Label. Run make label-server"):
            start("lung_ct_segmentation_resnet10", str(tmp_path))
        monkeypatch.setattr("tools.label_server.find_spec", lambda name: True)
        for folder, told in ((tmp_path, "holds no scan"), (tmp_path / "none", "is no folder")):
            with pytest.raises(InputError, match=told):
                start("lung_ct_segmentation_resnet10", str(folder))


def _cases(data: Path) -> list[dict[str, str]]:
    return json.loads((data / "dataset.json").read_text())["training"]
