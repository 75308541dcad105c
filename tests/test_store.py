"""Weights on this machine: where they lie, and that they are what the registry says."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from med3d_nets import DEPTHS, InputError, Med3DResNet, load_backbone
from med3d_nets.registry import WEIGHTS, encoders
from med3d_nets.weights import resolve, store, verify, where

ROOT = Path(__file__).resolve().parents[1]
OWN = "lung_ct_segmentation_resnet10"
CONTENT = b"not a checkpoint, which nothing here reads"


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(WEIGHTS["resnet_10"], size=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(WEIGHTS, "resnet_10", record)
    monkeypatch.setenv("MED3D_HOME", str(tmp_path / "store"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.setattr(store.importlib.util, "find_spec", lambda _: None)


def _put(path: Path, content: bytes = CONTENT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class TestRegistry:
    def test_own_weights_are_those_of_the_bundle(self) -> None:
        own = [weight for weight in WEIGHTS.values() if weight.path]
        shipped = sorted((ROOT / "bundles").glob("*/models/model.pt"))
        assert [ROOT / weight.path for weight in own] == shipped
        for weight in own:
            bundle = (ROOT / weight.path).parents[1]
            metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
            assert weight.sha256 == metadata["weights_sha256"]
            assert weight.size == (ROOT / weight.path).stat().st_size
            assert weight.name.endswith(f"resnet{weight.depth}") and bundle.name.endswith(f"resnet{weight.depth}")
            assert verify(ROOT / weight.path, weight.name) is weight

    @pytest.mark.parametrize(
        "name",
        [
            OWN,
            "liver_ct_segmentation_resnet10",
            "lung_nodule_ct_classification_resnet10",
            "lung_nodule_ct_detection_resnet10",
            "med3d_real8_resnet10",
        ],
    )
    def test_own_weights_load(self, name: str) -> None:
        record = WEIGHTS[name]
        account = load_backbone(Med3DResNet(record.depth, record.shortcut), name)
        assert len(account.loaded) == DEPTHS[record.depth].tensors and account.head

    def test_encoders(self) -> None:
        assert [weight.name for weight in encoders(10)] == ["resnet_10", "resnet_10_23dataset"]
        assert len(encoders()) == 11
        assert all(weight.data_licence and weight.kind == "encoder" for weight in encoders())

    def test_each_record_has_a_file_name_of_its_own(self) -> None:
        assert len({weight.file for weight in WEIGHTS.values()}) == len(WEIGHTS)
        assert WEIGHTS[OWN].file == f"{OWN}.pt" and WEIGHTS["resnet_34"].file == "resnet_34.pth"


class TestPlaces:
    def test_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert where("resnet_10") == tmp_path / "store" / "resnet_10.pth"
        monkeypatch.setenv("MED3D_HOME", "~/med3d")
        assert where("resnet_10") == Path.home() / "med3d" / "resnet_10.pth"
        monkeypatch.delenv("MED3D_HOME")
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        assert where(OWN) == tmp_path / "hub" / "med3d" / f"{OWN}.pt"

    def test_nowhere(self) -> None:
        assert store.find("resnet_10") is None

    def test_the_store_before_the_clone(self) -> None:
        assert store.find(OWN) == ROOT / WEIGHTS[OWN].path
        path = _put(where(OWN))
        assert store.find(OWN) == path

    def test_hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        record = WEIGHTS["resnet_10_23dataset"]
        snapshot = f"models--{record.repository.replace('/', '--')}/snapshots/{record.revision}"
        cached = _put(tmp_path / "hub" / snapshot / record.file)
        monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path / "hub"))
        assert store.find("resnet_10_23dataset") == cached
        assert store.find("resnet_10") is None
        assert store.find(OWN) == ROOT / WEIGHTS[OWN].path
        assert store.find("resnet_10_23dataset") == cached
        own = _put(where("resnet_10_23dataset"))
        assert store.find("resnet_10_23dataset") == own


class _Hub:
    """The one function of huggingface_hub that is used, on its cache's layout."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def try_to_load_from_cache(self, repo_id: str, filename: str, *, revision: str) -> str | object | None:
        folder = self.cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        if not folder.is_dir():
            return None
        return str(folder / filename) if (folder / filename).is_file() else object()


class TestVerify:
    def test_by_name_and_by_hash(self, tmp_path: Path) -> None:
        path = _put(tmp_path / "any.bin")
        assert verify(path, "resnet_10") is verify(str(path)) is WEIGHTS["resnet_10"]

    @pytest.mark.parametrize(
        "content, words",
        [
            (CONTENT[:-1], f"it has {len(CONTENT) - 1} bytes instead of {len(CONTENT)}, so it is incomplete"),
            (CONTENT + b"!", "so it is another file"),
            (CONTENT.upper(), f"its sha256 is {hashlib.sha256(CONTENT.upper()).hexdigest()} instead of"),
            (b"<html>", "it is an HTML or XML page"),
            (b"", "it has 0 bytes"),
        ],
    )
    def test_wrong_content(self, content: bytes, words: str, tmp_path: Path) -> None:
        path = _put(tmp_path / "resnet_10.pth", content)
        with pytest.raises(InputError, match="is not resnet_10: ") as error:
            verify(path, "resnet_10")
        assert words in str(error.value)
        with pytest.raises(InputError, match="is no file of the registry; by its name it should be") as error:
            verify(path)
        assert words in str(error.value)

    def test_unknown(self, tmp_path: Path) -> None:
        path = _put(tmp_path / "mine.pth", b"mine")
        with pytest.raises(InputError, match=f"its sha256 is {hashlib.sha256(b'mine').hexdigest()}"):
            verify(path)
        with pytest.raises(InputError, match=r"none\.pth: no such file"):
            verify(tmp_path / "none.pth")
        with pytest.raises(InputError, match="neither a weights file"):
            verify(path, "resnet_11")


class TestResolve:
    def test_a_file_is_itself(self, tmp_path: Path) -> None:
        path = _put(tmp_path / "mine.pth", b"mine")
        assert resolve(path) == resolve(str(path)) == path

    def test_a_name(self) -> None:
        path = _put(where("resnet_10"))
        assert resolve("resnet_10") == path

    def test_a_folder_of_that_name_is_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "resnet_10").mkdir()
        monkeypatch.chdir(tmp_path)
        path = _put(where("resnet_10"))
        assert resolve("resnet_10") == path

    def test_a_damaged_file(self) -> None:
        path = _put(where("resnet_10"), CONTENT[:-1])
        with pytest.raises(InputError, match=r"incomplete.*weights fetch resnet_10 gets it anew") as error:
            resolve("resnet_10")
        assert str(path) in str(error.value)

    def test_is_fetched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _put(tmp_path / "share" / "resnet_10.pth")
        monkeypatch.setenv("MED3D_WEIGHTS_URL", str(tmp_path / "share"))
        assert resolve("resnet_10") == where("resnet_10")
        assert where("resnet_10").read_bytes() == CONTENT

    @pytest.mark.parametrize(
        "name, close",
        [
            ("resnet_10_23datasets", "Is it resnet_10_23dataset"),
            ("ResNet-50", "Is it resnet_50"),
            ("resnet_34.pth", "Is it resnet_34"),
            ("models/resnet_200.pth", "Is it resnet_200"),
            ("zzz", "registry. All names"),
        ],
    )
    def test_neither(self, name: str, close: str) -> None:
        with pytest.raises(InputError) as error:
            resolve(name)
        assert f"{name}: neither" in str(error.value) and close in str(error.value)
        assert "python -m med3d_nets.weights list" in str(error.value)
