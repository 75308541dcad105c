"""A network run by OpenVINO on a CPU, in float32. The package is an extra: ``pip install med3d_nets[openvino]``."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import nn

from med3d_nets.errors import InputError

_EXAMPLE = (32, 40, 48)  # voxels; three lengths, lest one be taken for another


class OpenVINONet(nn.Module):
    """A network for inference, converted once for volumes of every size.

    Args:
        network: of one image argument, in evaluation mode, in float32 on the CPU; kept as ``.network``, for the
            estimate of memory.
        channels: of its input.

    Raises:
        InputError: the package openvino is missing.
    """

    def __init__(self, network: nn.Module, channels: int = 1) -> None:
        super().__init__()
        openvino = _package()
        self.network = network
        self.dtype = torch.float32
        example = torch.zeros(1, channels, *_EXAMPLE)
        with torch.no_grad():
            model = openvino.convert_model(
                network, example_input=example, input=openvino.PartialShape([-1, channels, -1, -1, -1])
            )
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 on CPUs that have it
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.compiled = openvino.Core().compile_model(model, "CPU", options)
        self.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenVINONet:
        """Copy the network; what is compiled is shared, for it cannot be copied."""
        memo[id(self.compiled)] = self.compiled
        copied = type(self).__new__(type(self))
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map an image, (B, C, X, Y, Z), to the network's output in float32."""
        x = torch.as_tensor(x).as_subclass(torch.Tensor)
        if x.device.type == "meta":
            logits: torch.Tensor = self.network(x)
            return logits
        return torch.from_numpy(self.compiled(x.detach().float().contiguous().numpy())[0])


def _package() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise InputError(
            "backend='openvino': the package openvino is missing. Run pip install openvino (or "
            "pip install 'med3d_nets[openvino]'), or leave backend at torch."
        ) from error
