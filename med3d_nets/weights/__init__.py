"""Weights: where they come from, how they load, and what they become."""

from __future__ import annotations

from med3d_nets.weights.loading import initialise, load_backbone, load_network
from med3d_nets.weights.states import detect_architecture, file_sha256, read_state_dict

__all__ = [
    "detect_architecture",
    "file_sha256",
    "initialise",
    "load_backbone",
    "load_network",
    "read_state_dict",
]
