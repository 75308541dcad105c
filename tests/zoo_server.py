"""A zoo of two bundles, one without weights, and a server of it on the loopback interface."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import zoo
from tools.zoo_server import Zoo

LUNG = "lung_ct_segmentation_resnet10"
SMALL = "lung_ct_segmentation_resnet18"  # no weights


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "dist"
    zoo.pack(LUNG, SMALL, out=str(folder), fast=True)
    return folder


@pytest.fixture
def served(dist: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Address and folder of a zoo of its own, for tests that tamper with it."""
    folder = shutil.copytree(dist, tmp_path / "dist")
    server = Zoo(folder, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()
