"""Checks of ``configs/metadata.json``: against the schema's rules, and against the network that it describes.

The rules are those of MONAI's schema of 2024-07-25 and of the model zoo, written down here so that a check needs no
network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata as installed
from importlib.util import find_spec
from typing import Any

import jsonschema
import torch
from monai.bundle.scripts import _get_fake_spatial_shape  # the one reader of shapes such as "16*n"

import med3d_nets
from med3d_nets.weights import file_sha256
from tools.bundle_folder import Bundle, Fault

METADATA = "configs/metadata.json"

_TEXT = {"type": "string", "minLength": 1}
_VERSION = {"type": "string", "pattern": r"^\d+\.\d+(\.\d+)?([a-z+.].*)?$"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_TENSOR = {
    "type": "object",
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "channel_def"],
    "properties": {
        "type": _TEXT,
        "format": _TEXT,
        "modality": _TEXT,
        "num_channels": {"type": "integer", "minimum": 1},
        "spatial_shape": {"type": "array", "items": {"type": ["integer", "string"]}},
        "dtype": _TEXT,
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {**_TEXTS, "propertyNames": {"pattern": r"^\d+(-\d+)?$"}},
    },
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "required": [
        *("schema", "version", "changelog", "name", "monai_version", "pytorch_version", "numpy_version"),
        *("required_packages_version", "task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        **dict.fromkeys(("schema", "name", "task", "description", "authors", "copyright", "intended_use"), _TEXT),
        **dict.fromkeys(("data_source", "data_type", "image_classes", "label_classes", "pred_classes"), _TEXT),
        **dict.fromkeys(("monai_version", "pytorch_version", "numpy_version"), _VERSION),
        "version": {"type": "string"},
        "changelog": _TEXTS,
        "required_packages_version": {"type": "object", "additionalProperties": _VERSION},
        "optional_packages_version": {"type": "object", "additionalProperties": _VERSION},
        "supported_apps": {"type": "object"},
        "eval_metrics": {"type": "object", "additionalProperties": {"type": "number"}},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_parameters": {"type": "integer"},
        "weights_sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "properties": {
                "inputs": {"type": "object", "required": ["image"], "additionalProperties": _TENSOR},
                "outputs": {"type": "object", "required": ["pred"], "additionalProperties": _TENSOR},
            },
        },
    },
}


def check_schema(bundle: Bundle) -> Iterator[Fault]:
    """Every key that MONAI's schema and the zoo ask for, and its type."""
    if "metadata" in bundle.configs:
        for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(bundle.metadata):
            where = "#".join(map(str, error.absolute_path)) or "the top level"
            yield Fault(METADATA, f"at {where}: {error.message}", "see MONAI's schema meta_schema_20240725.json")


def check_version(bundle: Bundle) -> Iterator[Fault]:
    """A version that sorts as a string, since that is how MONAI finds the latest, and its entry in the changelog."""
    version = str(bundle.metadata.get("version", ""))
    if version and not re.fullmatch(r"\d\.\d\.\d", version):
        yield Fault(
            METADATA,
            f"version {version!r}",
            "use MAJOR.MINOR.PATCH with one digit each: MONAI sorts versions as strings, 10 comes before 9",
        )
    if version and version not in _dict(bundle.metadata, "changelog"):
        yield Fault(METADATA, f"the changelog has no entry {version!r}", "say there what is new in this version")


def check_packages(bundle: Bundle) -> Iterator[Fault]:
    """Required packages that exist, and the version of med3d_nets that this is."""
    packages = _dict(bundle.metadata, "required_packages_version")
    for name in packages:
        if not _is_installed(name):
            yield Fault(METADATA, f"required_packages_version names {name}, which is not installed", "correct the name")
    if packages.get("med3d_nets") != med3d_nets.__version__:
        yield Fault(
            METADATA,
            f"required_packages_version has med3d_nets {packages.get('med3d_nets')}, the package is "
            f"{med3d_nets.__version__}",
            "give the version that the bundle was made with",
        )


def check_channels(bundle: Bundle) -> Iterator[Fault]:
    """One definition per channel or range of channels (``0-63``), and types that torch has."""
    for side, name, tensor in _tensors(bundle):
        where = f"{side}#{name}"
        channels = tensor["num_channels"]
        defined = [index for key in tensor["channel_def"] for index in _channels(key)]
        if sorted(defined) != list(range(channels)):
            keys = ", ".join(tensor["channel_def"])
            yield Fault(
                METADATA, f"{where} has {channels} channels, channel_def has {keys}", "define each channel once"
            )
        if not isinstance(getattr(torch, tensor["dtype"], None), torch.dtype):
            yield Fault(METADATA, f"{where} has dtype {tensor['dtype']!r}", "use a name such as float32")


