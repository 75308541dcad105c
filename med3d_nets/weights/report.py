"""What is known about weights, for people and for programs: the registry as a table, a file's description."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from med3d_nets.registry import WEIGHTS, Weight
from med3d_nets.weights import store
from med3d_nets.weights.states import (
    State,
    detect_architecture,
    file_sha256,
    foreign_layout,
    listed,
    read_state_dict,
    split_head,
)

_COLUMNS = ("name", "kind", "depth", "shortcut", "stride", "datasets", "licence", "size", "sha256", "present")
_ELSEWHERE = (
    "other code may compute another function from the same tensors: MONAI's ResNet has strides 2 and no dilation in "
    "layer3 and layer4"
)


def records() -> list[dict[str, Any]]:
    """The registry with each file's names and place, ready for JSON."""
    return [
        {
            **dataclasses.asdict(record),
            "datasets": list(record.datasets),
            "file": record.file,
            "url": record.url,
            "found": _found(record),
        }
        for record in WEIGHTS.values()
    ]


def table() -> str:
    """The registry as aligned text, one line per file; ``present`` says that a file is there, not that it is whole."""
    rows = [_COLUMNS, *(_row(record) for record in WEIGHTS.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_json(value: object) -> str:
    """A value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def describe(path: str | Path) -> dict[str, Any]:
    """Read a weights file and say what it holds.

    Args:
        path: checkpoint, ``.pt``, ``.pth`` or ``.safetensors``.

    Returns:
        By name: ``file``, ``sha256``, ``registry`` (its name there, or None), ``tensors``, ``dtypes``, ``depth``,
        ``shortcut`` and ``in_channels`` (None where they cannot be read off), ``head`` (names of the other tensors)
        and ``notes`` on the function.

    Raises:
        InputError: the file is absent, or is no checkpoint.
    """
    state = read_state_dict(path)
    encoder, head = split_head(state)
    depth, shortcut = detect_architecture(encoder) or (None, None)
    stem = encoder.get("conv1.weight")
    digest = file_sha256(path)
    record = next((record for record in WEIGHTS.values() if record.sha256 == digest), None)
    return {
        "file": str(path),
        "sha256": digest,
        "registry": record.name if record else None,
        "tensors": len(state),
        "dtypes": sorted({str(value.dtype).removeprefix("torch.") for value in state.values()}),
        "depth": depth,
        "shortcut": shortcut,
        "in_channels": stem.shape[1] if stem is not None and stem.ndim == 5 else None,
        "head": list(head),
        "notes": _notes(record, depth, state),
    }


def described(path: str | Path) -> str:
    """``describe`` as text for people; see there."""
    facts = describe(path)
    facts["dtypes"] = ", ".join(facts["dtypes"])
    facts["head"] = listed("tensors", facts["head"])
    facts["registry"] = facts["registry"] or "not in the registry"
    notes = facts.pop("notes")
    lines = [f"{name:<12}{'unknown' if value is None else value}" for name, value in facts.items()]
    return "\n".join([*lines, *(f"{'note':<12}{note}" for note in notes)])


def _notes(record: Weight | None, depth: int | None, state: State) -> list[str]:
    notes = [foreign_layout(state)] if foreign_layout(state) else []
    if record is not None:
        notes.append(f"trained at output stride {record.output_stride} on: {'; '.join(record.datasets)}")
        notes += [record.note] if record.note else []
    elif depth is not None:
        notes.append("the output stride cannot be read off tensors; that of the published networks is 8")
    return [*notes, _ELSEWHERE] if depth is not None else notes


def _row(record: Weight) -> tuple[str, ...]:
    size = f"{record.size / 1e6:.1f} MB" if record.size else "unknown"
    return (
        record.name,
        record.kind,
        str(record.depth),
        record.shortcut,
        str(record.output_stride),
        _datasets(record),
        record.licence,
        size,
        record.sha256[:8],
        "yes" if _found(record) else "no",
    )


def _datasets(record: Weight) -> str:
    """The number, and the first words; --json has them whole."""
    if record.datasets[0].startswith("unknown"):
        return "23, unknown" if record.name.endswith("_23dataset") else "unknown"
    return f"{len(record.datasets)}, {record.datasets[0].split(' (')[0]}, …"


def _found(record: Weight) -> str | None:
    path = store.find(record.name)
    return str(path) if path else None
