"""On and off, in every form in which they reach a config."""

from __future__ import annotations

from typing import Any

import pytest
from monai.bundle import ConfigParser

from med3d_nets import CleanLabelsd, InputError, is_on
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
@pytest.mark.parametrize("key, attribute", [("keep_largest", "largest"), ("fill_holes", "fill")])
def test_text_switches_postprocessing_off(name: str, key: str, attribute: str) -> None:
    parser = ConfigParser.load_config_file(config(name))

    def switched(value: str) -> bool:
        one = ConfigParser({**parser, key: value}).get_parsed_content("postprocessing")
        [clean] = [step for step in one.transforms if isinstance(step, CleanLabelsd)]
        return bool(getattr(clean, attribute))

    assert switched("true") and not switched("false")
