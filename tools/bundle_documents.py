"""Checks of a bundle's files that are no JSON: presence, licence, large files, logging, the model card."""

from __future__ import annotations

import ast
import configparser
import inspect
import logging
import logging.handlers
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import monai.bundle
from monai.bundle import ConfigParser

from med3d_nets.registry import DEPTHS, WEIGHTS, encoders
from tools.bundle_folder import Bundle, Fault, merge

REQUIRED = ("LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md")
PREFERRED = (
    *("configs/train.json", "configs/evaluate.json", "configs/multi_gpu_train.json"),
    *("configs/multi_gpu_evaluate.json", "configs/multi_gpu_inference.json", "configs/logging.conf"),
    *("docs/data_license.txt", "large_files.yml"),
)
_HASH_KEYS = ("path", "url", "hash_val", "hash_type")
_RUN_OPTIONS = set(inspect.signature(monai.bundle.run).parameters)
_FILE_OPTIONS = ("config_file", "meta_file", "logging_file", "args_file")


def check_files(bundle: Bundle) -> Iterator[Fault]:
    """Required and preferred files, and no folder of scripts."""
    for kind, names in (("required", REQUIRED), ("preferred", PREFERRED)):
        for name in names:
            if not (bundle.folder / name).is_file():
                yield Fault(name, f"this {kind} file is missing", "add it to the template")
            elif not bundle.text(name).strip():
                yield Fault(name, f"this {kind} file is empty", "fill it")
    if (bundle.folder / "scripts").exists():
        wrong = "a folder of code, which MONAI finds in `run` but not in its checks, exports and federated clients"
        yield Fault("scripts", wrong, "move the code into a package")


def check_licence(bundle: Bundle) -> Iterator[Fault]:
    """Apache-2.0, in full."""
    text = " ".join(bundle.text("LICENSE").split())
    if text and not ("Apache License Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text):
        yield Fault("LICENSE", "not the whole text of the Apache License 2.0", "copy the repository's LICENSE")


def check_large_files(bundle: Bundle) -> Iterator[Fault]:
    """Entries that name the registry's files of this depth, with the hash that MONAI verifies only if it is typed."""
    file = "large_files.yml"
    known = {f"models/{w.file}": (w.url, w.sha256) for w in encoders(bundle.depth)}
    if not bundle.text(file).strip():
        return
    try:
        entries = ConfigParser.load_config_file(bundle.folder / file)["large_files"]
        paths = [entry.get("path") for entry in entries]
    except Exception as error:  # YAML raises a type of its own for every kind of damage
        yield Fault(file, f"no YAML list `large_files` of path, url, hash_val, hash_type ({error})", "run make")
        return
    for entry, path in zip(entries, paths, strict=True):
        missing = [key for key in _HASH_KEYS if not entry.get(key)]
        if missing:
            yield Fault(file, f"{path}: no {', '.join(missing)}", "run make; without its type a hash is not verified")
        elif path not in known:
            yield Fault(file, f"{path}: no released weights of a ResNet-{bundle.depth}", "run make")
        elif (entry["url"], entry["hash_val"], entry["hash_type"]) != (*known[path], "sha256"):
            yield Fault(file, f"{path}: url or hash is not that of the registry", "run make")
    for path in known:
        if path not in paths:
            yield Fault(file, f"{path} is not listed", "run make")


def check_logging(bundle: Bundle) -> Iterator[Fault]:
    """Handlers and formatters of the standard library alone; MONAI refuses others."""
    file = "configs/logging.conf"
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(bundle.text(file))
    except configparser.Error as error:
        yield Fault(file, f"no INI file ({error})", "correct it")
    for section in parser.sections():
        for kind, base in (("handler_", logging.Handler), ("formatter_", logging.Formatter)):
            name = parser.get(section, "class", fallback="logging.Formatter").removeprefix("logging.")
            if section.startswith(kind) and not _is_logging_class(name, base):
                wrong = f"[{section}] uses the class {name}, which is no {base.__name__.lower()} of Python's logging"
                yield Fault(file, wrong, "use one of logging or logging.handlers")


def check_commands(bundle: Bundle) -> Iterator[Fault]:
    """Commands of the model card, and of the README beside ``bundles/``, whose files and keys exist."""
    for file in ("docs/README.md", "../../README.md"):
        for command in _commands(bundle.text(file)):
            if file == "docs/README.md" or re.search(rf"\b{bundle.name}\b", command):
                for wrong in _command_faults(bundle, command):
                    yield Fault(file, wrong, f"correct the command: {command}")


def check_weight_names(bundle: Bundle) -> Iterator[Fault]:
    """Released weights that the model card names: they exist, and are of this depth."""
    for name in sorted(set(re.findall(r"\bresnet_\d\w*", bundle.text("docs/README.md")))):
        if bundle.depth in DEPTHS and (name not in WEIGHTS or WEIGHTS[name].depth != bundle.depth):
            yield Fault("docs/README.md", f"{name}: no released weights of a ResNet-{bundle.depth}", "correct the name")


def _is_logging_class(name: str, base: type) -> bool:
    owner = logging.handlers if name.startswith("handlers.") else logging
    found = getattr(owner, name.removeprefix("handlers."), None)
    return isinstance(found, type) and issubclass(found, base)


def _commands(text: str) -> list[str]:
    """Lines of code blocks that run a bundle, continued lines joined."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [" ".join(line.split()) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.search(r"-m monai\.bundle run\b", line)]


def _command_faults(bundle: Bundle, command: str) -> Iterator[str]:
    try:
        words = shlex.split(command.partition("monai.bundle run")[2])
    except ValueError as error:
        yield f"a command that no shell reads ({error})"
        return
    options = dict(_options(words))
    for option in _FILE_OPTIONS:
        for path in _paths(options.get(option, "")):
            if not _file(bundle, path).is_file():
                yield f"--{option} names {path}, which does not exist"
    if "config_file" not in options:
        yield "a command without --config_file"
        return
    config = merge(_config(bundle, path) for path in _paths(options["config_file"]))
    run_id = words[0] if words and not words[0].startswith("-") else "run"
    for key in [run_id, *(key for key in options if key not in _RUN_OPTIONS)]:
        if config.get() and key not in config:
            yield f"{key} is no key of {options['config_file']}"


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    for index, word in enumerate(words):
        if word.startswith("--"):
            key, _, value = word.removeprefix("--").partition("=")
            following = words[index + 1] if index + 1 < len(words) else ""
            yield key, value or following


def _paths(option: str) -> list[str]:
    """One path or a list of them, as `monai.bundle run` reads the option."""
    if option.startswith(("[", "(")):
        return [str(path) for path in ast.literal_eval(option)]
    return [path for path in option.split(",") if path]


def _file(bundle: Bundle, path: str) -> Path:
    """The file meant: of this bundle, or of the one beside it that the path names, wherever the reader stands."""
    parts = PurePosixPath(path).parts
    start = parts.index("configs") if "configs" in parts else 0
    named = parts[start - 1] if start and "_resnet" in parts[start - 1] else bundle.name
    folder = bundle.folder if named == bundle.name else bundle.folder.resolve().parent / named
    return folder.joinpath(*parts[start:])


def _config(bundle: Bundle, path: str) -> dict[str, Any]:
    file = _file(bundle, path)
    return Bundle(file.parent.parent).configs.get(file.stem, {}) if file.is_file() else {}
