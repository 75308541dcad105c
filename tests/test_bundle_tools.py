"""The bundles' maker and checker: what is healthy passes, every fault is named, and what is committed has no drift."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch

from med3d_nets import SegmentationNet
from med3d_nets.errors import InputError
from med3d_nets.registry import DEPTHS, encoders
from tools import bundles
from tools.bundle_check import check_bundle
from tools.bundle_folder import Bundle
from tools.bundle_ship import ship
from tools.bundle_source import all_bundles

TEMPLATES = bundles.ROOT / "tools" / "templates"
NAME = "lung_ct_segmentation_resnet10"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all bundles, freshly made."""
    folder = tmp_path_factory.mktemp("made")
    bundles.make(bundles=folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of depth 10 with weights."""
    folder = tmp_path_factory.mktemp("trained")
    bundles.make(NAME, bundles=folder)
    torch.manual_seed(0)
    torch.save(Bundle(folder / NAME).network.state_dict(), folder / "float32.pt")
    bundles.ship(str(folder / "float32.pt"), NAME, folder)
    bundles.make(NAME, bundles=folder)
    return folder


def copy_of(folder: Path, to: Path, name: str = NAME) -> Path:
    return Path(shutil.copytree(folder / NAME, to / name))


def listed(folder: Path) -> list[str]:
    return [str(fault) for fault in check_bundle(folder, fast=True)]


class TestMake:
    def test_every_depth_is_made_of_one_template(self, made: Path) -> None:
        for depth, record in DEPTHS.items():
            bundle = Bundle(made / f"lung_ct_segmentation_resnet{depth}")
            assert bundle.network_defs["inference"]["depth"] == bundle.network_defs["train"]["depth"] == depth
            assert bundle.metadata["name"].endswith(f"ResNet-{depth}")
            assert bundle.metadata["network_parameters"] > record.encoder_parameters
            urls = re.findall(r'url: "(.*)"', bundle.text("large_files.yml"))
            assert urls == [weight.url for weight in encoders(depth)]
            other = {f"resnet{d}" for d in DEPTHS} - {f"resnet{depth}"}
            assert not other & set(re.findall(r"_(resnet\d+)/", bundle.text("docs/README.md")))

    def test_making_again_changes_nothing(self, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
        bundles.make(bundles=made)
        assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
        bundles.make(check=True, bundles=made)
        assert "0 files differ" in capsys.readouterr().out

    def test_check_names_what_differs_and_writes_nothing(
        self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = copy_of(made, tmp_path)
        (folder / "configs" / "train.json").write_text("{}")
        (folder / "LICENSE").unlink()
        (folder / "docs" / "old.md").write_text("old")
        with pytest.raises(SystemExit) as exit:
            bundles.make(NAME, check=True, bundles=tmp_path)
        assert exit.value.code not in (0, None)
        out = capsys.readouterr().out.replace(f"{folder}/", "")
        assert out.splitlines() == [
            "LICENSE: missing",
            "configs/train.json: differs",
            "docs/old.md: no source makes it",
        ]
        assert (folder / "configs" / "train.json").read_text() == "{}"
        assert (folder / "docs" / "old.md").exists() and not (folder / "LICENSE").exists()

    def test_repairs_and_removes_but_leaves_weights_data_and_runs(self, made: Path, tmp_path: Path) -> None:
        folder = copy_of(made, tmp_path)
        kept = [
            folder / "models" / "resnet_10.pth",
            folder / "data" / "ct.nii",
            folder / "runs" / "train" / "model.pt",
        ]
        for path in kept:
            path.parent.mkdir(parents=True)
            path.write_bytes(b"mine")
        (folder / "scripts").mkdir()
        (folder / "scripts" / "net.py").write_text("old")
        (folder / "LICENSE").write_text("edited")
        bundles.make(NAME, bundles=tmp_path)
        assert all(path.read_bytes() == b"mine" for path in kept)
        assert not (folder / "scripts").exists()
        assert (folder / "LICENSE").read_bytes() == (bundles.ROOT / "LICENSE").read_bytes()

    def test_a_bundle_without_template_is_named(self, made: Path, tmp_path: Path, capsys) -> None:
        shutil.copytree(made, tmp_path / "all")
        (tmp_path / "all" / "forgotten_segmentation_resnet10").mkdir()
        with pytest.raises(SystemExit):
            bundles.make(check=True, bundles=tmp_path / "all")
        assert "forgotten_segmentation_resnet10: no template makes this bundle" in capsys.readouterr().out

    def test_unknown_name_is_refused_with_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"resnet11: no such bundle.*{NAME}"):
            bundles.make("lung_ct_segmentation_resnet11", bundles=tmp_path)
        assert not list(tmp_path.iterdir())

    def test_depth_table_and_model_card(self, trained: Path, tmp_path: Path) -> None:
        task = tmp_path / "templates" / "lung_ct_segmentation"
        shutil.copytree(TEMPLATES / "lung_ct_segmentation", task)
        (task / "docs" / "README.md").write_text(
            "<!-- trained -->\nSCORES_TABLE\n<!-- /trained -->\n<!-- untrained -->\nnone; trained is TRAINED_BUNDLES\n"
            "<!-- /untrained -->\nresnet101 stays, resnet10 and resnet_10_23dataset.pth do not\n"
        )
        record = {"version": "0.2.0", "changelog": {"0.2.0": "new"}, "eval_metrics": {"mean_dice": 0.975}}
        (task / "depths.json").write_text(json.dumps({"10": record}))
        shutil.copytree(trained / NAME, tmp_path / "out" / NAME)
        bundles.make(NAME, NAME.replace("10", "152"), templates=task.parent, bundles=tmp_path / "out")
        ten, big = Bundle(tmp_path / "out" / NAME), Bundle(tmp_path / "out" / NAME.replace("10", "152"))
        assert record.items() <= ten.metadata.items()
        assert "| mean dice | 0.975 |" in ten.text("docs/README.md") and "none" not in ten.text("docs/README.md")
        assert big.metadata["version"] != "0.2.0" and "weights_sha256" not in big.metadata
        assert big.text("docs/README.md") == (
            f"none; trained is `{NAME}`\nresnet101 stays, resnet152 and resnet_152.pth do not\n"
        )
        assert not (tmp_path / "out" / NAME / "depths.json").exists()

    def test_unclosed_mark_is_refused(self, tmp_path: Path) -> None:
        task = tmp_path / "templates" / "lung_ct_segmentation"
        shutil.copytree(TEMPLATES / "lung_ct_segmentation", task)
        (task / "docs" / "README.md").write_text("<!-- trained -->\nscores\n")
        with pytest.raises(InputError, match=r"README.md.*without its partner"):
            bundles.make(NAME, templates=task.parent, bundles=tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestShip:
    def test_half_precision_where_it_does_no_harm(self, trained: Path) -> None:
        full = torch.load(trained / "float32.pt", weights_only=True)
        small = torch.load(trained / NAME / "models" / "model.pt", weights_only=True)
        assert list(full) == list(small)
        for key, value in small.items():
            floating = full[key].is_floating_point()
            assert value.dtype == (torch.float16 if floating and value.ndim > 1 else full[key].dtype), key
            assert torch.equal(value.float(), full[key].to(value.dtype).float()), key
        assert {p.name for p in (trained / NAME / "models").iterdir()} == {"model.pt"}

    def test_weights_of_another_depth_are_refused(self, trained: Path, made: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(made / NAME.replace("10", "18"), tmp_path / NAME.replace("10", "18")))
        with pytest.raises(InputError, match=r"ResNet-10.*ResNet-18"):
            ship(trained / "float32.pt", folder)
        assert not (folder / "models").exists()

    def test_too_large_or_not_finite_leaves_the_old_file(self, trained: Path, tmp_path: Path) -> None:
        folder = copy_of(trained, tmp_path)
        before = (folder / "models" / "model.pt").read_bytes()
        with pytest.raises(InputError, match="at most 5 MB"):
            ship(trained / "float32.pt", folder, max_mb=5)
        state = torch.load(trained / "float32.pt", weights_only=True)
        state["backbone.conv1.weight"][0, 0, 0, 0, 0] = 1e6  # infinite in half precision
        torch.save(state, tmp_path / "huge.pt")
        with pytest.raises(InputError, match=r"1 tensors are not finite.*backbone.conv1.weight"):
            ship(tmp_path / "huge.pt", folder)
        assert (folder / "models" / "model.pt").read_bytes() == before
        assert len(list((folder / "models").iterdir())) == 1


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A mutation of ``configs/NAME.json``."""

    def mutate(folder: Path) -> None:
        path = folder / "configs" / f"{name}.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return mutate


def put(name: str, id: str, value: Any) -> Callable[[Path], None]:
    """Set one value of a config, by id."""
    *parents, last = id.split("#")

    def change(content: Any) -> None:
        for key in parents:
            content = content[int(key) if isinstance(content, list) else key]
        content[last] = value

    return edit(name, change)


def drop(name: str, *ids: str) -> Callable[[Path], None]:
    """Remove values of a config."""

    def change(content: Any) -> None:
        for id in ids:
            *parents, last = id.split("#")
            owner = content
            for key in parents:
                owner = owner[key]
            del owner[last]

    return edit(name, change)


def text(path: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace text in a file."""

    def mutate(folder: Path) -> None:
        content = (folder / path).read_text()
        assert old in content
        (folder / path).write_text(content.replace(old, new))

    return mutate


def remove(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


OUT = "network_data_format#outputs#pred"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model card": (remove("docs/README.md"), r"docs/README.md: this required file is missing"),
    "no training config": (
        remove("configs/train.json"),
        r"configs/train.json: this preferred file is missing",
    ),
    "empty data licence": (
        lambda f: (f / "docs/data_license.txt").write_text("\n"),
        r"data_license.txt: .*is empty",
    ),
    "scripts folder": (lambda f: (f / "scripts").mkdir(), r"scripts: a folder of code"),
    "other licence": (lambda f: (f / "LICENSE").write_text("MIT License"), r"LICENSE: not the whole text"),
    "broken JSON": (
        lambda f: (f / "configs/evaluate.json").write_text('{"a": 1,}'),
        r"evaluate.json: no valid JSON",
    ),
    "key twice": (
        lambda f: (f / "configs/train.json").write_text('{"a": 1, "a": 2}'),
        r"train.json: .*twice.* a\b",
    ),
    "JSON list": (lambda f: (f / "configs/metadata.json").write_text("[]"), r"metadata.json: holds a list"),
    "authors a list": (put("metadata", "authors", ["A"]), r"at authors: \['A'\] is not of type 'string'"),
    "no copyright": (drop("metadata", "copyright"), r"'copyright' is a required property"),
    "no tensor format": (drop("metadata", f"{OUT}#format"), r"at network_data_format#outputs#pred: 'format'"),
    "version 10": (put("metadata", "version", "0.10.0"), r"version '0.10.0'.*sorts versions as strings"),
    "no changelog entry": (put("metadata", "version", "0.9.0"), r"changelog has no entry '0.9.0'"),
    "unknown package": (
        put("metadata", "required_packages_version#medinet", "1.0"),
        r"medinet, which is not installed",
    ),
    "stale package version": (
        put("metadata", "required_packages_version#med3d_nets", "0.0.1"),
        r"has med3d_nets 0.0.1, the package is",
    ),
    "channel undefined": (drop("metadata", f"{OUT}#channel_def#2"), r"has 3 channels, channel_def has 0, 1;"),
    "score without weights": (
        put("metadata", "eval_metrics", {"dice": 0.9}),
        r"eval_metrics of weights that are not",
    ),
    "hash without weights": (
        put("metadata", "weights_sha256", "0" * 64),
        r"weights_sha256 is 0{64}, .* is None",
    ),
    "parameter count": (
        put("metadata", "network_parameters", 1),
        r"network_parameters is 1, the network has \d{8}",
    ),
    "output channels": (
        put("metadata", f"{OUT}#num_channels", 2),
        r"num_channels is 2 .*the network gives 3",
    ),
    "output size": (
        put("metadata", f"{OUT}#spatial_shape", ["16+n", "16+n", "8+n"]),
        r"spatial_shape is \(17, 19, 13\) .*the network gives \(17, 19, 21\)",
    ),
    "output dtype": (
        put("metadata", f"{OUT}#dtype", "float16"),
        r"dtype is float16 .*the network gives float32",
    ),
    "input channels": (
        put("metadata", "network_data_format#inputs#image#num_channels", 2),
        r"the network does not take the image described there",
    ),
    "no evaluator": (
        drop("inference", "evaluator", "dataset"),
        r"inference.json: no dataset, .*\n.*no evaluator, the",
    ),
    "no epochs": (
        drop("train", "train#trainer#max_epochs"),
        r"train.json: no train#trainer#max_epochs, the required",
    ),
    "nothing to run": (drop("evaluate", "run"), r"evaluate.json: no run;"),
    "depth of the name": (
        put("evaluate", "network_def#depth", 18),
        r"evaluate.json: network_def has depth 18 in",
    ),
    "another head": (
        put("train", "network_def#head", "linear"),
        r"network_def#head is 'linear', in inference.json 'fpn'",
    ),
    "no guard": (
        drop("inference", "network_def#_requires_"),
        r"inference.json: network_def has no _requires_",
    ),
    "network cannot be built": (
        put("inference", "network_def#depth", 11),
        r"network_def cannot be built \(.*\b11\b",
    ),
    "unknown class": (
        put("inference", "inferer#_target_", "SlidingInferer"),
        r"inferer: there is no SlidingInferer",
    ),
    "unknown argument": (
        put("train", "loss#soft_max", True),
        r"loss: monai\S*DiceCELoss does not .*'soft_max'",
    ),
    "dangling reference": (
        put("train", "train#trainer#network", "@net"),
        r"train#trainer|train::trainer.*@net refers",
    ),
    "import left out": (
        edit("train", lambda c: c["imports"].remove("$import med3d_nets")),
        r"train.json: imports has no .*med3d_nets'(.|\n)*unknown name med3d_nets",
    ),
    "import that fails": (
        edit("inference", lambda c: c["imports"].append("$import medinet")),
        r"No module named 'medinet",
    ),
    "unknown function": (put("inference", "run", ["$med3d_nets.go(@evaluator)"]), r"med3d_nets has no go in"),
    "function misused": (
        put("evaluate", "dataset#data", "$med3d_nets.read_datalist()"),
        r"read_datalist does not take",
    ),
    "no Python": (put("inference", "run", ["$@evaluator.run("]), r"run::0: .* is no Python"),
    "overlay without effect": (
        edit("multi_gpu_train", lambda c: c.update({"train#samplr": 1, "optimiser#lr": 1})),
        r"multi_gpu_train.json: train#samplr changes nothing.*\n.*: optimiser#lr changes nothing",
    ),
    "absolute path": (
        put("train", "dataset_dir", "/workspace/data"),
        r"dataset_dir holds .* '/workspace/data'",
    ),
    "absolute path in code": (
        put("train", "dataset_dir", "$'/data' + '/ct'"),
        r"holds the absolute path '/data'",
    ),
    "home folder": (put("evaluate", "output_dir", "~/out"), r"absolute path '~/out'"),
    "macro": (
        put("evaluate", "network_def", "%configs/inference.json#network_def"),
        r"network_def is the macro",
    ),
    "hash not typed": (
        text("large_files.yml", '    hash_type: "sha256"\n', ""),
        r"resnet_10.pth: no hash_type",
    ),
    "hash changed": (
        text("large_files.yml", "2824951e", "00000000"),
        r"resnet_10.pth: url or hash is not that of",
    ),
    "no YAML": (
        lambda f: (f / "large_files.yml").write_text("large_files: [}"),
        r"large_files.yml: no YAML list",
    ),
    "logging handler": (
        text("configs/logging.conf", "class=StreamHandler", "class=rich.logging.RichHandler"),
        r"RichHand",
    ),
    "command's file": (
        text("docs/README.md", "configs/train.json", "configs/training.json"),
        r"training.json, which does",
    ),
    "command's key": (
        text("docs/README.md", "--dataset_dir", "--data_dir"),
        r"README.md: data_dir is no key of",
    ),
    "command's weights": (
        text("docs/README.md", "resnet_10_23dataset", "resnet_18"),
        r"resnet_18: no released",
    ),
}


class TestCheck:
    def test_healthy_without_weights(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        bundles.check(str(copy_of(made, tmp_path)))
        assert "1 bundles, no faults" in capsys.readouterr().out

    def test_healthy_with_weights(self, trained: Path) -> None:
        assert [str(fault) for fault in check_bundle(trained / NAME)] == []
        assert "no trained weights" not in (trained / NAME / "docs" / "README.md").read_text()

    def test_monai_agrees_on_the_healthy_bundle(self, made: Path) -> None:
        configs = made / NAME / "configs"
        monai.bundle.verify_net_in_out(
            "network_def",
            meta_file=str(configs / "metadata.json"),
            config_file=str(configs / "inference.json"),
        )

    @pytest.mark.parametrize("case", BROKEN)
    def test_broken(self, case: str, made: Path, tmp_path: Path) -> None:
        mutate, expected = BROKEN[case]
        folder = copy_of(made, tmp_path)
        mutate(folder)
        report = "\n".join(listed(folder))
        assert re.search(expected, report), report

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("lung_ct_vessel_segmentation_resnet10", "holds _v"),
            ("lung_ct_resnet10", "tells no task"),
            ("lung_ct_segmentation_detection_resnet10", "tells no task"),
            ("lung_ct_segmentation", "tells no depth"),
            ("lung_ct_segmentation_resnet50", "has depth 10 in the bundle"),
        ],
    )
    def test_names(self, name: str, expected: str, made: Path, tmp_path: Path) -> None:
        assert expected in "\n".join(listed(copy_of(made, tmp_path, name)))

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda state: {"state_dict": state}, "is wrapped"),
            (lambda state: {f"module.{key}": value for key, value in state.items()}, "is wrapped"),
            (lambda state: dict(list(state.items())[1:]), "1 missing"),
            (lambda state: {**state, "head.extra": torch.zeros(1)}, "1 unexpected"),
            (
                lambda state: {**state, "backbone.bn1.bias": torch.full((64,), torch.nan)},
                "1 with NaN or infinity",
            ),
            (lambda state: {**state, "net": Path}, "weights_only=True"),
        ],
        ids=["wrapped", "prefixed", "missing key", "additional key", "NaN", "pickled class"],
    )
    def test_weights(self, change: Callable[[Any], Any], expected: str, trained: Path, tmp_path: Path) -> None:
        folder = copy_of(trained, tmp_path)
        path = folder / "models" / "model.pt"
        torch.save(change(torch.load(path, weights_only=True)), path)
        faults = listed(folder)
        assert any(fault.startswith("models/model.pt") and expected in fault for fault in faults), faults
        assert any("weights_sha256 is" in fault for fault in faults)

    def test_weights_too_large(self, trained: Path, tmp_path: Path) -> None:
        folder = copy_of(trained, tmp_path)
        shutil.copy(trained / "float32.pt", folder / "models" / "model.pt")
        assert any("at most 50 MB" in fault for fault in listed(folder))

    def test_code_that_torchscript_does_not_take(self, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = SegmentationNet.forward
        monkeypatch.setattr(SegmentationNet, "forward", lambda self, *images: forward(self, *images))
        (fault,) = check_bundle(made / NAME)
        assert str(fault).startswith("configs/inference.json: TorchScript export fails (")

    def test_every_fault_at_once(self, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = copy_of(made, tmp_path)
        cases = [
            "other licence",
            "version 10",
            "no epochs",
            "dangling reference",
            "output size",
            "logging handler",
        ]
        for case in cases:
            BROKEN[case][0](folder)
        with pytest.raises(SystemExit) as exit:
            bundles.check(str(folder), str(tmp_path / "absent"), fast=True)
        assert exit.value.code == "2 bundles, 11 faults"  # two more: what refers to the epochs that are not there
        report = capsys.readouterr().out
        assert all(re.search(BROKEN[case][1], report) for case in cases), report
        assert "no such folder" in report

    def test_a_folder_that_is_no_bundle_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        faults = listed(tmp_path / "empty")
        assert len([fault for fault in faults if "required file is missing" in fault]) == 4

    def test_no_folder_is_refused(self) -> None:
        with pytest.raises(InputError, match="No folder given"):
            bundles.check()


class TestCommitted:
    def test_no_drift(self, capsys: pytest.CaptureFixture[str]) -> None:
        bundles.make(check=True)
        assert "0 files differ" in capsys.readouterr().out

    def test_all_are_there(self) -> None:
        assert {path.name for path in (bundles.ROOT / "bundles").iterdir()} == set(all_bundles(TEMPLATES))
