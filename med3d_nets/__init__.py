"""Med3D networks for MONAI: exact MedicalNet encoders and what the bundles need around them.

Importing the package registers ``med3d_resnet10`` … ``med3d_resnet200`` as backbones of MONAI's FlexibleUNet.
"""

from __future__ import annotations

from med3d_nets.acceleration import accelerate
from med3d_nets.annotation import ServedInferer, UpdateModel, chosen, in_monai_label, refuse_monai_label
from med3d_nets.auxiliary_training import AuxiliaryLoss, AuxiliaryTraining, known_columns, with_auxiliary
from med3d_nets.caching import cached_dataset
from med3d_nets.class_scores import ClassScores
from med3d_nets.classification import ClassificationNet, FeatureScale, class_loss, parameter_groups
from med3d_nets.classifier_ensemble import ClassifierEnsemble, calibrate, load_ensemble, weights_files
from med3d_nets.classifier_record import ClassifierRecord, read_record, settings_of
from med3d_nets.coarse_to_fine import CoarseToFineInferer, CoarseToFineNet
from med3d_nets.components import CleanLabelsd
from med3d_nets.datalist import read_datalist, split_by_patient
from med3d_nets.detection import BoxDetector, DetectionNet
from med3d_nets.detection_data import PointsToBoxesd, RandBoxPatchd
from med3d_nets.detection_inferer import DetectionInferer, WorldBoxesd
from med3d_nets.detection_training import Cpm, DetectionLoss
from med3d_nets.domain_data import (
    DomainSampler,
    SeededDataset,
    cases_to_score,
    sampling_weights,
    split_domains,
    with_settings,
)
from med3d_nets.domain_record import DomainRecord, pick_domain, read_domains
from med3d_nets.domain_scores import DomainDice
from med3d_nets.domain_transforms import ClassIndexd, DomainSpacingd, LeaveOutUnknownd, RandPatchd
from med3d_nets.embedding import EmbeddingNet
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.evaluator import CaseEvaluator
from med3d_nets.features import FeatureWriter, find_weights
from med3d_nets.findings import FindingsWriter
from med3d_nets.fingerprint import fingerprints
from med3d_nets.flexunet import Med3DEncoder
from med3d_nets.froc_scores import FrocScores
from med3d_nets.inferer import WholeVolumeInferer
from med3d_nets.inputs import CheckCTd, LoadVolumed, find_cases
from med3d_nets.label_table import (
    cases_to_classify,
    class_weights,
    known_classes,
    read_labels,
    sample_weights,
    split_cases,
)
from med3d_nets.luna import CheckPointsd, read_luna, split_luna
from med3d_nets.lung_field import CropLungsd
from med3d_nets.manifest import read_manifest
from med3d_nets.modality import IntensityByModalityd
from med3d_nets.multidomain import CoTraining, DomainInferer, DomainLoss, MultiDomainNet
from med3d_nets.native_labels import NativeLabelsd
from med3d_nets.nodule_labels import positive_weights, read_nodules, split_nodules, unseen
from med3d_nets.nodule_scores import NoduleScores
from med3d_nets.nodule_table import NoduleTable
from med3d_nets.norm import PreciseNorm
from med3d_nets.point_crop import CropAtPointd, LoadScand
from med3d_nets.predictions import PredictionWriter
from med3d_nets.preparation import CheckVolumed, PadAtEndd, median_spacing
from med3d_nets.processes import join_processes, share_cases
from med3d_nets.registry import DEPTHS, WEIGHTS
from med3d_nets.resampling import ResampleRASd
from med3d_nets.resnet import Med3DResNet
from med3d_nets.results import SegmentationWriter
from med3d_nets.scores import CaseScores
from med3d_nets.seed_points import nodules_to_classify, wants_features
from med3d_nets.segmentation import SegmentationNet
from med3d_nets.switches import is_on
from med3d_nets.tensorrt_net import with_tensorrt
from med3d_nets.training import BestModel, Checkpoints, OneCycle, RandomState, latest_checkpoint
from med3d_nets.transforms import CheckLabeld, RandMirrord
from med3d_nets.two_stage_training import RandStagesd, TwoStageLoss, TwoStageTraining
from med3d_nets.weights import initialise, load_backbone, load_checkpoint, load_network, warn_overlap

__version__ = "0.1.0"
__all__ = [
    "DEPTHS",
    "WEIGHTS",
    "AuxiliaryLoss",
    "AuxiliaryTraining",
    "BestModel",
    "BoxDetector",
    "CaseEvaluator",
    "CaseScores",
    "CheckCTd",
    "CheckLabeld",
    "CheckPointsd",
    "CheckVolumed",
    "Checkpoints",
    "ClassIndexd",
    "ClassScores",
    "ClassificationNet",
    "ClassifierEnsemble",
    "ClassifierRecord",
    "CleanLabelsd",
    "CoTraining",
    "CoarseToFineInferer",
    "CoarseToFineNet",
    "Cpm",
    "CropAtPointd",
    "CropLungsd",
    "DetectionInferer",
    "DetectionLoss",
    "DetectionNet",
    "DomainDice",
    "DomainInferer",
    "DomainLoss",
    "DomainRecord",
    "DomainSampler",
    "DomainSpacingd",
    "EmbeddingNet",
    "FeatureScale",
    "FeatureWriter",
    "FindingsWriter",
    "FrocScores",
    "InputError",
    "IntensityByModalityd",
    "LeaveOutUnknownd",
    "LoadScand",
    "LoadVolumed",
    "Med3DEncoder",
    "Med3DResNet",
    "MultiDomainNet",
    "NativeLabelsd",
    "NoduleScores",
    "NoduleTable",
    "OneCycle",
    "PadAtEndd",
    "PointsToBoxesd",
    "PreciseNorm",
    "PredictionWriter",
    "RandBoxPatchd",
    "RandMirrord",
    "RandPatchd",
    "RandStagesd",
    "RandomState",
    "ResampleRASd",
    "SeededDataset",
    "SegmentationNet",
    "SegmentationWriter",
    "ServedInferer",
    "TwoStageLoss",
    "TwoStageTraining",
    "UpdateModel",
    "WholeVolumeInferer",
    "WorldBoxesd",
    "__version__",
    "accelerate",
    "cached_dataset",
    "calibrate",
    "cases_to_classify",
    "cases_to_score",
    "chosen",
    "class_loss",
    "class_weights",
    "clear_errors",
    "find_cases",
    "find_weights",
    "fingerprints",
    "in_monai_label",
    "initialise",
    "is_on",
    "join_processes",
    "known_classes",
    "known_columns",
    "latest_checkpoint",
    "load_backbone",
    "load_checkpoint",
    "load_ensemble",
    "load_network",
    "median_spacing",
    "nodules_to_classify",
    "parameter_groups",
    "pick_domain",
    "positive_weights",
    "read_datalist",
    "read_domains",
    "read_labels",
    "read_luna",
    "read_manifest",
    "read_nodules",
    "read_record",
    "refuse_monai_label",
    "sample_weights",
    "sampling_weights",
    "settings_of",
    "share_cases",
    "split_by_patient",
    "split_cases",
    "split_domains",
    "split_luna",
    "split_nodules",
    "unseen",
    "wants_features",
    "warn_overlap",
    "weights_files",
    "with_auxiliary",
    "with_settings",
    "with_tensorrt",
]
