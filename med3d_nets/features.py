"""What a user gets of the bare encoder: embeddings and feature maps per case, and one table of all cases."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from ignite.engine import Engine
from numpy.typing import NDArray
from torch import nn

from med3d_nets.acceleration import InferenceNet
from med3d_nets.case_writer import CaseWriter, versions
from med3d_nets.embedding import STAGES, EmbeddingNet
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.processes import gather_rows, rank
from med3d_nets.registry import WEIGHTS
from med3d_nets.tables import csv_text
from med3d_nets.weights import file_sha256
from med3d_nets.weights.store import fault, resolve

Arrays = dict[str, NDArray[Any]]

_FLOAT16_MAX = float(np.finfo(np.float16).max)


class FeatureWriter(CaseWriter):
    """Handler of CaseEvaluator that writes ``{case}_features.npz``, and at the end ``embeddings.csv`` and ``run.json``.

    The npz holds the average of each stage (``stem``, ``layer1`` … ``layer4``) and ``embedding``, that of layer4,
    float32; with maps also ``map_layer4`` and so on, float16, (C, x, y, z), and ``affine_layer4``, 4 × 4, from the
    map's voxel index to mm in RAS; and ``origin``, JSON: image, weights and settings that it was made from. The table
    has one row per case: name, then the embedding; of several processes, it and the record are for the cases of all.

    It expects in the engine's output ``pred``, what EmbeddingNet gives, and ``image``, the network's input, a
    MetaTensor.

    Args:
        output_dir: see CaseWriter.
        network: the EmbeddingNet that runs, also as ``accelerate`` made it.
        weights: file of its weights, whose hash goes into ``run.json``.
        record: what else ``run.json`` tells and shapes a result: the bundle, the spacing, the normalisation and so on.
        maps: also write feature maps.
        map_stages: which.
        skip_finished: leave a case out whose npz was made from the same image by the same weights and settings.

    Raises:
        InputError: an unknown stage.
    """

    def __init__(
        self,
        output_dir: str | Path,
        network: EmbeddingNet | InferenceNet,
        weights: str | Path,
        record: Mapping[str, Any],
        maps: bool = False,
        map_stages: Sequence[str] = ("layer4",),
        skip_finished: bool = False,
    ) -> None:
        stages = [map_stages] if isinstance(map_stages, str) else list(map_stages)
        unknown = [str(stage) for stage in stages if stage not in STAGES]
        if unknown:
            raise InputError(f"map_stages: there is no {', '.join(unknown)}; allowed are {', '.join(STAGES)}.")
        self.network: Any = network.network if isinstance(network, InferenceNet) else network
        self.record = dict(record)
        self.map_stages = stages if maps else []
        self._maps: list[torch.Tensor] = []
        self._embeddings: dict[str, NDArray[np.float32]] = {}
        settings = {name: value for name, value in record.items() if name != "weights"}  # a name; the hash counts
        tables = ["embeddings.csv", "run.json"]
        super().__init__(output_dir, weights, {**settings, "maps": self.map_stages}, tables, skip_finished)

    def attach(self, engine: Engine) -> None:
        """Attach to a CaseEvaluator."""
        super().attach(engine)
        if self.map_stages:
            self.network.backbone.register_forward_hook(self._keep_maps)

    def __call__(self, engine: Engine) -> None:
        """Have the npz of the current case written."""
        state: Any = engine.state
        case, output = state.case, state.output[0]
        vector = output["pred"].float().cpu().numpy()
        if not np.isfinite(vector).all():
            raise InputError(f"{case}: the features are not finite. Take weights of a training that did not diverge.")
        arrays: Arrays = {stage: vector[place] for stage, place in self.network.slices.items()}
        arrays["embedding"] = arrays[STAGES[-1]]
        arrays.update(self._map_arrays(case, np.asarray(output["image"].affine, dtype=np.float64)))
        arrays["origin"] = np.array(json.dumps(self._origin))
        state.write = partial(self._write, case, arrays)

    def _write(self, case: str, arrays: Arrays) -> None:
        path = self._path(case)
        with replacing(path) as hidden, hidden.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        self._embeddings[case] = arrays["embedding"]
        print(f"  {len(arrays['embedding'])} features -> {path}", flush=True)

    def _start(self, engine: Engine) -> None:
        self._embeddings = {}
        super()._start(engine)

    def _is_finished(self, case: Mapping[str, Any]) -> bool:
        """Whether the npz is what would be made now; then its embedding is kept for the table."""
        try:
            with np.load(self._path(case["case"])) as arrays:
                origin, embedding = json.loads(str(arrays["origin"])), arrays["embedding"]
        except (OSError, ValueError, KeyError, BadZipFile):
            return False
        if origin != self._origin_of(case["image"]):
            return False
        self._embeddings[case["case"]] = embedding
        return True

    def _keep_maps(self, backbone: nn.Module, inputs: Any, maps: list[torch.Tensor]) -> None:
        self._maps = maps

    def _map_arrays(self, case: str, affine: NDArray[np.float64]) -> Arrays:
        """The maps that are asked for; a map of stride s has its voxel i at the input's voxel s * i."""
        arrays: Arrays = {}
        for stage, stride, values in zip(STAGES, self.network.backbone.feature_strides, self._maps, strict=False):
            if stage in self.map_stages:
                if float(values.abs().max()) > _FLOAT16_MAX:
                    raise InputError(f"{case}: the map of {stage} exceeds half precision; leave it out.")
                arrays[f"map_{stage}"] = values[0].half().cpu().numpy()
                arrays[f"affine_{stage}"] = affine @ np.diag([stride, stride, stride, 1.0])
        self._maps = []
        return arrays

    def _set_aside(self, engine: Engine) -> None:
        self._embeddings.pop(engine.state.case, None)  # type: ignore[attr-defined]
        super()._set_aside(engine)

    def _finish(self, engine: Engine) -> None:
        state: Any = engine.state
        rows = gather_rows(
            [(one["case"], self._embeddings.get(one["case"]), state.failed.get(one["case"], "")) for one in state.cases]
        )
        if rank() != 0:
            return
        embeddings = {case: vector for case, vector, _ in rows if vector is not None}
        report = {
            **self.record,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "weights_file": str(self.weights),
            "weights_sha256": file_sha256(self.weights),
            "stages": dict(zip(STAGES, self.network.feature_channels, strict=True)),
            "maps": self.map_stages,
            "cases": list(embeddings),
            "failed": {case: reason for case, vector, reason in rows if vector is None},
            "versions": versions(),
        }
        with contextlib.ExitStack() as files:
            if embeddings:
                hidden = files.enter_context(replacing(self.output_dir / "embeddings.csv"))
                hidden.write_text(_table(embeddings), encoding="utf-8")
                print(f"{len(embeddings)} embeddings -> {self.output_dir / 'embeddings.csv'}")
            hidden = files.enter_context(replacing(self.output_dir / "run.json"))
            hidden.write_text(f"{json.dumps(report, indent=2)}\n")

    def _files_of(self, case: str) -> list[Path]:
        return [self._path(case)]

    def _path(self, case: str) -> Path:
        return self.output_dir / f"{case}_features.npz"


