"""Med3D networks for MONAI: exact MedicalNet encoders and what the bundles need around them.

Importing the package registers ``med3d_resnet10`` … ``med3d_resnet200`` as backbones of MONAI's FlexibleUNet.
"""

from __future__ import annotations

from med3d_nets.class_scores import ClassScores
from med3d_nets.classification import ClassificationNet, FeatureScale, parameter_groups
from med3d_nets.classifier_record import ClassifierRecord, read_record
from med3d_nets.datalist import read_datalist, split_by_patient
from med3d_nets.embedding import EmbeddingNet
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.evaluator import CaseEvaluator
from med3d_nets.features import FeatureWriter, find_weights
from med3d_nets.flexunet import Med3DEncoder
from med3d_nets.inputs import CheckCTd, LoadVolumed, find_cases
from med3d_nets.label_table import (
    cases_to_classify,
    class_weights,
    known_classes,
    read_labels,
    sample_weights,
    split_cases,
)
from med3d_nets.norm import PreciseNorm
from med3d_nets.preparation import CheckVolumed, PadAtEndd, median_spacing
from med3d_nets.registry import DEPTHS, WEIGHTS
from med3d_nets.resnet import Med3DResNet
from med3d_nets.results import SegmentationWriter
from med3d_nets.scores import CaseScores
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.switches import is_on
from med3d_nets.training import BestModel, Checkpoints, RandomState, latest_checkpoint
from med3d_nets.transforms import CheckLabeld, RandMirrord
from med3d_nets.weights import initialise, load_backbone, load_checkpoint, load_network, warn_overlap

__version__ = "0.1.0"
__all__ = [
    "DEPTHS",
    "WEIGHTS",
    "BestModel",
    "CaseEvaluator",
    "CaseScores",
    "CheckCTd",
    "CheckLabeld",
    "CheckVolumed",
    "Checkpoints",
    "ClassScores",
    "ClassificationNet",
    "ClassifierRecord",
    "EmbeddingNet",
    "FeatureScale",
    "FeatureWriter",
    "InputError",
    "LoadVolumed",
    "Med3DEncoder",
    "Med3DResNet",
    "PadAtEndd",
    "PreciseNorm",
    "RandMirrord",
    "RandomState",
    "SegmentationNet",
    "SegmentationWriter",
    "__version__",
    "cases_to_classify",
    "class_weights",
    "clear_errors",
    "find_cases",
    "find_weights",
    "initialise",
    "is_on",
    "known_classes",
    "latest_checkpoint",
    "load_backbone",
    "load_checkpoint",
    "load_network",
    "median_spacing",
    "parameter_groups",
    "read_datalist",
    "read_labels",
    "read_record",
    "sample_weights",
    "split_by_patient",
    "split_cases",
    "warn_overlap",
]
