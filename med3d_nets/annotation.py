"""What the bundles need as models of a MONAI Label server.

The server loads a bundle's network itself, hands it to the bundle's ``inferer`` with each request, and serves
``models/model.pt``; its options reach a config as ``displayable_configs``.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from ignite import distributed as idist
from ignite.engine import Engine, Events
from monai.inferers import Inferer
from torch import nn

from med3d_nets.acceleration import BACKENDS, accelerate
from med3d_nets.coarse_to_fine import CoarseToFineNet
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.multidomain import MultiDomainNet
from med3d_nets.norm import bare
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.training import BestModel

PREVIOUS = "model_previous.pt"
"""Beside ``model.pt``: the weights that a training replaced. A longer name, for MONAI Label takes the shortest."""

# Accelerated copies of networks, for as long as those live, with the state of which they are copies.
_MADE: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, nn.Module]]] = weakref.WeakKeyDictionary()


def in_monai_label() -> bool:
    """Whether this process is one of MONAI Label's: its server, or a training that it started."""
    return "monailabel" in sys.modules


def refuse_monai_label(reason: str) -> None:
    """End a training that cannot work on MONAI Label's list of cases; elsewhere do nothing.

    Args:
        reason: why not, and what to do.

    Raises:
        InputError: this is MONAI Label.
    """
    if in_monai_label():
        raise InputError(reason)


def chosen(value: Any) -> Any:
    """Read an option that MONAI Label shows as a list: the one chosen, or of the whole list the first.

    Args:
        value: what the client chose; the list of all where it chose none.
    """
    return value[0] if isinstance(value, list | tuple) and value else value


class ServedInferer(Inferer):
    """Run a plain network of this package as ``accelerate`` makes it, so that a server's masks are those of the bundle.

    ``monai.bundle run`` hands over an accelerated network, MONAI Label the plain one, again with each request and to a
    new inferer; the accelerated copy is therefore kept with the network and made anew when that has changed. Any other
    network runs as it is, and so does one in training mode, for example for its dropout.

    Args:
        inferer: what computes the logits of a volume.
        precision: see ``accelerate``.
        backend: likewise; with another one (TensorRT, which has taken the encoder's place) the network runs as it is.
        compile: likewise.
        amp: compute in half precision on CUDA, as the bundle's evaluator does.
        branch: the domain whose branch of a MultiDomainNet computes.
    """

    def __init__(
        self,
        inferer: Inferer,
        precision: str = "auto",
        backend: str = "torch",
        compile: bool = False,
        amp: bool = False,
        branch: str = "",
    ) -> None:
        self.inferer = inferer
        self.how = (precision, backend, compile)
        self.amp = amp
        self.branch = branch

    def __call__(  # type: ignore[override]
        self, inputs: torch.Tensor, network: nn.Module, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Compute the logits of one volume.

        Args:
            inputs: the volume, (1, C, X, Y, Z).
            network: see above.
            args: what else the inferer takes.
            kwargs: the same by name.

        Returns:
            Logits, (1, classes, X, Y, Z).
        """
        with torch.autocast("cuda", enabled=self.amp and inputs.is_cuda):
            logits: torch.Tensor = self.inferer(inputs, self._ready(network), *args, **kwargs)
        return logits

    def _ready(self, network: nn.Module) -> nn.Module:
        plain = network
        if isinstance(network, MultiDomainNet) and self.branch:
            plain = network.branch(self.branch)
        is_ours = type(network) in (SegmentationNet, CoarseToFineNet, MultiDomainNet)
        if not is_ours or self.how[1] not in BACKENDS or any(module.training for module in network.modules()):
            return plain
        state = [(one.device, one._version) for one in itertools.chain(network.parameters(), network.buffers())]
        copies = _MADE.setdefault(network, {})
        key = (self.branch, *self.how)
        if key not in copies or copies[key][0] != state:
            copies[key] = (state, accelerate(plain, *self.how))
        return copies[key][1]


class UpdateModel:
    """Training handler that makes the result the bundle's ``models/model.pt``, the file that MONAI Label serves.

    That is the network with the best validation, or the last one where nothing was validated, for example because there
    is only one labelled scan. What it replaces is kept as ``model_previous.pt``.

    Args:
        path: the file to replace.
        network: the trained network, also when wrapped for several processes.
        best: handler of the validation, with the best weights so far.
        enabled: else nothing is done.
    """

    def __init__(self, path: str | Path, network: nn.Module, best: BestModel, enabled: bool = True) -> None:
        self.path = Path(path)
        self.network = network
        self.best = best
        self.enabled = enabled

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        if self.enabled:
            engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Replace the file, in the first process.

        Raises:
            InputError: it cannot be written.
        """
        if idist.get_rank() != 0:
            return
        if self.best.best > float("-inf"):
            state = torch.load(self.best.path, map_location="cpu", weights_only=True)
        else:
            state = bare(self.network).state_dict()
        if self.path.exists():
            with replacing(self.path.with_name(PREVIOUS)) as hidden:
                shutil.copyfile(self.path, hidden)
        with replacing(self.path) as hidden:
            torch.save(state, hidden)
        print(f"{self.path}: replaced by the trained weights; the former ones are {PREVIOUS}", flush=True)
