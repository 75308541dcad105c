"""Weights: where they come from, how they load, and what they become."""

from __future__ import annotations

from med3d_nets.weights.convert import Conversion, convert
from med3d_nets.weights.fetch import fetch
from med3d_nets.weights.loading import Account, initialise, load_backbone, load_checkpoint, load_network
from med3d_nets.weights.provenance import Overlap, overlap, warn_overlap
from med3d_nets.weights.states import detect_architecture, file_sha256, read_state_dict
from med3d_nets.weights.store import resolve, verify, where

__all__ = [
    "Account",
    "Conversion",
    "Overlap",
    "convert",
    "detect_architecture",
    "fetch",
    "file_sha256",
    "initialise",
    "load_backbone",
    "load_checkpoint",
    "load_network",
    "overlap",
    "read_state_dict",
    "resolve",
    "verify",
    "warn_overlap",
    "where",
]
