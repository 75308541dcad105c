"""Checks that build and run a bundle's network: metadata, weights, TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from med3d_nets.errors import InputError
from med3d_nets.weights import load_network
from tools.bundle_folder import Bundle, Fault
from tools.bundle_metadata import check_parameters, check_shapes, example

MAX_WEIGHTS_MB = 50.0
_WEIGHTS = "models/model.pt"


def check_network(bundle: Bundle, script: bool = True) -> Iterator[Fault]:
    """Build the network once and hold everything that describes it against it.

    Args:
        bundle: the bundle.
        script: also compile it with TorchScript, which takes most of the time.
    """
    if "inference" not in bundle.configs:
        return
    try:
        network = bundle.network
    except Exception as error:  # building runs the code that the config names
        yield Fault("configs/inference.json", f"network_def cannot be built ({_reason(error)})", "correct it")
        return
    yield from check_parameters(bundle, network)
    if bundle.weights:
        yield from check_weights(bundle.weights, network)
    shape_faults = list(check_shapes(bundle, network))
    yield from shape_faults
    if script and not shape_faults:
        yield from check_torchscript(bundle, network)


def check_weights(path: Path, network: nn.Module) -> Iterator[Fault]:
    """A bare state dict that loads safely and strictly, and is not too large; it is left in the network."""
    size = path.stat().st_size / 1e6
    if size > MAX_WEIGHTS_MB:
        yield Fault(_WEIGHTS, f"{size:.0f} MB, at most {MAX_WEIGHTS_MB:g} MB belong in a bundle", "ship half precision")
    try:
        load_network(network, path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        yield Fault(_WEIGHTS, str(error), "ship the weights of this bundle's network")
        return
    if set(state) != set(network.state_dict()):
        yield Fault(_WEIGHTS, "the state dict is wrapped, or its keys have a prefix", "ship a bare state dict")


def check_torchscript(bundle: Bundle, network: nn.Module) -> Iterator[Fault]:
    """TorchScript compiles the network, and its output is the same."""
    image = example(bundle)
    if image is None:
        return
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # torch announces the end of TorchScript; MONAI's export still uses it
            expected, got = network(image), torch.jit.script(network)(image)
        torch.testing.assert_close(got, expected)
    except Exception as error:  # the compiler raises many types
        wrong = f"TorchScript export fails ({_reason(error)})"
        yield Fault("configs/inference.json", wrong, "change the network's code")


def _reason(error: BaseException) -> str:
    """First line of what began it; MONAI wraps the exceptions of what it builds."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
