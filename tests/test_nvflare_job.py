"""The job folder for NVIDIA FLARE: what each part gets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from med3d_nets.errors import InputError
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
