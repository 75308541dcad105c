"""Ensembles, mirror images, calibration and the scores of nodule classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from med3d_nets import ClassificationNet, calibrate, load_ensemble, read_record
from med3d_nets.classification import pool
from med3d_nets.classifier_ensemble import ClassifierEnsemble, fit_platt
from med3d_nets.classifier_record import settings_of
from med3d_nets.errors import InputError
from med3d_nets.nodule_scores import markdown, summarise_nodules

SETTINGS = {"classes": ["malign", "rating_4_5"], "spacing": [1.0, 1.0, 1.0], "input_size": [24, 24, 16]}


def save(folder: Path, seed: int, **settings: object) -> Path:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    torch.save(ClassificationNet(10, 2, output_stride=16).state_dict(), folder / "model.pt")
    (folder / "classifier.json").write_text(json.dumps({**SETTINGS, **settings}))
    return folder / "model.pt"


def net() -> ClassificationNet:
    return ClassificationNet(10, 2, output_stride=16)


def test_an_ensemble_is_the_mean_of_its_networks_and_mirror_images(tmp_path: Path) -> None:
    files = [save(tmp_path / "a", 0), save(tmp_path / "b", 1)]
    image = torch.randn(1, 1, 24, 20, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        alone = [load_ensemble(net(), file).eval()(image) for file in files]
        torch.testing.assert_close(load_ensemble(net(), files).eval()(image), (alone[0] + alone[1]) / 2)
        mirrored = load_ensemble(net(), files[0], flips=True).eval()
        assert len(mirrored.mirrors) == 8
        torch.testing.assert_close(mirrored(image), mirrored(image.flip(2, 4)))
        assert not torch.allclose(alone[0], load_ensemble(net(), files[0]).eval()(image.flip(2, 4)))


def test_an_ensemble_of_different_questions_is_refused(tmp_path: Path) -> None:
    files = [save(tmp_path / "a", 0), save(tmp_path / "b", 1, spacing=[2.0, 2.0, 2.0])]
    with pytest.raises(InputError, match="same classes, spacing and input_size"):
        load_ensemble(net(), files)
    with pytest.raises(InputError, match="empty list"):
        load_ensemble(net(), [])


def test_maximum_leaves_padding_out() -> None:
    feature = torch.rand(1, 3, 4, 3, 2)
    feature[0, :, 3] = 9.0
    assert torch.equal(pool(feature, 8, pooling="max"), torch.full((1, 3), 9.0))
    inside = pool(feature, 8, torch.tensor([[24, 24, 16]]), "max")
    assert torch.equal(inside, feature[:, :, :3].amax(dim=(2, 3, 4)))
    with pytest.raises(ValueError, match="pooling='sum'"):
        ClassificationNet(10, 2, pooling="sum")


def test_platt_finds_slope_and_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, dtype=torch.float64, generator=generator)
    labels = (torch.rand(4000, dtype=torch.float64, generator=generator) < torch.sigmoid(truth)).double()
    slope, offset = fit_platt((truth - 1.0) / 0.5, labels)  # too sure of itself, and shifted
    assert slope == pytest.approx(0.5, abs=0.05) and offset == pytest.approx(1.0, abs=0.1)
    assert fit_platt(truth, torch.ones(4000, dtype=torch.float64)) == (1.0, 0.0)
    assert fit_platt(-truth, labels) == (1.0, 0.0)


def test_calibration_goes_into_the_weights(tmp_path: Path) -> None:
    """The calibrated network gives slope x logit + offset, and its record says so."""
    path = save(tmp_path / "a", 0)
    before = load_ensemble(net(), path).eval()
    images = torch.randn(12, 1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        raw = before(images)
    labels = torch.stack([raw[:, 0] > raw[:, 0].median(), torch.arange(12) < 6], dim=1).float()
    labels[0, 0] = 1 - labels[0, 0]
    found = calibrate(net(), path, [{"image": images, "label": labels}], "cpu")
    with torch.inference_mode():
        after = load_ensemble(net(), path).eval()(images)
    torch.testing.assert_close(after, raw * torch.tensor(found["slope"]) + torch.tensor(found["offset"]))
    assert read_record(path)["calibration"] == {**found, "cases": 12}


def test_settings_come_from_the_record_or_the_bundle(tmp_path: Path) -> None:
    own = tmp_path / "bundle" / "models" / "model.pt"
    assert settings_of(own, tmp_path / "bundle", {"spacing": [1, 1, 1]}) == {"spacing": [1, 1, 1]}
    path = save(tmp_path / "run", 0)
    found = settings_of(path, tmp_path / "bundle", {"spacing": [9, 9, 9], "window": [0, 1]})
    assert found["spacing"] == SETTINGS["spacing"] and found["window"] == [0, 1]
    with pytest.raises(InputError, match="no record of a trained classifier"):
        settings_of(tmp_path / "model.pt", tmp_path / "bundle", {})


def scored(shift: float) -> dict[str, dict]:
    rng = np.random.default_rng(0)
    cases = {}
    for index in range(80):
        truth = index % 2
        cases[f"c{index}"] = {
            "patient": f"p{index // 2}",
            "diameter": 8 + 2 * truth + rng.normal(0, 3),
            "probabilities": [float(np.clip(0.5 + shift * (truth - 0.5) + rng.normal(0, 0.1), 0, 1)), 0.5],
            "truth": [truth, truth],
        }
    return cases


def test_the_diameter_stands_beside_the_network() -> None:
    summary = summarise_nodules(scored(0.6), ["malign", "rating_4_5"], 200)
    good, blind = summary["malign"], summary["rating_4_5"]
    assert good["auc"]["value"] > 0.98 and blind["auc"]["value"] == 0.5
    assert good["diameter_auc"]["value"] == blind["diameter_auc"]["value"]
    assert good["auc_over_diameter"]["value"] == pytest.approx(good["auc"]["value"] - good["diameter_auc"]["value"])
    assert good["auc_over_diameter"]["ci95"][0] > 0 > blind["auc_over_diameter"]["ci95"][1]
    assert "| malign | diameter alone | 0." in markdown(summary)


def test_without_diameters_there_is_no_such_row() -> None:
    cases = {name: {**case, "diameter": None} for name, case in scored(0.6).items()}
    assert "diameter" not in markdown(summarise_nodules(cases, ["malign", "rating_4_5"], 20))


def test_ensemble_takes_what_networks_take() -> None:
    with torch.inference_mode():
        assert ClassifierEnsemble([net()], flips=True).eval()(torch.zeros(2, 1, 17, 16, 9)).shape == (2, 2)
