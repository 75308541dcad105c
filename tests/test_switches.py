"""On and off, in every form in which they reach a config."""

from __future__ import annotations

from typing import Any

import pytest
from monai.bundle import ConfigParser

from med3d_nets import InputError, is_on
from tests.small_training import config


@pytest.mark.parametrize("value", [True, 1, "true", "True", " TRUE ", "1", "yes", "on"])
def test_on(value: Any) -> None:
    assert is_on(value) is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "0", "no", "off"])
def test_off(value: Any) -> None:
    assert is_on(value) is False


@pytest.mark.parametrize("value", ["", "maybe", None, 2, [True]])
def test_neither(value: Any) -> None:
    with pytest.raises(InputError, match="neither on nor off; give true or false"):
        is_on(value)


@pytest.mark.parametrize("name", ["inference", "evaluate"])
@pytest.mark.parametrize("key, transform", [("keep_largest", "KeepLargestConnected"), ("fill_holes", "FillHoles")])
def test_text_switches_postprocessing_off(name: str, key: str, transform: str) -> None:
    parser = ConfigParser.load_config_file(config(name))

    def names(value: Any) -> set[str]:
        one = ConfigParser({**parser, key: value}).get_parsed_content("postprocessing")
        return {type(step).__name__ for step in one.transforms if step is not None}

    assert any(step.startswith(transform) for step in names("true"))
    assert not any(step.startswith(transform) for step in names("false"))
