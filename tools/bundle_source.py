"""Bundles from their source: one template per task, one record per depth (med3d_nets.registry).

A template, ``tools/templates/TASK/``, is itself a bundle of depth 10. Another depth is the same text with ``resnet10``,
``ResNet-10`` and ``"depth": 10`` replaced, ``resnet_10_23dataset`` by the newest released weights of that depth, and
with facts that are read, not written: parameters of the network, hash of the shipped weights, addresses of the
released ones. ``tools/templates/TASK/depths.json``, not copied, may add to the metadata of a depth:
``{"10": {"version": "0.1.1", "changelog": {…}, "eval_metrics": {…}}}``.

In Markdown, ``<!-- trained -->…<!-- /trained -->`` stays where the bundle ships weights and
``<!-- untrained -->…<!-- /untrained -->`` where it does not; the line ``SCORES_TABLE`` becomes a table of the depth's
eval_metrics, ``TRAINED_BUNDLES`` the names of the task's bundles that ship weights, ``STAGE_CHANNELS`` the channels of
the encoder's five stages and ``EMBEDDING_CHANNELS`` those of the last. An output in the metadata whose channels are
those stages (``"channel_def": {"0-63": "stem", …}``) gets the depth's numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser

from med3d_nets.embedding import STAGES, stage_slices
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.registry import DEPTHS, encoders
from med3d_nets.weights import file_sha256

# What belongs to the user or to training; everything else in a bundle is made.
UNTOUCHED = ("models", "data", "runs")

_TEXT = {".json", ".md", ".txt", ".conf", ".yml"}
_TRAINED_OR_NOT = re.compile(r"<!-- (trained|untrained) -->\n?(.*?)<!-- /\1 -->\n?", re.DOTALL)
_LINE = 110


def all_bundles(templates: Path) -> dict[str, tuple[Path, int]]:
    """Template and depth of every bundle that can be made, by the bundle's name.

    Args:
        templates: folder of templates, one per task.

    Raises:
        InputError: there is no template.
    """
    tasks = sorted(path.parent.parent for path in templates.glob("*/configs/metadata.json"))
    if not tasks:
        raise InputError(f"{templates}: no template (a folder TASK/configs/metadata.json) here.")
    return {f"{task.name}_resnet{depth}": (task, depth) for task in tasks for depth in DEPTHS}


def render(template: Path, depth: int, bundles: Path, licence: Path) -> dict[str, bytes]:
    """Make the files of one bundle, in memory.

    Args:
        template: folder of the task's template.
        depth: depth of the network.
        bundles: folder of all bundles; only ``models/model.pt`` is read there.
        licence: file that becomes the bundle's LICENSE.

    Returns:
        Content by path relative to the bundle, ``configs/train.json`` and so on.

    Raises:
        InputError: the template is faulty.
    """
    weights = bundles / f"{template.name}_resnet{depth}" / "models" / "model.pt"
    record = _depth_record(template, depth)
    if not weights.is_file():  # scores are those of weights
        record.pop("eval_metrics", None)
    trained = [f"`{path.parts[-3]}`" for path in bundles.glob(f"{template.name}_resnet*/models/model.pt")]
    words = {
        "SCORES_TABLE": _scores_table(record.get("eval_metrics", {})),
        "TRAINED_BUNDLES": ", ".join(sorted(trained, key=lambda name: (len(name), name))) or "none yet",
        "STAGE_CHANNELS": ", ".join(map(str, DEPTHS[depth].feature_channels)),
        "EMBEDDING_CHANNELS": str(DEPTHS[depth].feature_channels[-1]),
    }
    files: dict[str, bytes] = {}
    for path in _template_files(template):
        content = path.read_bytes()
        if path.suffix in _TEXT:
            text = _at_depth(content.decode("utf-8"), depth)
            if path.suffix == ".md":
                text = _model_card(text, weights.is_file(), words, path)
            content = text.encode("utf-8")
        files[path.relative_to(template).as_posix()] = content
    _normalise(files, template)
    metadata = json.loads(files["configs/metadata.json"]) | record
    metadata["network_parameters"] = _network_parameters(files["configs/inference.json"])
    _describe_stages(metadata, DEPTHS[depth].feature_channels)
    if weights.is_file():
        metadata["weights_sha256"] = file_sha256(weights)
    files["configs/metadata.json"] = _json(metadata)
    files["large_files.yml"] = _large_files(depth)
    files["LICENSE"] = licence.read_bytes()
    return files


def differences(files: Mapping[str, bytes], bundle: Path) -> list[str]:
    """Compare a bundle on disk with what its source makes.

    Returns:
        One line per file that is missing, differs, or is made by nothing.
    """
    found = _made_files(bundle)
    lines = [f"{bundle / name}: missing" for name in files if name not in found]
    lines += [f"{bundle / name}: no source makes it" for name in found if name not in files]
    lines += [
        f"{bundle / name}: differs" for name in files if name in found and found[name].read_bytes() != files[name]
    ]
    return sorted(lines)


def write(files: Mapping[str, bytes], bundle: Path) -> list[str]:
    """Bring a bundle on disk to what its source makes; a file is never half written.

    Args:
        files: content by relative path.
        bundle: its folder; ``models``, ``data`` and ``runs`` in it are left alone.

    Returns:
        What was different before, as ``differences`` tells it.
    """
    changes = differences(files, bundle)
    for name, path in _made_files(bundle).items():
        if name not in files:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    for name, content in files.items():
        path = bundle / name
        if not path.is_file() or path.read_bytes() != content:
            with replacing(path) as hidden:
                hidden.write_bytes(content)
    return changes


def _template_files(template: Path) -> list[Path]:
    """Files in its folders; what lies beside them (depths.json) is not copied."""
    return [path for path in sorted(template.rglob("*")) if path.is_file() and path.parent != template]


def _made_files(bundle: Path) -> dict[str, Path]:
    paths = {path.relative_to(bundle): path for path in sorted(bundle.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if name.parts[0] not in UNTOUCHED}


def _at_depth(text: str, depth: int) -> str:
    """Replace the literals of depth 10; `resnet101` has none of them."""
    released = [weight.name for weight in encoders(depth)]
    text = text.replace("resnet_10_23dataset", released[-1] if released else f"resnet_{depth}")
    return re.sub(r'(resnet_?|ResNet-|"depth": )10(?!\d)', rf"\g<1>{depth}", text)


def _model_card(text: str, trained: bool, words: Mapping[str, str], path: Path) -> str:
    kept = "trained" if trained else "untrained"
    text = _TRAINED_OR_NOT.sub(lambda block: block[2] if block[1] == kept else "", text)
    if re.search(r"<!-- /?(un)?trained -->", text):
        raise InputError(f"{path}: a <!-- trained --> or <!-- untrained --> mark without its partner; close each one.")
    for word, replacement in words.items():
        text = text.replace(word, replacement)
    return text


def _scores_table(metrics: Mapping[str, float]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {value:g} |" for name, value in metrics.items()]
    return "\n".join(["| measure | value |", "|---|---|", *rows]) if rows else "None measured yet."


def _depth_record(template: Path, depth: int) -> dict[str, Any]:
    path = template / "depths.json"
    return json.loads(path.read_text(encoding="utf-8")).get(str(depth), {}) if path.is_file() else {}


def _describe_stages(metadata: dict[str, Any], channels: Sequence[int]) -> None:
    for output in metadata["network_data_format"]["outputs"].values():
        if tuple(output["channel_def"].values()) == STAGES:
            slices = stage_slices(channels).items()
            output["channel_def"] = {f"{place.start}-{place.stop - 1}": stage for stage, place in slices}
            output["num_channels"] = sum(channels)


@cache
def _network_parameters(inference: bytes) -> int:
    """Count without memory for the parameters: 500 MB at depth 200."""
    with torch.device("meta"):
        network = ConfigParser(json.loads(inference)).get_parsed_content("network_def")
    return sum(parameter.numel() for parameter in network.parameters())


def _large_files(depth: int) -> bytes:
    lines = ["large_files:"]
    for weight in encoders(depth):
        lines.append(f'  - path: "models/{weight.file}"')
        lines.append(f'    url: "{weight.url}"')
        lines.append(f'    hash_val: "{weight.sha256}"')
        lines.append('    hash_type: "sha256"')
    return "\n".join([*lines, ""]).encode("utf-8")


def _normalise(files: dict[str, bytes], template: Path) -> None:
    for name in [name for name in files if name.endswith(".json")]:
        try:
            files[name] = _json(json.loads(files[name]))
        except ValueError as error:
            raise InputError(f"{template / name}: no valid JSON ({error}).") from error


def _json(value: Any) -> bytes:
    """ASCII, because MONAI opens configs in the encoding of the user's machine."""
    return f"{_pretty(value, 0)}\n".encode("ascii")


def _pretty(value: Any, indent: int) -> str:
    flat = json.dumps(value)
    nested = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value))
    if not value or not isinstance(value, (dict, list)) or (not nested and indent + len(flat) < _LINE):
        return flat
    pad = " " * (indent + 4)
    if isinstance(value, dict):
        rows = [f"{pad}{json.dumps(key)}: {_pretty(item, indent + 4)}" for key, item in value.items()]
    else:
        rows = [f"{pad}{_pretty(item, indent + 4)}" for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(rows), " " * indent + closing])