def check_parameters(bundle: Bundle, network: torch.nn.Module) -> Iterator[Fault]:
    """The stated number of parameters."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if bundle.metadata.get("network_parameters") != parameters:
        stated = bundle.metadata.get("network_parameters")
        yield Fault(METADATA, f"network_parameters is {stated}, the network has {parameters}", "run make")


def check_weights_record(bundle: Bundle) -> Iterator[Fault]:
    """A hash exactly where there are weights, and scores only there."""
    stated = bundle.metadata.get("weights_sha256")
    actual = file_sha256(bundle.weights) if bundle.weights else None
    if stated != actual:
        yield Fault(METADATA, f"weights_sha256 is {stated}, that of models/model.pt is {actual}", "run make")
    metrics = _dict(bundle.metadata, "eval_metrics")
    if metrics and not actual:
        yield Fault(METADATA, "eval_metrics of weights that are not shipped", "take the scores out or ship the weights")
    for name, value in metrics.items():
        if value == 0:
            yield Fault(METADATA, f"eval_metrics has {name} 0", "measure it or take it out")


def check_shapes(bundle: Bundle, network: torch.nn.Module) -> Iterator[Fault]:
    """Channels, type and spatial size of what the network gives for a small input of odd, unequal sizes."""
    try:
        image = example(bundle)
        if image is None:
            return
        with torch.inference_mode():
            output = network(image)
    except Exception as error:  # whatever a wrong shape makes torch raise is the fault that is looked for
        yield Fault(METADATA, f"the network does not take the image described there ({error})", "correct the inputs")
        return
    given = [output] if isinstance(output, torch.Tensor) else list(getattr(output, "values", lambda: output)())
    stated = [(name, tensor) for side, name, tensor in _tensors(bundle) if side == "outputs"]
    if len(given) != len(stated):
        yield Fault(METADATA, f"outputs lists {len(stated)} tensors, the network gives {len(given)}", "list each one")
    for (name, tensor), result in zip(stated, given, strict=False):
        facts = {
            "num_channels": (tensor["num_channels"], result.shape[1]),
            "dtype": (tensor["dtype"], str(result.dtype).removeprefix("torch.")),
            "spatial_shape": (_sizes(tensor["spatial_shape"]), tuple(result.shape[2:]) or (1,)),
        }
        for key, (said, is_) in facts.items():
            if said != is_:
                wrong = f"outputs#{name}#{key} is {said} for an input of {tuple(image.shape[2:])}"
                yield Fault(METADATA, f"{wrong}, the network gives {is_}", "correct it")


def example(bundle: Bundle) -> torch.Tensor | None:
    """Make a random input as metadata.json describes it, (1, channels, sizes), of another size along each axis.

    Returns:
        The input, None where the description breaks the schema.
    """
    inputs = {name: tensor for side, name, tensor in _tensors(bundle) if side == "inputs"}
    if not inputs:
        return None
    tensor = inputs["image"]
    shape = (1, tensor["num_channels"], *_sizes(tensor["spatial_shape"]))
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, tensor["dtype"]))


def _sizes(shape: list[int | str]) -> tuple[int, ...]:
    """Sizes for n = 1, 3, 5 along the axes: ``16+n`` becomes 17, 19 and 21."""
    return tuple(
        _get_fake_spatial_shape([size], p=5, n=2 * axis + 1, any=17 + axis)[0] for axis, size in enumerate(shape)
    )


def _tensors(bundle: Bundle) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The described tensors; none where the description breaks the schema, which check_schema reports."""
    described = bundle.metadata.get("network_data_format")
    if jsonschema.Draft202012Validator(SCHEMA["properties"]["network_data_format"]).is_valid(described):
        for side in ("inputs", "outputs"):
            for name, tensor in described[side].items():  # type: ignore[index]
                yield side, name, tensor


def _channels(key: str) -> range:
    """The channels that a key of channel_def stands for: ``3`` or ``0-63``."""
    first, _, last = key.partition("-")
    return range(int(first), int(last or first) + 1)


def _dict(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    value = metadata.get(key)
    return value if isinstance(value, dict) else {}


def _is_installed(name: str) -> bool:
    try:
        installed.version(name)
    except installed.PackageNotFoundError:
        return find_spec(name.replace("-", "_").split(".")[0]) is not None
    return True
