"""The job folder for NVIDIA FLARE: what each part gets, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from med3d_nets import ClassificationNet
from med3d_nets.errors import InputError
from tests.nodule_runs import many_nodules
from tools import nvflare_job

BUNDLE = "lung_ct_segmentation_resnet18"
SITES = "north=/data/a, south=/data/b"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_each_site_has_its_own_data_and_the_same_bundle(tmp_path: Path) -> None:
    job = tmp_path / "job"
    nvflare_job.make(BUNDLE, str(job), SITES, rounds=3, local_epochs=2, max_epochs=5)
    meta = read(job / "meta.json")
    assert meta["min_clients"] == 2
    assert meta["deploy_map"] == {"app_server": ["server"], "app_north": ["north"], "app_south": ["south"]}
    for site, data in (("north", "/data/a"), ("south", "/data/b")):
        config = read(job / f"app_{site}" / "config" / "config_fed_client.json")
        algo = config["components"][0]["args"]
        assert algo["train_kwargs"] == algo["eval_kwargs"] == {"max_epochs": 5, "dataset_dir": data}
        assert algo["local_epochs"] == 2
        assert config["executors"][0]["executor"]["args"]["key_metric"] == "val_mean_dice"
        assert (job / f"app_{site}" / algo["bundle_root"] / "configs" / "train.json").is_file()
    server = read(job / "app_server" / "config" / "config_fed_server.json")
    assert server["workflows"][0]["args"]["num_rounds"] == 3
    names = {component["id"] for component in server["components"]}
    assert all(server["workflows"][0]["args"][key] in names for key in server["workflows"][0]["args"] if "_id" in key)
    assert [path.name for path in tmp_path.iterdir()] == ["job"]


@pytest.mark.parametrize(
    ("bundle", "sites", "message"),
    [
        ("no_bundle", SITES, "no_bundle: no bundle with configs/train.json"),
        (BUNDLE, "north=/data/a", "at least two different NAME=DIR"),
        (BUNDLE, "north=/a,north=/b", "at least two different NAME=DIR"),
        (BUNDLE, "north=/a,south", "at least two different NAME=DIR"),
        (BUNDLE, "north=/a,south=", "at least two different NAME=DIR"),
    ],
)
def test_what_is_refused(tmp_path: Path, bundle: str, sites: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        nvflare_job.make(bundle, str(tmp_path / "job"), sites)
    assert not list(tmp_path.iterdir())


def test_a_job_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    with pytest.raises(InputError, match="is there already"):
        nvflare_job.make(BUNDLE, str(tmp_path / "job"), SITES)


@pytest.mark.slow
def test_two_sites_train_in_the_simulator(tmp_path: Path) -> None:
    """Two rounds of the nodule bundle; the server's model is the bundle's network, and neither site's own."""
    if sys.version_info >= (3, 12):
        pytest.skip("monai-nvflare 0.4.0 is for Python below 3.12")
    venv.create(tmp_path / "venv", with_pip=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*")) / "site-packages"
    (packages / "own.pth").write_text("\n".join([sysconfig.get_paths()["purelib"], str(nvflare_job.ROOT)]))
    programs = tmp_path / "venv" / "bin"
    wanted = ["nvflare>=2.7,<2.8", "monai-nvflare==0.4.0"]
    installed = subprocess.run([programs / "pip", "install", "--quiet", *wanted], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"NVFlare does not install here: {installed.stderr.strip()[-300:]}")
    sites = ",".join(f"site-{n}={many_nodules(tmp_path / str(n), 10 + 4 * n)}" for n in (1, 2))
    small = {"input_size": [24, 24, 16], "spacing": [1.5, 1.5, 1.5], "batch_size": 4, "norm_batches": 1, "folds": 2}
    keys = {**small, "backbone_weights": "", "num_workers": 0, "device": "cpu"}
    job, work = tmp_path / "job", tmp_path / "work"
    nvflare_job.make("lung_nodule_ct_classification_resnet10", str(job), sites, rounds=2, **keys)
    command = [programs / "nvflare", "simulator", job, "-w", work, "-n", "2", "-t", "1", "-c", "site-1,site-2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    log = done.stdout + done.stderr
    assert "Round 1 finished" in log and "Traceback" not in log, log[-2000:]
    state = torch.load(work / "server" / "simulate_job" / "app_server" / "FL_global_model.pt", weights_only=True)
    network = ClassificationNet(10, 2, output_stride=16)
    network.load_state_dict({key: torch.as_tensor(value) for key, value in state["model"].items()})
    for path in work.glob("site-*/simulate_job/*/config/*/runs/train/model_last.pt"):
        own = torch.load(path, weights_only=True)["head.2.weight"]
        assert float((own - network.state_dict()["head.2.weight"]).abs().max()) > 1e-6
