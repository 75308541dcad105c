"""A zoo's zips in the layout that MONAI downloads from GitHub or from the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.weights import file_sha256
from tools.zoo_archive import unpack
from tools.zoo_index import NAME, Record, by_version, load_index, newest, parse_key, save_index

_OWNER = r"[A-Za-z0-9][\w.-]*"

_GH = "!gh auth git-credential"  # the token that gh has is none of git's

Commands = list[list[str]]


def github(dist: Path, out: Path, repo: str) -> Commands:
    """Prepare a release for ``monai.bundle download --source github --repo OWNER/REPO/TAG``.

    MONAI reads ``models/model_info.json`` of the repository at the tag, for the newest version, and gets the zip from
    the release of that tag.

    Args:
        dist: a zoo's folder.
        out: folder to make: ``models/model_info.json`` for the repository, ``assets/`` for the release.
        repo: OWNER/REPO/TAG.

    Returns:
        Commands that publish it, by ``git`` and GitHub's ``gh``.

    Raises:
        InputError: ``repo`` has another form or a tag that MONAI takes for its own, the zoo is empty, or ``out`` is
            there already.
    """
    match = re.fullmatch(rf"({_OWNER})/({_OWNER})/({_OWNER})", repo)
    if not match or match[3] == "hosting_storage_v1":
        raise InputError(f"repo={repo!r}: OWNER/REPO/TAG is needed, with another tag than MONAI's hosting_storage_v1.")
    owner, name, tag = match.groups()
    index = _index(dist)
    _make(out / "assets")
    zips = [shutil.copyfile(dist / f"{key}.zip", str(out / "assets" / f"{key}.zip")) for key in index]
    base = f"https://github.com/{owner}/{name}/releases/download/{tag}"
    save_index({key: {**record, "source": f"{base}/{key}.zip"} for key, record in index.items()}, out / "models")
    clone = str(out / "clone")
    return [
        ["gh", "repo", "clone", f"{owner}/{name}", clone, "--", "--depth", "1"],
        ["cp", "-r", str(out / "models"), clone],
        ["git", "-C", clone, "add", f"models/{NAME}"],
        ["git", "-C", clone, "commit", "-m", f"Zoo {tag}"],
        ["git", "-C", clone, "tag", tag],
        ["git", "-C", clone, "-c", f"credential.helper={_GH}", "push", "origin", "HEAD", tag],
        ["gh", "release", "create", tag, "--repo", f"{owner}/{name}", "--verify-tag", "--notes", f"Zoo {tag}", *zips],
    ]


def huggingface(dist: Path, out: Path, repo: str) -> Commands:
    """Prepare repositories for ``monai.bundle download --source huggingface_hub --repo OWNER/NAME``.

    MONAI takes a snapshot of a whole repository, so each bundle has its own; its tags are versions.

    Args:
        dist: a zoo's folder; of each bundle the newest version is taken.
        out: folder to make, with the files of each repository under its bundle's name.
        repo: OWNER.

    Returns:
        Commands that publish them, by the hub's ``hf``.

    Raises:
        InputError: ``repo`` has another form, the zoo is empty, or ``out`` is there already.
    """
    if not re.fullmatch(_OWNER, repo):
        raise InputError(f"repo={repo!r}: the owner's name on the hub is needed; each bundle is a repository of it.")
    index = _index(dist)
    _make(out)
    commands = []
    for name in dict.fromkeys(parse_key(key)[0] for key in index):
        key = newest(index, name)
        record = index[key]
        folder = unpack(dist / f"{key}.zip", name, out, record["unpacked_size"])
        with replacing(folder / "README.md") as hidden:
            hidden.write_text(_card(folder), encoding="utf-8")
        commands += [
            ["hf", "upload", f"{repo}/{name}", str(folder), ".", "--delete", "*", "--commit-message", key],
            ["hf", "repo", "tag", "create", f"{repo}/{name}", parse_key(key)[1]],
        ]
    return commands


def check_token(tokens: Sequence[str]) -> None:
    """Refuse to upload without a token.

    Args:
        tokens: names of environment variables, one of which must hold one.

    Raises:
        InputError: none does.
    """
    if not any(os.environ.get(name) for name in tokens):
        raise InputError(f"Nothing is made or uploaded: set {' or '.join(tokens)} to a token, or leave --upload out.")


def upload(commands: Commands) -> None:
    """Run the commands, one after the other.

    Args:
        commands: to run.

    Raises:
        InputError: a program is missing, or a command fails; those after it are not run.
    """
    for number, command in enumerate(commands, start=1):
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"Command {number} of {len(commands)} failed ({error}). Run it and those after it by hand."
            ) from error


def _card(folder: Path) -> str:
    """The bundle's model card with the head that the hub reads."""
    head = "---\nlibrary_name: monai\nlicense: apache-2.0\ntags:\n- monai\n- medical\n---\n\n"
    return head + (folder / "docs" / "README.md").read_text(encoding="utf-8")


def _index(dist: Path) -> dict[str, Record]:
    index = load_index(dist)
    if not index:
        raise InputError(f"{dist}: has no {NAME} with bundles. Run python -m tools.zoo pack --out {dist} first.")
    for key, record in index.items():
        path = dist / f"{key}.zip"
        if not path.is_file() or file_sha256(path) != record["sha256"]:
            raise InputError(f"{path}: is not there or not what {NAME} tells of. Remove its record, and pack it again.")
    return {key: index[key] for key in sorted(index, key=by_version)}


def _make(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out}: is there already. Remove it, or give another folder.")
    out.mkdir(parents=True)
