"""Cases of many domains: which are trained on, how often each is drawn, which are scored.

Where the paper is silent (patch size, share of the domains) it says "project choice" and the value is a key of
``train.json``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.utils import set_rnd
from torch.utils.data import Dataset, Sampler

from med3d_nets.datalist import Case, read_datalist, split_by_patient
from med3d_nets.domain_record import label_values
from med3d_nets.errors import InputError
from med3d_nets.fingerprint import Fingerprint
from med3d_nets.manifest import Domain, read_manifest

_STRIDE = 8  # of the encoder; patches are multiples of twice that


def split_domains(
    domains: Sequence[Domain], val_fraction: float = 0.1, seed: int = 0, min_patients: int = 5
) -> tuple[list[Case], list[Case]]:
    """Part the cases of all domains, without those held out, into training and validation.

    Args:
        domains: as ``read_manifest`` gives them.
        val_fraction: share of each domain's patients for validation, where the manifest does not name them; the same
            seed takes the same patients of domains that share them.
        seed: of the choice.
        min_patients: domains of fewer patients have no validation (project choice).

    Returns:
        Cases for training and for validation, each with its ``domain``.
    """
    train: list[Case] = []
    val: list[Case] = []
    for domain in domains:
        cases = domain.training_cases()
        few = len({case["patient"] for case in cases}) < min_patients
        parts = split_by_patient(cases, 0.0 if few else val_fraction, seed, domain.val_patients)
        for whole, part in zip((train, val), parts, strict=True):
            whole += [{**case, "domain": domain.name} for case in part]
    return train, val


def with_settings(
    cases: Sequence[Case],
    domains: Sequence[Domain],
    found: Mapping[str, Fingerprint],
    patch_size: Sequence[int],
    fit_patch: bool = True,
) -> list[Case]:
    """Give each case what the transforms need to know of its domain.

    Args:
        cases: with their ``domain``.
        domains: the domains.
        found: fingerprints of the domains.
        patch_size: voxels of a training patch, at most.
        fit_patch: a domain whose median volume is smaller has smaller patches, the next multiples of 16 (project
            choice). False where one batch mixes domains.

    Returns:
        The cases with ``spacing``, ``patch_size``, what ``ClassIndexd`` needs, and ``fingerprint``, which changes with
        the domain's files.
    """
    by_name = {domain.name: domain for domain in domains}
    step = 2 * _STRIDE
    result = []
    for case in cases:
        domain, fingerprint = by_name[case["domain"]], found[case["domain"]]
        fitted = [
            min(int(most), step * math.ceil(size / step)) if fit_patch else int(most)
            for most, size in zip(patch_size, fingerprint["size_voxels"], strict=True)
        ]
        settings = {"spacing": fingerprint["spacing_mm"], "patch_size": fitted, "fingerprint": fingerprint["key"]}
        result.append({**case, **label_values(domain), **settings})
    return result


def cases_to_score(
    dataset_dir: str | Path, section: str, record: Mapping[str, Any], manifest: str | Path = "", domain: str = ""
) -> list[Case]:
    """List the cases of one domain that a network is scored on.

    Args:
        dataset_dir: Decathlon-style folder; with a manifest the folder where its relative paths start.
        section: list of the folder's ``dataset.json``, not used with a manifest.
        record: the domain's record, as ``pick_domain`` gives it, for the meaning of the label values.
        manifest: manifest of the training, whose held-out cases are scored.
        domain: name of the domain in it.

    Returns:
        Cases with what ``ClassIndexd`` needs.

    Raises:
        InputError: no such folder or domain, or the domain has no held-out case.
    """
    cases = read_datalist(dataset_dir, section) if not manifest else _held_out(manifest, dataset_dir, domain)
    return [{**case, **{key: record[key] for key in ("values", "background", "ignore")}} for case in cases]


def _held_out(manifest: str | Path, dataset_dir: str | Path, name: str) -> list[Case]:
    domains = {domain.name: domain for domain in read_manifest(manifest, dataset_dir)}
    if name not in domains:
        raise InputError(f"domain={name!r} is not in {manifest}, which has {', '.join(domains)}.")
    cases = domains[name].held_out_cases()
    if not cases:
        raise InputError(f"{manifest}: the domain {name} holds no patient out, so nothing unseen can be scored.")
    return cases


def sampling_weights(
    cases: Sequence[Case], domains: Sequence[Domain], temperature: float | str = 1.0
) -> dict[str, float]:
    """Share of each domain in the batches: its weight times (number of cases) ^ (1 / temperature) (project choice).

    Args:
        cases: training cases with their ``domain``.
        domains: the domains.
        temperature: 1 draws every case equally often, infinity every domain.

    Returns:
        Shares by domain; they add up to 1.

    Raises:
        InputError: the temperature is not above 0.
    """
    if not float(temperature) > 0:
        raise InputError(f"temperature={temperature}: allowed is above 0; inf draws every domain equally often.")
    counts = {domain.name: sum(case["domain"] == domain.name for case in cases) for domain in domains}
    raw = {domain.name: domain.weight * counts[domain.name] ** (1.0 / float(temperature)) for domain in domains}
    return {name: value / sum(raw.values()) for name, value in raw.items()}


class DomainSampler(Sampler):
    """Batches of a co-training: lists of (index of the case, seed of its augmentation).

    All processes draw the same batches from torch's generator and each takes every n-th, so that what is drawn does
    not depend on how many there are; nor does the augmentation, whose seed comes with the case.

    Args:
        cases: training cases with their ``domain`` and ``weight``.
        shares: of the domains, as ``sampling_weights`` gives them.
        batch_size: cases of a batch.
        batches: batches of an epoch, of all processes together; rounded up to a multiple of their number.
        mixed: each case of a batch is drawn from all domains; else a batch is of one domain.
        rank: of this process.
        processes: their number.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        shares: Mapping[str, float],
        batch_size: int,
        batches: int,
        mixed: bool = False,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.names = list(shares)
        self.shares = torch.tensor([shares[name] for name in self.names], dtype=torch.float64)
        self.indices = [[i for i, case in enumerate(cases) if case["domain"] == name] for name in self.names]
        self.weights = [torch.tensor([float(cases[i]["weight"]) for i in own]) for own in self.indices]
        self.batch_size = int(batch_size)
        self.steps = math.ceil(int(batches) / processes)
        self.mixed = mixed
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        """Batches of this process."""
        return self.steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Draw an epoch."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,))))
        for number in range(self.steps * self.processes):
            batch = self._draw(generator)
            if number % self.processes == self.rank:
                yield batch

    def _draw(self, generator: torch.Generator) -> list[tuple[int, int]]:
        count = self.batch_size if self.mixed else 1
        domains = torch.multinomial(self.shares, count, replacement=True, generator=generator).tolist()
        domains = domains if self.mixed else domains * self.batch_size
        seeds = torch.randint(2**31, (self.batch_size,), generator=generator).tolist()
        picks = [int(torch.multinomial(self.weights[d], 1, generator=generator)) for d in domains]
        return [(self.indices[d][pick], seed) for d, pick, seed in zip(domains, picks, seeds, strict=True)]


class SeededDataset(Dataset):
    """A dataset whose random transforms start from the seed that comes with the index.

    Args:
        dataset: a MONAI dataset with random transforms.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.dataset)

    def __getitem__(self, drawn: tuple[int, int]) -> Any:
        """Item ``drawn[0]`` with the augmentation of seed ``drawn[1]``."""
        index, seed = drawn
        set_rnd(self.dataset.transform, seed)
        return self.dataset[index]