def find_weights(weights: str | Path, bundle_root: str | Path) -> str:
    """Find the encoder's weights that a user names.

    Args:
        weights: a file, or a name of the registry, for example ``resnet_10_23dataset``.
        bundle_root: the bundle, in whose ``models/NAME.pth`` ``monai.bundle download_large_files`` puts a name's file;
            where there is none, the name is looked up and fetched by ``med3d_nets.weights.store.resolve``.

    Returns:
        Path of the file; that of a name has the registry's hash.

    Raises:
        InputError: nothing is given, there is no such file or name, the name's file has another hash, or it cannot be
            fetched.
    """
    if not str(weights):
        raise InputError("No weights are given. Name a file or a record (python -m med3d_nets.weights list).")
    downloaded = Path(bundle_root) / "models" / f"{weights}.pth"
    if str(weights) not in WEIGHTS or Path(weights).is_file() or not downloaded.is_file():
        return str(resolve(weights))
    reason = fault(downloaded, WEIGHTS[str(weights)])
    if reason:
        raise InputError(
            f"{downloaded}: is not {weights}: {reason}. Remove it and run python -m monai.bundle download_large_files "
            "in the bundle's folder."
        )
    return str(downloaded)


def _table(embeddings: Mapping[str, NDArray[np.float32]]) -> str:
    width = len(next(iter(embeddings.values())))
    rows = [[case, *(f"{value:.7g}" for value in vector)] for case, vector in embeddings.items()]
    return csv_text(["case", *(f"e{index}" for index in range(width))], rows)
