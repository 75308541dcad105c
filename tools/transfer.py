"""The transfer benchmark: what a pretrained encoder is worth at little data, against the same network from scratch.

    python -m tools.transfer run --data DATA --out RUNS [--targets …] [--fractions …] [--arms …] [--modes …]
    python -m tools.transfer table                the CSV as a Markdown table
    python -m tools.transfer summary              the README's table
    python -m tools.transfer plot                 a figure for each target

Targets are the domains of the manifest and of `--target_manifest` (segmentation), and `malignancy` (benign or malign
nodules of nodule_ct and its metadata.csv). Arms are `scratch`, `med3d_real8`, and names or paths of encoders. When a
target is one of the eight domains, `med3d_real8` is pre-trained anew without it. The learning rate of each arm and mode
is tuned on the validation split at one fraction; the held-out patients of the manifest are scored once. What is in the
CSV is not run again.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import fire

from med3d_nets import fingerprints, read_manifest
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.tables import Row, csv_text, read_rows
from tools import transfer_report
from tools.bundle_run import commit, machine
from tools.cotraining import BATCHES, EPOCHS, MANIFEST, PATCH, pretrain, run_name
from tools.transfer_tasks import MALIGNANCY, Budget, Outcome, Task, task_of

CSV = transfer_report.CSV
FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
MODES = {"frozen": 5, "partial": 3, "full": 0}  # stages of the encoder that are not trained
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of the encoder; the search begins in the middle
TUNED_AT, TUNING_SEED = 0.1, 1000  # fraction of the data, and the first of the seeds that no run has
OWN = transfer_report.OWN

Setting = tuple[str, str, str]  # target, arm and mode
TUNED_BY = ("target", "arm", "mode", "budget", "pretraining")  # what a learning rate is searched for
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")
_WRITING = Lock()


@dataclass(frozen=True)
class Run:
    """One training of the benchmark; its fields are the first columns of the CSV."""

    target: str
    arm: str
    mode: str
    fraction: float
    seed: int

    @property
    def setting(self) -> Setting:
        """What has one learning rate."""
        return self.target, self.arm, self.mode

    def name(self, encoder: str, rate: float) -> str:
        """Name of its folder."""
        return f"{self.target}-{_start(self.arm, encoder)}-{self.mode}-{self.fraction:g}-{self.seed}-rate_{rate:g}"


def run(
    data: str,
    out: str,
    targets: str | Sequence[str] = ("malignancy", "hippocampus_mr"),
    fractions: float | Sequence[float] = FRACTIONS,
    arms: str | Sequence[str] = ("scratch", OWN),
    modes: str | Sequence[str] = ("full", "partial", "frozen"),
    seeds: int = 3,
    tuning_seeds: int = 3,
    rate: float = 0.0,
    leave_out: str | Sequence[str] = (),
    pretrain_epochs: int = EPOCHS,
    pretrain_batches: int = BATCHES,
    pretrain_patch: int = PATCH,
    jobs: int = 1,
    manifest: str = str(MANIFEST),
    target_manifest: str = "",
    to: str = str(CSV),
    **budget: Any,
) -> None:
    """Train and score whatever the CSV lacks, a row after each training: first encoders, then rates, then the runs.

    Args:
        data: folder where the manifest's paths start.
        out: folder for pre-trainings and runs; what is finished there is not repeated.
        targets: domains of the manifests, or ``malignancy``.
        fractions: shares of the training patients.
        arms: ``scratch``, ``med3d_real8``, names of the registry or paths of encoders.
        modes: ``full``, ``partial`` (stem to layer2 are not trained), ``frozen``; scratch is trained in full alone.
        seeds: number of seeds; each draws its own part of the patients and its own network.
        tuning_seeds: trainings of each learning rate that is tried; one can win by chance (docs/co-training.md).
        rate: one learning rate for all arms and modes, instead of the search.
        leave_out: domains that the project's own encoders do not see besides the target's, so that several targets
            can share one.
        pretrain_epochs: epochs of its pre-training.
        pretrain_batches: batches of such an epoch.
        pretrain_patch: edge of its patches, in voxels.
        jobs: trainings at a time.
        manifest: the domains of the pre-training.
        target_manifest: further targets, which no pre-training of this project sees: any Decathlon-style folder.
        to: CSV file.
        budget: fields of ``Budget``, the same for all arms.

    Raises:
        InputError: an unknown target, mode or arm, rows of the target with another budget or from another encoder of
            this project, or a training that failed.
    """
    plan = list(_plan(_listed(targets), _listed(arms), _listed(modes), _listed(fractions), seeds))
    limits, folder = Budget(**budget), Path(out)
    domains = read_manifest(manifest, data)
    further = read_manifest(target_manifest, data) if target_manifest else []
    tasks = {name: task_of(name, [*domains, *further], folder, limits) for name in {one.target for one in plan}}
    wanted = _not_done(plan, read(to), limits, to)
    to_check = [tasks[name].source for name in {one.target for one in wanted} - {MALIGNANCY}]
    fingerprints(to_check, folder / "fingerprints", quiet=True)  # a fault is told before hours of pre-training
    own = {one.target for one in wanted if one.arm == OWN}
    seen = {domain.name for domain in domains}
    unseen = {name: ",".join(sorted({tasks[name].domain} & seen | {*_listed(leave_out)})) for name in own}

    def pretrained(names: str) -> str:
        budget_of_it = {"epochs": pretrain_epochs, "batches": pretrain_batches, "patch": pretrain_patch}
        return pretrain(data, out, manifest, leave_out=names, **budget_of_it)

    batches = pretrain_epochs * pretrain_batches
    _check_encoders(read(to), {name: _told(batches, pretrain_patch, run_name(unseen[name])) for name in own}, to)
    made = _each(jobs, pretrained, sorted(set(unseen.values())))

    def encoder(one: Run) -> str:
        return {"scratch": "", OWN: made.get(unseen.get(one.target, ""), "")}.get(one.arm, one.arm)

    settings = {one.setting: (one, tasks[one.target], encoder(one)) for one in wanted}
    rates = dict.fromkeys(settings, rate) if rate else _tuned_rates(settings, folder, tuning_seeds, jobs)

    def train(one: Run) -> None:
        own_rate, task = rates[one.setting], tasks[one.target]
        name = one.name(encoder(one), own_rate)
        print(name, flush=True)
        outcome = task.train_and_score(name, encoder(one), MODES[one.mode], one.fraction, one.seed, own_rate)
        _append(to, {**vars(one), **_row(outcome, own_rate, limits, encoder(one))})
        task.tidy(name)

    _each(jobs, train, wanted)
    print(transfer_report.table(to))


def _each(jobs: int, work: Callable[[Item], Result], items: Sequence[Item]) -> dict[Item, Result]:
    """Result of ``work`` for each item, with a number of items at a time; the first error ends what has not begun."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = {item: pool.submit(work, item) for item in items}
        try:
            return {item: future.result() for item, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def read(path: str | Path) -> list[Row]:
    """Rows of a CSV of this benchmark; none where it is not there yet."""
    return read_rows(Path(path), ("target", "arm", "mode", "budget", "seed")) if Path(path).is_file() else []


def _plan(
    targets: Sequence[str], arms: Sequence[str], modes: Sequence[str], fractions: Sequence[float], seeds: int
) -> Iterator[Run]:
    """Runs in an order in which an interrupted benchmark is already a comparison: seed by seed, all arms."""
    unknown = sorted(set(modes) - set(MODES))
    if unknown:
        raise InputError(f"modes {unknown}: allowed are {', '.join(MODES)}.")
    if any(not 0 < float(fraction) <= 1 for fraction in fractions):
        raise InputError(f"fractions {list(fractions)}: allowed is above 0 to 1.")
    for target, seed, fraction, mode, arm in itertools.product(targets, range(seeds), fractions, modes, arms):
        if arm != "scratch" or mode == "full":
            yield Run(target, arm, mode, float(fraction), seed)


def _not_done(plan: Sequence[Run], rows: Sequence[Row], limits: Budget, path: str) -> list[Run]:
    """What the CSV lacks; rows of a target are compared with each other, so that all must have one budget."""
    other = {row["budget"] for row in rows if row["target"] in {one.target for one in plan}} - {str(limits)}
    if other:
        raise InputError(
            f"{path}: has rows of these targets with {' and '.join(sorted(other))}, now {limits} is asked for, and "
            "they would be compared. Give another file (--to) or delete those rows."
        )
    done = {_key(row) for row in rows}
    return [one for one in plan if _key(vars(one)) not in done]


def _check_encoders(rows: Sequence[Row], expected: dict[str, str], path: str) -> None:
    """Rows of a target from the project's own encoder are averaged, so that all must be from the same one."""
    for target, encoder in expected.items():
        other = {row["pretraining"] for row in rows if (row["target"], row["arm"]) == (target, OWN)} - {encoder}
        if other:
            raise InputError(
                f"{path}: has rows of {target} from an encoder of {' and '.join(sorted(other))}, now one of {encoder} "
                "is asked for, and they would be averaged. Give another file (--to) or delete those rows."
            )


def _tuned_rates(
    settings: dict[Setting, tuple[Run, Task, str]], out: Path, seeds: int, jobs: int
) -> dict[Setting, float]:
    """The best learning rate of each arm and mode by mean validation score, at one fraction and seeds that no run has.

    From the middle of the rates, neighbours of the best are tried until none is better; what a round lacks is trained
    ``jobs`` at a time.
    """
    path, draws = out / "tuning.csv", range(TUNING_SEED, TUNING_SEED + seeds)
    scores = {
        (setting, float(row["learning_rate"]), int(row["seed"])): float(row["validation"])
        for setting, (_, task, encoder) in settings.items()
        for row in read(path)
        if tuple(row.get(name) for name in TUNED_BY) == (*setting, str(task.budget), _pretraining(encoder))
    }

    def train(key: tuple[Setting, float, int]) -> None:
        setting, rate, seed = key
        one, task, encoder = settings[setting]
        name = f"tuning-{one.target}-{_start(one.arm, encoder)}-{one.mode}-{rate:g}-{seed}"
        scores[key] = task.train(name, encoder, MODES[one.mode], TUNED_AT, seed, rate)
        known = dict(zip(TUNED_BY, (*setting, str(task.budget), _pretraining(encoder)), strict=True))
        _append(path, {**known, "learning_rate": rate, "seed": seed, "validation": scores[key]})
        task.tidy(name)

    def mean(setting: Setting, rate: float) -> float:
        return statistics.fmean(scores[setting, rate, seed] for seed in draws)

    best, before = dict.fromkeys(settings, len(RATES) // 2), dict.fromkeys(settings, -1)
    while best != before:
        before = best
        near = {setting: RATES[max(0, index - 1) : index + 2] for setting, index in best.items()}
        keys = itertools.chain(*(itertools.product([setting], near[setting], draws) for setting in near))
        _each(jobs, train, [key for key in keys if key not in scores])

        best = {setting: RATES.index(max(near[setting], key=partial(mean, setting))) for setting in near}
    return {setting: RATES[index] for setting, index in best.items()}


def _row(outcome: Outcome, rate: float, limits: Budget, encoder: str) -> dict[str, Any]:
    more = {"learning_rate": rate, "budget": str(limits), "pretraining": _pretraining(encoder)}
    return {**vars(outcome), **more, "commit": commit(), "machine": machine()}


def _pretraining(encoder: str) -> str:
    """What the CSV says of an encoder: the budget of one of this benchmark, else the file."""
    made = Path(encoder).parent / "made.json"
    if not encoder or not made.is_file():
        return Path(encoder).name
    own = json.loads(made.read_text())
    return _told(own["batches"], own["patch_size"][0], made.parent.name)


def _told(batches: int, patch: int, folder: str) -> str:
    return f"{batches} batches of patches of {patch} voxels, {folder}"


def _start(arm: str, encoder: str) -> str:
    """Part of a folder's name: the arm, of the project's own encoders also which domains they have not seen."""
    return re.sub(r"[^\w.]+", "_", f"{arm}_{Path(encoder).parent.name}" if arm == OWN else arm)


def _append(path: str | Path, row: dict[str, Any]) -> None:
    line = {key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in row.items()}
    with _WRITING, replacing(path) as hidden:
        hidden.write_text(csv_text(list(line), [*read(path), line]), encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return (*(str(row[name]) for name in ("target", "arm", "mode")), f"{float(row['fraction']):g}", str(row["seed"]))


def _listed(value: Any) -> list[Any]:
    """One value, several, or text with commas, as fire gives them."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part]
    return list(value) if isinstance(value, Sequence) else [value]


if __name__ == "__main__":
    clear_errors()
    fire.Fire(
        {
            "run": run,
            "table": transfer_report.table,
            "summary": transfer_report.summary,
            "plot": transfer_report.plot,
        }
    )
