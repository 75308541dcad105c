"""A MONAI Label app for this project's segmentation bundles: those in its folder ``model``, each a copy.

What the stock app ``monaibundle`` does not do: it takes nothing from the network; weights that do not fit their network
are refused at the start, not served; what a bundle refuses reaches the annotator as a sentence, not as status 500;
``image_path``, which MONAI >= 1.6 Spacingd takes for an image, is kept from the transforms; a training without
``pretrained`` does not fail; and the next scan to annotate can be the one of which the network is least certain.

Options, ``--conf KEY VALUE``: ``models`` (a bundle's name, or several, comma separated; all by default),
``skip_trainers``, ``uncertainty`` (true: offer that order), ``uncertainty_passes`` (5), ``uncertainty_dropout`` (0.2),
``uncertainty_samples`` (20, the scans that are scored in one go).
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monailabel
import torch
from fastapi import HTTPException
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.tasks.activelearning.epistemic import Epistemic
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.scoring.epistemic_v2 import EpistemicScoring
from monailabel.tasks.train.bundle import BundleTrainTask
from monailabel.utils.others.generic import name_to_device

from med3d_nets import InputError, is_on
from med3d_nets.uncertainty import dropout_only, uncertainty

logger = logging.getLogger(__name__)


class BundleTask(BundleInferTask):
    """Inference with one bundle; with ``dropout`` its network drops channels, as ``Uncertainty`` needs it."""

    def __init__(self, path: Path, conf: dict[str, str], dropout: float = 0.0) -> None:
        super().__init__(str(path), conf, dropout=dropout, load_strict=True)
        if not self.is_valid():
            raise SystemExit(
                f"{path}: there are no weights to serve, models/model.pt. Train the bundle first, as its "
                "docs/README.md tells, or serve one that ships weights."
            )
        try:  # as the server will load them at the first request
            copy.deepcopy(self.network).load_state_dict(torch.load(self.get_path(), "cpu", weights_only=True))
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise SystemExit(
                f"{self.get_path()}: not the weights of this bundle's network. Copy the bundle again, or convert them: "
                f"python -m med3d_nets.weights convert IN OUT. {str(error)[:600]}"
            ) from error

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> Any:
        """Run; what the bundle refuses becomes status 400 with its sentence."""
        try:
            return super().__call__(request, callbacks)
        except Exception as error:
            refused = _refusal(error)
            if refused is None:
                raise
            logger.warning("Refused: %s", refused)
            raise HTTPException(status_code=400, detail=str(refused)) from error

    def run_pre_transforms(self, data: dict[str, Any], transforms: Sequence[Any]) -> Any:
        """Run them without ``image_path`` in the data."""
        image_path = data.pop("image_path", None)
        data = super().run_pre_transforms(data, transforms)
        if image_path is not None:
            data["image_path"] = image_path
        return data

    def _get_network(self, device: str, data: Any) -> Any:
        network = super()._get_network(device, data)
        return dropout_only(network) if self.dropout else network


class TrainTask(BundleTrainTask):
    """Training of one bundle on the labels that were saved."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> Any:
        """Train.

        Raises:
            SystemExit: there is no label yet.
        """
        if not datastore.datalist():
            raise SystemExit(
                "Error: no scan has a label yet, so there is nothing to train on. Submit a label first; what inference "
                "returns counts when it is submitted."
            )
        return super().__call__({**request, "run_id": request.get("run_id") or "run"}, datastore)

    def _load_checkpoint(self, model_pytorch: str, pretrained: bool, train_handlers: list[Any]) -> None:
        if pretrained:  # the base class looks for the file None
            super()._load_checkpoint(model_pytorch, pretrained, train_handlers)


class Uncertainty(EpistemicScoring):
    """Scores the scans without label by how much passes with dropout disagree."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> Any:
        """Score those whose score is not from the present weights, one after the other."""
        return super().__call__({"max_workers": 1, **request}, datastore)

    def run_scoring(self, image_id: str, simulation_size: int, model_ts: int, datastore: Datastore) -> None:
        """Score one scan and note it with the scan; one that is refused goes without."""
        task: BundleTask = self.infer_task
        device = name_to_device("cuda")
        data = {**copy.deepcopy(task.config()), "device": device, "image": datastore.get_image_uri(image_id)}
        try:
            data = task.run_pre_transforms(data, task.pre_transforms(data))
        except Exception as error:
            refused = _refusal(error)
            if refused is None:
                raise
            logger.warning("%s has no score: %s", image_id, refused)
            return
        passes = (task.run_inferer(dict(data), device=device)[task.output_label_key] for _ in range(simulation_size))
        score = uncertainty(passes)
        logger.info("%s: uncertainty %.4f", image_id, score)
        datastore.update_image_info(image_id, {self.key_output_entropy: score, self.key_output_ts: model_ts})


class Med3DApp(MONAILabelApp):
    """The app, which MONAI Label finds as the one class of its kind in this file."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.models = _bundles(Path(app_dir) / "model", conf.get("models", ""))
        super().__init__(app_dir, studies, conf, name="Med3D bundles", version=monailabel.__version__)

    def init_infers(self) -> dict[str, BundleTask]:
        """Make a task for each bundle."""
        return {name: BundleTask(path, self.conf) for name, path in self.models.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Make the training of the bundle, if there is just one: label values are those of its classes."""
        if is_on(self.conf.get("skip_trainers", "false")):
            return {}
        if len(self.models) > 1:
            logger.warning(
                "No training with several bundles: serve one, so that label values are those of its classes."
            )
            return {}
        tasks = {name: TrainTask(str(path), self.conf, load_strict=True) for name, path in self.models.items()}
        return {name: task for name, task in tasks.items() if task.is_valid()}

    def init_strategies(self) -> dict[str, Any]:
        """Orders in which scans are given out."""
        strategies = {"first": First(), "random": Random()}
        if self._by_uncertainty():
            strategies["uncertainty"] = Epistemic(desc="The scan of which the network is least certain")
        return strategies

    def init_scoring_methods(self) -> dict[str, Uncertainty]:
        """Make what the order by uncertainty goes by; MONAI Label runs it at the start and after each training."""
        if not self._by_uncertainty():
            return {}
        task = BundleTask(next(iter(self.models.values())), self.conf, float(self.conf.get("uncertainty_dropout", 0.2)))
        most, passes = (
            int(self.conf.get(f"uncertainty_{key}", value)) for key, value in (("samples", 20), ("passes", 5))
        )
        return {"uncertainty": Uncertainty(task, max_samples=most, simulation_size=passes)}

    def _by_uncertainty(self) -> bool:
        return len(self.models) == 1 and is_on(self.conf.get("uncertainty", "false"))


def _bundles(folder: Path, names: str) -> dict[str, Path]:
    """The bundles to serve by name."""
    have = sorted(path.name for path in folder.glob("*") if (path / "configs" / "inference.json").is_file())
    wanted = [name.strip() for name in names.split(",") if name.strip()] or have
    wrong = [name for name in wanted if name not in have or "_segmentation" not in name]
    if wrong or not wanted:
        found = f"cannot serve {', '.join(wrong)}" if wrong else "holds no bundle"
        raise SystemExit(f"{folder}: {found}. Segmentation bundles here: {', '.join(have) or 'none'}. Copy one there.")
    return {name: folder / name for name in wanted}


def _refusal(error: BaseException) -> InputError | None:
    """The InputError that MONAI's transforms may have wrapped."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, InputError):
        cause = cause.__cause__ or cause.__context__
    return cause
