"""A job for NVIDIA FLARE: several sites train a bundle together, and no scan leaves its site.

    python -m tools.nvflare_job make BUNDLE --out JOB --sites "site-1=/data/a,site-2=/data/b" [--rounds 10]
    nvflare simulator JOB -w WORKSPACE -n 2 -t 2 -c site-1,site-2

Federated averaging (McMahan et al., AISTATS 2017) by FLARE's ScatterAndGather; each site runs the bundle unmodified as
MONAI's MonaiAlgo, by ``pip install monai-nvflare`` (0.4.0, which takes nvflare 2.7 and Python below 3.12). The job has
a copy of the bundle and no data: ``--sites`` tells where each site keeps its own.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fire

from med3d_nets.errors import InputError, clear_errors
from tools.bundle_folder import Bundle
from tools.bundle_run import ROOT

NVFLARE = "nvflare.app_common"


def make(
    bundle: str, out: str, sites: str, rounds: int = 10, local_epochs: int = 1, key_metric: str = "", **keys: Any
) -> None:
    """Write a job folder.

    Args:
        bundle: name of a bundle of ``bundles/``, or its folder.
        out: folder to write, not there yet.
        sites: name and dataset_dir of each site, ``NAME=DIR``, with commas between them; at least two.
        rounds: how often the sites' weights are averaged.
        local_epochs: epochs that a site trains before each.
        key_metric: metric of the bundle's validation that FLARE reports; its key metric by default.
        keys: keys of ``train.json`` for all sites, for example ``backbone_weights``.

    Raises:
        InputError: no such bundle, fewer than two sites, a site without folder, or the job is there already.
    """
    folder = Path(bundle) if Path(bundle).is_dir() else ROOT / "bundles" / bundle
    config = Bundle(folder).configs.get("train") if folder.is_dir() else None
    if config is None:
        raise InputError(f"{bundle}: no bundle with configs/train.json. Give a name of bundles/ or a folder.")
    places = _places(sites)
    target = Path(out)
    if target.exists():
        raise InputError(f"{out}: is there already. Give another folder, or remove it.")
    metric = key_metric or next(iter(config["validate"]["key_metric"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial_") as place:
        job = Path(place) / "job"
        _write(job / "meta.json", _meta(folder.name, list(places)))
        _app(job / "app_server", folder, "config_fed_server.json", _server(folder.name, len(places), rounds))
        for site, data in places.items():
            client = _client(folder.name, {**keys, "dataset_dir": data}, local_epochs, metric)
            _app(job / f"app_{site}", folder, "config_fed_client.json", client)
        job.rename(target)
    names = ",".join(places)
    print(
        f"{out}: try it on this machine with\n  nvflare simulator {out} -w WORKSPACE -n {len(places)} -t 1 -c {names}"
    )


def _places(sites: str) -> dict[str, str]:
    """Data folder of each site."""
    parts = [part.strip() for part in str(sites).split(",") if part.strip()]
    places = dict(part.split("=", 1) for part in parts if "=" in part)
    if len(places) < max(2, len(parts)) or not all(places.values()):
        raise InputError(
            f"sites={sites!r}: needed are at least two different NAME=DIR with commas between them, for example "
            "site-1=/data/a,site-2=/data/b."
        )
    return places


def _app(app: Path, bundle: Path, name: str, config: dict[str, Any]) -> None:
    """A part of the job: its configuration, and the bundle beside it without what runs have left."""
    _write(app / "config" / name, config)
    shutil.copytree(bundle, app / "config" / bundle.name, ignore=shutil.ignore_patterns("runs", "data", "*.pth"))


def _meta(name: str, sites: list[str]) -> dict[str, Any]:
    deploy = {"app_server": ["server"], **{f"app_{site}": [site] for site in sites}}
    return {"name": name, "resource_spec": {}, "min_clients": len(sites), "deploy_map": deploy}


def _server(bundle: str, clients: int, rounds: int) -> dict[str, Any]:
    gather = {
        "min_clients": clients,
        "num_rounds": int(rounds),
        "aggregator_id": "aggregator",
        "persistor_id": "persistor",
        "shareable_generator_id": "shareable_generator",
        "train_task_name": "train",
        "train_timeout": 0,
    }
    return {
        "format_version": 2,
        "workflows": [
            {
                "id": "scatter_and_gather",
                "path": f"{NVFLARE}.workflows.scatter_and_gather.ScatterAndGather",
                "args": gather,
            }
        ],
        "components": [
            {
                "id": "persistor",
                "path": "monai_nvflare.monai_bundle_persistor.MonaiBundlePersistor",
                "args": {"bundle_root": f"config/{bundle}", "network_def_key": "network_def"},
            },
            {
                "id": "shareable_generator",
                "path": f"{NVFLARE}.shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator",
                "args": {},
            },
            {
                "id": "aggregator",
                "path": f"{NVFLARE}.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
                "args": {"expected_data_kind": "WEIGHT_DIFF"},
            },
        ],
    }


def _client(bundle: str, keys: dict[str, Any], local_epochs: int, metric: str) -> dict[str, Any]:
    algo = {
        "bundle_root": f"config/{bundle}",
        "local_epochs": int(local_epochs),
        "config_evaluate_filename": "configs/train.json",
        "train_kwargs": keys,
        "eval_kwargs": keys,
    }
    executor = {"client_algo_id": "client_algo", "key_metric": metric}
    return {
        "format_version": 2,
        "executors": [
            {
                "tasks": ["train", "submit_model", "validate"],
                "executor": {"path": "monai_nvflare.client_algo_executor.ClientAlgoExecutor", "args": executor},
            }
        ],
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [{"id": "client_algo", "path": "monai.fl.client.MonaiAlgo", "args": algo}],
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{json.dumps(content, indent=2)}\n", encoding="utf-8")


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make})
