"""Med3D networks for MONAI: exact MedicalNet encoders and what the bundles need around them.

Importing the package registers ``med3d_resnet10`` … ``med3d_resnet200`` as backbones of MONAI's FlexibleUNet.
"""

from __future__ import annotations

from med3d_nets.datalist import read_datalist, split_by_patient
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.evaluator import CaseEvaluator
from med3d_nets.flexunet import Med3DEncoder
from med3d_nets.inputs import CheckCTd, LoadVolumed, find_cases
from med3d_nets.norm import PreciseNorm
from med3d_nets.registry import DEPTHS, WEIGHTS
from med3d_nets.resnet import Med3DResNet
from med3d_nets.results import SegmentationWriter
from med3d_nets.scores import CaseScores
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.switches import is_on
from med3d_nets.training import BestModel, Checkpoints, RandomState, latest_checkpoint
from med3d_nets.transforms import CheckLabeld, RandMirrord
from med3d_nets.weights import initialise, load_backbone, load_network

__version__ = "0.1.0"
__all__ = [
    "DEPTHS",
    "WEIGHTS",
    "BestModel",
    "CaseEvaluator",
    "CaseScores",
    "CheckCTd",
    "CheckLabeld",
    "Checkpoints",
    "InputError",
    "LoadVolumed",
    "Med3DEncoder",
    "Med3DResNet",
    "PreciseNorm",
    "RandMirrord",
    "RandomState",
    "SegmentationNet",
    "SegmentationWriter",
    "__version__",
    "clear_errors",
    "find_cases",
    "initialise",
    "is_on",
    "latest_checkpoint",
    "load_backbone",
    "load_network",
    "read_datalist",
    "split_by_patient",
]
