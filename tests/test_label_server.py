"""The segmentation bundles behind a real MONAI Label server, in our app and in the stock one.

`make test-label` makes the server's environment and runs this file.
"""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from med3d_nets.annotation import PREVIOUS
from med3d_nets.weights import file_sha256
from tests.label_server import (
    BUDGET,
    LIVER,
    LUNG,
    MULTI,
    PYTHON,
    ROOT,
    Server,
    add_bundle,
    assert_clean,
    assert_same_mask,
    change,
    own_app,
    run_bundle,
    stock_app,
    write_studies,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no environment of MONAI Label; `make test-label` makes it and runs these"),
]

STOCK = {"zoo_source": "local", "sam2": "false"}


def small_training(copy: Path) -> None:
    """Let a copy of a bundle train on small patches, of which a CPU computes one in a second."""
    change(copy / "configs" / "train.json", lambda config: config.update(patch_size=[48, 48, 32]))


def labels_of(copy: Path) -> dict[str, int]:
    """What the metadata tells of the classes."""
    metadata = json.loads((copy / "configs" / "metadata.json").read_text())
    classes = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return {name: int(value) for value, name in classes.items() if name != "background"}


def annotate_and_train(server: Server, copy: Path, studies: Path, label: Path, tmp_path: Path) -> None:
    """All that an annotator does: look, take a scan, correct, submit, train, and take the next."""
    name = copy.name
    info = server.ask("/info/")
    model = info["models"][name]
    assert (model["type"], model["dimension"], model["version"]) == ("segmentation", 3, "0.1.0")
    assert model["labels"] == labels_of(copy) and info["labels"] == list(labels_of(copy))
    scan = server.ask("/activelearning/first", "POST", {})
    assert scan["id"] == "case0"
    served = server.infer(name, "case0", tmp_path / "served.nii.gz")
    assert_same_mask(served, run_bundle(copy, studies / "case0.nii.gz", tmp_path / "run"))
    for index in range(2):
        server.submit(f"case{index}", label, labels_of(copy))
    assert server.send("/datastore/label?label=case1&tag=final", "GET") == label.read_bytes()
    assert server.ask("/datastore/?output=stats")["completed"] == 2
    assert server.ask("/activelearning/random", "POST", {})["id"] == "case2"

    weights = copy / "models" / "model.pt"
    before = file_sha256(weights)
    done = server.train(name, **BUDGET)
    assert done["status"] == "DONE", "\n".join(done["details"])
    assert file_sha256(weights) != before and file_sha256(weights.with_name(PREVIOUS)) == before
    server.infer(name, "case0", tmp_path / "again.nii.gz")
    assert "Reload model from cache" in server.log
    assert_clean(server.log)


class TestOwnApp:
    def test_annotation(self, tmp_path: Path) -> None:
        """With the order by uncertainty, which is scored in the background; and what is refused, in words."""
        studies, label = write_studies(tmp_path, "lungs", 3)
        app, copy = own_app(tmp_path, LUNG)
        small_training(copy)
        with Server(app, studies, uncertainty="true", uncertainty_passes="2") as server:
            assert set(server.ask("/info/")["strategies"]) == {"first", "random", "uncertainty"}
            annotate_and_train(server, copy, studies, label, tmp_path)
            server.ask("/scoring/uncertainty?run_sync=true", "POST", {})
            scan = server.ask("/activelearning/uncertainty", "POST", {})
            assert scan["id"] == "case2" and 0 < scan["epistemic_entropy"] <= 1
            options = {"whole_volume": True, "keep_largest": False, "fill_holes": False}
            asked = run_bundle(  # with the new weights, as the server now has them
                copy, studies / "case0.nii.gz", tmp_path / "raw", "--keep_largest", "false", "--fill_holes", "false"
            )
            assert_same_mask(server.infer(copy.name, "case0", tmp_path / "raw.nii.gz", **options), asked)
            mri = nib.Nifti1Image(np.full((40, 40, 40), 100, np.int16), np.eye(4))
            nib.save(mri, tmp_path / "mri.nii.gz")
            with pytest.raises(urllib.error.HTTPError, match="400") as caught:
                server.infer(copy.name, str(tmp_path / "mri.nii.gz"), tmp_path / "no.nii.gz")
            assert "is not CT in Hounsfield units" in json.loads(caught.value.read())["detail"]

    def test_wrong_weights_are_not_served(self, tmp_path: Path) -> None:
        app, copy = own_app(tmp_path, LUNG)
        rename_keys(copy)
        with (
            pytest.raises(AssertionError, match=r"the server has ended(.|\n)*not the weights of this"),
            Server(app, tmp_path / "none"),
        ):
            pass


