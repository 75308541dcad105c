"""What a trained co-training network needs beside its weights: ``domains.json`` in the folder of its ``model.pt``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ignite import distributed as idist
from ignite.engine import Engine, Events

from med3d_nets.datalist import Case
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.fingerprint import Fingerprint
from med3d_nets.manifest import Domain

NAME = "domains.json"
_CLIP_PERCENTILES = (0.5, 99.5)  # of records that do not tell theirs


class DomainRecord:
    """Training handler that writes ``domains.json`` when the training starts.

    Args:
        path: file to write.
        domains: the domains of the training.
        fingerprints: their fingerprints.
        split: cases for training and for validation, each with its ``domain``.
        clip_percentiles: where the intensities of each volume are clipped.
        resume: the training goes on, so that all of this must be as in the record that is there.
    """

    def __init__(
        self,
        path: str | Path,
        domains: Sequence[Domain],
        fingerprints: Mapping[str, Fingerprint],
        split: tuple[Sequence[Case], Sequence[Case]],
        clip_percentiles: Sequence[float] = _CLIP_PERCENTILES,
        resume: bool = False,
    ) -> None:
        self.path = Path(path)
        more = {"clip_percentiles": list(clip_percentiles)}
        self.records = {
            domain.name: {**domain_record(domain, fingerprints[domain.name]), **more, "split": _digest(domain, split)}
            for domain in domains
        }
        self.resume = resume

    def attach(self, engine: Engine) -> None:
        """Attach to the trainer."""
        engine.add_event_handler(Events.STARTED, self)

    def __call__(self, engine: Engine) -> None:
        """Write, in the first process.

        Raises:
            InputError: the training that goes on has other domains, classes, spacings, percentiles or patients.
        """
        if self.resume and read_domains(self.path.with_name("model.pt")) != self.records:
            raise InputError(
                f"{self.path}: the training that was begun has other domains, classes, spacings, clip_percentiles or "
                "patients for training and validation. Resume with the same settings, or give another output_dir."
            )
        if idist.get_rank() == 0:
            with replacing(self.path) as hidden:
                hidden.write_text(f"{json.dumps(self.records, indent=2)}\n", encoding="utf-8")


def domain_record(domain: Domain, fingerprint: Fingerprint) -> dict[str, Any]:
    """What inference and scoring need to know of a domain.

    Returns:
        ``modality``, ``classes`` (names in order), ``spacing`` (mm), and ``label_values``.
    """
    return {
        "modality": domain.modality,
        "classes": list(domain.classes),
        "spacing": list(fingerprint["spacing_mm"]),
        **label_values(domain),
    }


def _digest(domain: Domain, split: tuple[Sequence[Case], Sequence[Case]]) -> str:
    """Changes with the domain's cases for training and for validation, of which the record need not tell the names."""
    own = [sorted(case["case"] for case in part if case["domain"] == domain.name) for part in split]
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]


def label_values(domain: Domain) -> dict[str, list[Any]]:
    """Label values in the domain's own files: ``values`` of each class, of ``background``, and to ``ignore``."""
    return {
        "values": [list(values) for values in domain.classes.values()],
        "background": list(domain.background),
        "ignore": list(domain.ignore),
    }


def read_domains(weights: str | Path) -> dict[str, dict[str, Any]]:
    """Read the ``domains.json`` beside the weights of a co-training.

    Args:
        weights: its ``model.pt`` or ``model_last.pt``.

    Returns:
        Records by domain, see ``domain_record``.

    Raises:
        InputError: there is none, or it is none.
    """
    path = Path(weights).expanduser().with_name(NAME)
    if not path.is_file():
        raise InputError(f"{path}: no record of the domains. Keep {NAME} of the training's folder beside its weights.")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        whole = all(record["classes"] and record["spacing"] for record in records.values())
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is no record of domains ({error}). Copy it again from the training.") from error
    if not records or not whole:
        raise InputError(f"{path}: has no domain, or one without classes or spacing. Copy it again from the training.")
    return records


def pick_domain(records: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Look up the record of one domain.

    Args:
        records: as ``read_domains`` gives them.
        name: of the domain; may be empty where there is only one.

    Returns:
        Its record, with its ``name`` and ``clip_percentiles``.

    Raises:
        InputError: there is no such domain; says which there are.
    """
    if not name and len(records) == 1:
        name = next(iter(records))
    if name not in records:
        known = "\n".join(f"  {one}: {', '.join(r['classes'])} ({r['modality']})" for one, r in records.items())
        found = f"domain={name!r} is not known" if name else "no domain is given"
        raise InputError(f"{found}. Pick a branch with --domain NAME, one of\n{known}")
    return {"name": name, "clip_percentiles": list(_CLIP_PERCENTILES), **records[name]}
