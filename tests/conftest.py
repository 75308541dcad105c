"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REAL_DATA = os.environ.get("MED3D_DATA", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests on real volumes out where MED3D_DATA does not name the folder that holds them."""
    if not REAL_DATA:
        reason = "MED3D_DATA does not point to the real volumes"
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skipif(True, reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """Folder of real volumes."""
    return Path(REAL_DATA)
