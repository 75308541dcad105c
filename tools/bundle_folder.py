"""A bundle folder as the checks see it, and the faults that they find in it."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv
from torch import nn

WORKFLOWS: dict[str, tuple[str, ...]] = {
    "inference": ("inference",),
    "inference_trt": ("inference", "inference_trt"),
    "evaluate": ("evaluate",),
    "train": ("train",),
    "multi_gpu_inference": ("inference", "multi_gpu_inference"),
    "multi_gpu_evaluate": ("evaluate", "multi_gpu_evaluate"),
    "multi_gpu_train": ("train", "multi_gpu_train"),
}


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a bundle.

    Attributes:
        file: where, relative to the bundle's folder.
        wrong: what was found.
        remedy: what to do about it.
    """

    file: str
    wrong: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}: {self.wrong}; {self.remedy}"


class Bundle:
    """A bundle folder with its configs read and, on demand, its network built.

    Args:
        folder: the bundle's root.

    Attributes:
        folder: the same.
        name: name of the folder.
        configs: content of every readable ``configs/NAME.json``, by ``NAME``.
        unreadable: a fault for each of the others.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = self.folder.resolve().name
        self.configs: dict[str, dict[str, Any]] = {}
        self.unreadable: list[Fault] = []
        for path in sorted(self.folder.glob("configs/*.json")):
            self._read(path)

    @property
    def metadata(self) -> dict[str, Any]:
        """Content of ``configs/metadata.json``, empty where it cannot be read."""
        return self.configs.get("metadata", {})

    @property
    def weights(self) -> Path | None:
        """The shipped ``models/model.pt``, None in a bundle without trained weights."""
        path = self.folder / "models" / "model.pt"
        return path if path.is_file() else None

    @property
    def network_defs(self) -> dict[str, dict[str, Any]]:
        """``network_def`` of every config that has one."""
        definitions = {name: config.get("network_def") for name, config in self.configs.items()}
        return {name: one for name, one in definitions.items() if isinstance(one, dict)}

    @property
    def depth(self) -> Any:
        """Depth in ``inference.json``, None where it is not told."""
        return self.network_defs.get("inference", {}).get("depth")

    def text(self, path: str) -> str:
        """Content of a text file, empty where it is absent."""
        file = self.folder / path
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""

    def workflow(self, name: str) -> ConfigParser | None:
        """Config of a workflow, overlays merged as ``monai.bundle run`` does; None where a part of it is missing.

        Args:
            name: key of WORKFLOWS.
        """
        return self._merged(WORKFLOWS[name])

    @cached_property
    def network(self) -> nn.Module:
        """Network of ``inference.json``, with new weights, in evaluation mode.

        Raises:
            Exception: whatever building it raises.
        """
        parser = self._merged(("inference",))
        if parser is None or "network_def" not in parser:
            raise KeyError("inference.json has no network_def")
        network = parser.get_parsed_content("network_def")
        if not isinstance(network, nn.Module):
            raise TypeError(f"network_def makes a {type(network).__name__}, not a torch.nn.Module")
        return network.eval()

    def _merged(self, names: Sequence[str]) -> ConfigParser | None:
        if any(name not in self.configs for name in names):
            return None
        parser = merge(self.configs[name] for name in names)
        parser.read_meta(self.metadata)
        return parser

    def _read(self, path: Path) -> None:
        file = f"configs/{path.name}"
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        except ValueError as error:
            self.unreadable.append(Fault(file, f"no valid JSON ({error})", "correct it there"))
            return
        if isinstance(content, dict):
            self.configs[path.stem] = content
        else:
            self.unreadable.append(Fault(file, f"holds a {type(content).__name__}", "make it a JSON object"))


def merge(configs: Iterable[dict[str, Any]]) -> ConfigParser:
    """Merge configs as ``monai.bundle run`` does, but leave out a key whose owner does not exist.

    check_overlays tells of such a key; MONAI would stop at it.
    """
    parser = ConfigParser({})
    for config in configs:
        for key, value in copy.deepcopy(config).items():
            with suppress(KeyError, IndexError, TypeError, ValueError), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merge_kv(parser, key, value)
    return parser


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice: the first value would be lost without a word."""
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"twice in one object: {', '.join(repeated)}")
    return dict(pairs)
