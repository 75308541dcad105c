"""On or off, as a config, a command line or a client writes it."""

from __future__ import annotations

from typing import Any

from med3d_nets.errors import InputError

_WORDS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def is_on(value: Any) -> bool:
    """Read a switch: ``--resume false`` reaches a config as the text ``"false"``, which Python takes for true.

    Args:
        value: a bool, 0 or 1, or one of the words true, yes, on, false, no, off in any case.

    Returns:
        Whether it is on.

    Raises:
        InputError: the value is none of these.
    """
    switch = _WORDS.get(str(value).strip().lower())
    if switch is None:
        raise InputError(f"{value!r} is neither on nor off; give true or false.")
    return switch
