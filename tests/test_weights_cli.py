"""The command line of the weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fire
import pytest
import torch

from med3d_nets import InputError, Med3DResNet, SegmentationNet
from med3d_nets.registry import WEIGHTS
from med3d_nets.weights import where
from med3d_nets.weights.__main__ import COMMANDS
from tests.weights_server import NAME, PAGE, tiny_checkpoint, tiny_record

ROOT = Path(__file__).resolve().parents[1]
OWN = "lung_ct_segmentation_resnet10"
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MED3D_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("MED3D_WEIGHTS_URL", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process and give what it prints."""

    def printed(*command: str) -> str:
        fire.Fire(COMMANDS, command=list(command))
        return capsys.readouterr().out.rstrip("\n")

    return printed


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small resnet_10.pth in a folder that is a source."""
    content = tiny_checkpoint()
    monkeypatch.setitem(WEIGHTS, NAME, tiny_record(content))
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / f"{NAME}.pth").write_bytes(content)
    monkeypatch.setenv("MED3D_WEIGHTS_URL", str(tmp_path / "share"))
    return tmp_path / "share" / f"{NAME}.pth"


class TestList:
    def test_table(self, run: Run) -> None:
        lines = run("list").splitlines()
        assert " ".join(lines[0].split()) == "name kind depth shortcut stride datasets licence size sha256 present"
        rows = {line.split()[0]: " ".join(line.split()) for line in lines[1:]}
        assert list(rows) == list(WEIGHTS)
        assert rows["resnet_18_23dataset"] == "resnet_18_23dataset encoder 18 A 8 23, unknown MIT 132.0 MB 61224f93 no"
        assert rows["resnet_152"].endswith("MIT unknown e96c459f no")
        assert "8, brain tumour, …" in rows["resnet_50"]
        assert rows[OWN].split()[1] == "network" and rows[OWN].endswith("yes")
        assert len({line.index(line.split()[-2]) for line in lines[1:]}) == 1  # the hashes are below each other

    def test_json(self, run: Run) -> None:
        records = {record["name"]: record for record in json.loads(run("list", "--json"))}
        assert list(records) == list(WEIGHTS)
        for name, record in records.items():
            known = WEIGHTS[name]
            assert (record["sha256"], record["size"], record["url"]) == (known.sha256, known.size, known.url)
            assert tuple(record["datasets"]) == known.datasets and record["data_licence"] == known.data_licence
        assert records["resnet_10"]["found"] is None
        assert records[OWN]["found"] == str(ROOT / WEIGHTS[OWN].path)


class TestFiles:
    def test_fetch_where_verify(self, run: Run, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
        fire.Fire(COMMANDS, command=["where", NAME])
        out, err = capsys.readouterr()
        assert out.strip() == str(where(NAME)) and f"weights fetch {NAME}" in err
        assert run("fetch", NAME, OWN).splitlines() == [str(where(NAME)), str(ROOT / WEIGHTS[OWN].path)]
        assert where(NAME).read_bytes() == tiny.read_bytes()
        assert run("where", NAME) == str(where(NAME))
        digest = hashlib.sha256(tiny.read_bytes()).hexdigest()
        assert run("verify", str(where(NAME))) == f"{where(NAME)}: is {NAME}, sha256 {digest}"
        assert run("verify", str(where(NAME)), NAME).endswith(digest)

    def test_unknown_names_before_anything_is_fetched(self, run: Run, tiny: Path) -> None:
        with pytest.raises(InputError, match="resnet_11: neither"):
            run("fetch", NAME, "resnet_11")
        assert not where(NAME).exists()
        with pytest.raises(InputError, match="No name given"):
            run("fetch")


class TestShow:
    def test_released_form(self, run: Run, tiny: Path) -> None:
        shown = run("show", str(tiny))
        for words in ("tensors     72", "depth       10", "shortcut    B", "in_channels 1", "registry    resnet_10"):
            assert words in shown
        assert "trained at output stride 8 on: brain tumour" in shown and "MONAI's ResNet" in shown

    def test_json(self, run: Run, tmp_path: Path) -> None:
        net = SegmentationNet(18, 3, "fpn", shortcut_type="A").half()
        torch.save(net.state_dict(), tmp_path / "m.pt")
        facts = json.loads(run("show", str(tmp_path / "m.pt"), "--json"))
        assert (facts["depth"], facts["shortcut"], facts["in_channels"]) == (18, "A", 1)
        assert facts["dtypes"] == ["float16", "int64"] and facts["registry"] is None
        assert facts["tensors"] == len(net.state_dict())
        assert facts["head"] == [key for key in net.state_dict() if not key.startswith("backbone.")]
        assert "cannot be read off" in facts["notes"][0]

    def test_of_another_network(self, run: Run, tmp_path: Path) -> None:
        torch.save({"stem.0.weight": torch.ones(64, 3, 3, 7, 7)}, tmp_path / "m.pt")
        shown = run("show", str(tmp_path / "m.pt"))
        assert "depth       unknown" in shown and "torchvision's video ResNet" in shown

    def test_by_name(self, run: Run, tiny: Path) -> None:
        with pytest.raises(InputError, match=f"{NAME}: is not on this machine"):
            run("show", NAME)
        run("fetch", NAME)
        assert f"file        {where(NAME)}" in run("show", NAME)


class TestOthersCommands:
    def test_convert(self, run: Run, tmp_path: Path) -> None:
        torch.save(Med3DResNet(10).state_dict(), tmp_path / "a.pt")
        done = run("convert", str(tmp_path / "a.pt"), str(tmp_path / "b.pth"), "--to", "medicalnet")
        assert "72 tensors of a ResNet-10" in done
        written = torch.load(tmp_path / "b.pth", weights_only=True)["state_dict"]
        assert len(written) == 72 and all(key.startswith("module.") for key in written)

    def test_overlap(self, run: Run, tmp_path: Path) -> None:
        dataset = {"name": "liver", "training": [{"image": "./imagesTr/liver_12.nii.gz"}]}
        (tmp_path / "dataset.json").write_text(json.dumps(dataset))
        assert run("overlap", "resnet_50", str(tmp_path)).startswith(f"resnet_50 on {tmp_path / 'dataset.json'}: seen")


def test_a_program_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "resnet_10.pth").write_bytes(PAGE)
    done = subprocess.run(
        [sys.executable, "-m", "med3d_nets.weights", "verify", str(tmp_path / "resnet_10.pth"), "resnet_10"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip() == (
        f"Error: {tmp_path / 'resnet_10.pth'}: is not resnet_10: it is an HTML or XML page, not weights. "
        "Fetch or copy it again."
    )