@pytest.mark.parametrize(("bundle", "organ"), [(LUNG, "lungs"), (LIVER, "liver")])
def test_stock_app(bundle: str, organ: str, tmp_path: Path) -> None:
    studies, label = write_studies(tmp_path, organ, 3)
    app = stock_app(tmp_path)
    copy = add_bundle(app, bundle)
    small_training(copy)
    with Server(app, studies, models=bundle, **STOCK) as server:
        annotate_and_train(server, copy, studies, label, tmp_path)


def test_mutants_and_domains_in_the_stock_app(tmp_path: Path) -> None:
    """Each part that the server needs of a bundle is missed when it is not there; the domains of a bundle of many."""
    studies, _ = write_studies(tmp_path, "lungs", 1)
    app = stock_app(tmp_path)
    names = {name: f"{name}_segmentation" for name in ("keys", "guard", "inverse")}
    copies = {name: add_bundle(app, LUNG, folder) for name, folder in names.items()}
    rename_keys(copies["keys"])
    change(copies["guard"] / "configs" / "inference.json", with_spacing)
    change(copies["inverse"] / "configs" / "inference.json", without_inverse)
    multi, lone = add_bundle(app, MULTI), own_app(tmp_path, MULTI, "lung_ct")[1]
    lone = Path(lone.rename(app / "model" / lone.name))
    scan = studies / "case0.nii.gz"
    reference = run_bundle(ROOT / "bundles" / LUNG, scan, tmp_path / "lung")
    of_domain = run_bundle(multi, scan, tmp_path / "multi", "--domain", "lung_ct")
    served = ",".join([*names.values(), multi.name, lone.name])
    with Server(app, studies, models=served, skip_trainers="true", **STOCK) as server:
        for name in ("keys", "inverse"):
            mask = server.infer(names[name], "case0", tmp_path / f"{name}.nii.gz")
            with pytest.raises(AssertionError, match="voxels differ"):
                assert_same_mask(mask, reference)
        assert server.ask("/info/")["models"][lone.name]["labels"] == {"lung": 1}
        assert_same_mask(server.infer(lone.name, "case0", tmp_path / "lone.nii.gz"), of_domain)
        chosen = server.infer(multi.name, "case0", tmp_path / "chosen.nii.gz", domain="lung_ct")
        assert_same_mask(chosen, of_domain)
        with pytest.raises(AssertionError, match="keys don't match"):
            assert_clean(server.log)
        with pytest.raises(urllib.error.HTTPError, match="500"):
            server.infer(names["guard"], "case0", tmp_path / "guard.nii.gz")


def test_without_the_package(tmp_path: Path) -> None:
    app = stock_app(tmp_path)
    add_bundle(app, LUNG)
    with (
        pytest.raises(AssertionError, match=r"the server has ended(.|\n)*med3d_nets"),
        Server(app, tmp_path / "none", path="", models=LUNG, **STOCK),
    ):
        pass


def rename_keys(copy: Path) -> None:
    """Weights of the same tensors under other names, as a wrapper of DataParallel leaves them."""
    path = copy / "models" / "model.pt"
    state = torch.load(path, weights_only=True)
    torch.save({f"module.{key}": value for key, value in state.items()}, path)


def with_spacing(config: dict[str, Any]) -> None:
    """MONAI's resampling, which takes every entry ``image_…`` for an image, without a guard."""
    steps = config["preprocessing"]["transforms"]
    at = next(index for index, step in enumerate(steps) if step["_target_"] == "med3d_nets.ResampleRASd")
    steps[at] = {"_target_": "Spacingd", "keys": "image", "pixdim": "@spacing"}


def without_inverse(config: dict[str, Any]) -> None:
    """Labels on the network's grid, not taken back to the scan's."""
    config["postprocessing"]["transforms"] = [{"_target_": "AsDiscreted", "keys": "pred", "argmax": True}]
