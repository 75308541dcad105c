"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from med3d_nets.errors import InputError

_HIDDEN = ".partial_"


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a hidden path beside ``path`` to write to, which takes its place when the block ends without an error.

    Args:
        path: the file to write; folders above it are made, what it held before stays until then.

    Yields:
        The hidden path, with the same suffixes.

    Raises:
        InputError: the file cannot be written, for example because the disk is full.

    Example:
        >>> with replacing("scores.json") as hidden:
        ...     _ = hidden.write_text("{}")
    """
    path = Path(path)
    hidden = path.with_name(f"{_HIDDEN}{os.getpid()}_{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield hidden
        os.replace(hidden, path)
    except (OSError, RuntimeError) as error:  # torch.save raises either when the disk is full
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be written ({reason}). Free space or write to another folder.") from error
    finally:
        with contextlib.suppress(OSError):
            hidden.unlink()


def set_aside(path: Path) -> None:
    """Give a file, if there is one, the suffix ``.old``."""
    if path.exists():
        os.replace(path, f"{path}.old")


def remove_partial(folder: Path, names: Collection[str]) -> None:
    """Remove what a process that was killed while it wrote has left of files.

    Args:
        folder: of the files.
        names: of the files, which no other process is writing now.
    """
    for path in folder.glob(f"{_HIDDEN}*"):
        if path.name.removeprefix(_HIDDEN).partition("_")[2] in names:
            path.unlink(missing_ok=True)
