"""Checks of a bundle's configs as a whole: properties of the workflows, names, one network, no paths of a machine."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from monai.bundle import ConfigComponent, ReferenceResolver
from monai.bundle.properties import InferProperties, TrainProperties
from monai.utils import BundleProperty, BundlePropertyConfig

from tools.bundle_expressions import expression_tree, is_import, walk
from tools.bundle_folder import WORKFLOWS, Bundle, Fault

_PROPERTIES: dict[str, dict[str, Any]] = {
    "inference": InferProperties,
    "evaluate": InferProperties,
    "train": TrainProperties,
}
_TASKS = ("_segmentation", "_classification", "_detection")
_NOT_COMPARED = {"freeze_backbone", "freeze_norm", "frozen_stages", "dropout", "_requires_"}
_RUN_KEYS = {"imports", "initialize", "run", "finalize"}
_ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")
_PACKAGE_IMPORT = "$import med3d_nets"


def check_readable(bundle: Bundle) -> Iterator[Fault]:
    """Configs that are JSON objects."""
    yield from bundle.unreadable


def check_properties(bundle: Bundle) -> Iterator[Fault]:
    """All required properties of the workflows; MONAI's own check ends at the first that is missing."""
    for name, properties in _PROPERTIES.items():
        parser = bundle.workflow(name)
        for prop, facts in properties.items():
            id = facts[BundlePropertyConfig.ID].replace("::", "#")
            if parser is not None and facts[BundleProperty.REQUIRED] and id not in parser:
                wrong = f"no {id}, the required property {prop!r}"
                yield Fault(f"configs/{name}.json", wrong, f"define it: {facts[BundleProperty.DESC]}")
        if parser is not None and "run" not in parser:
            yield Fault(f"configs/{name}.json", "no run", "list there what monai.bundle run is to do")


def check_name(bundle: Bundle) -> Iterator[Fault]:
    """A folder name from which MONAI and MONAI Label guess right."""
    if "_v" in bundle.name:
        yield Fault(".", f"the name {bundle.name} holds _v", "rename it: MONAI splits name and version there")
    if sum(task in bundle.name for task in _TASKS) != 1 and "feature_extraction" not in bundle.name:
        yield Fault(".", f"the name {bundle.name} tells no task", f"have exactly one of {', '.join(_TASKS)} in it")
    found = re.search(r"_resnet(\d+)$", bundle.name)
    if not found:
        yield Fault(".", f"the name {bundle.name} tells no depth", "end it in _resnet and the depth")
        return
    for name, definition in bundle.network_defs.items():
        if definition.get("depth") != int(found[1]):
            wrong = f"network_def has depth {definition.get('depth')} in the bundle {bundle.name}"
            yield Fault(f"configs/{name}.json", wrong, "make the two agree")


def check_one_network(bundle: Bundle) -> Iterator[Fault]:
    """The same network in every workflow, save for what changes no weight.

    Where inference uses the encoder alone, another network is trained and evaluated; those two are compared then.
    """
    definitions = bundle.network_defs
    for name, definition in definitions.items():
        other = "inference"
        if definition.get("_target_") != definitions.get(other, {}).get("_target_"):
            other = {"train": "evaluate"}.get(name, "train")
        reference = definitions.get(other, {})
        for key in sorted({*reference, *definition} - _NOT_COMPARED):
            if reference and definition.get(key) != reference.get(key):
                wrong = f"network_def#{key} is {definition.get(key)!r}, in {other}.json {reference.get(key)!r}"
                yield Fault(f"configs/{name}.json", wrong, "make the two agree, or the weights will not fit")


def check_imports(bundle: Bundle) -> Iterator[Fault]:
    """The package imported and its absence told at the network, where MONAI's own message helps nobody."""
    for name in _PROPERTIES:
        if name in bundle.configs and _PACKAGE_IMPORT not in bundle.configs[name].get("imports", []):
            yield Fault(f"configs/{name}.json", f"imports has no {_PACKAGE_IMPORT!r}", "add it")
    for name, definition in bundle.network_defs.items():
        if "_requires_" not in definition:
            wrong = "network_def has no _requires_, so a missing med3d_nets gives an obscure error"
            yield Fault(f"configs/{name}.json", wrong, 'add "_requires_": "$med3d_nets.__version__"')


def check_overlays(bundle: Bundle) -> Iterator[Fault]:
    """Overlays whose every key replaces one of the base, is an argument, or is referred to."""
    for name, (base_name, *overlays) in WORKFLOWS.items():
        base, merged = bundle.workflow(base_name), bundle.workflow(name)
        if not overlays or base is None or merged is None:
            continue
        used = {reference for _, value in walk(merged.get()) for reference in _references(value)}
        for key in bundle.configs[name]:
            id = ReferenceResolver.normalize_id(key.removeprefix("+"))
            parent = id.rpartition("::")[0]
            is_argument = bool(parent) and ConfigComponent.is_instantiable(merged.get(parent))
            if id not in base and id not in used and id not in _RUN_KEYS and not is_argument:
                wrong = f"{key} changes nothing in {base_name}.json and nothing refers to it"
                yield Fault(f"configs/{name}.json", wrong, "correct or remove it")


def check_paths(bundle: Bundle) -> Iterator[Fault]:
    """No path of somebody's machine, plain or in an expression, and no macro, which is one of the working directory."""
    texts = [(name, *item) for name, config in bundle.configs.items() for item in walk(config)]
    for name, id, value in texts:
        where = id.replace("::", "#")
        for path in _absolute_paths(value) if isinstance(value, str) else ():
            wrong = f"{where} holds the absolute path {path!r}"
            yield Fault(f"configs/{name}.json", wrong, "start it with @bundle_root or leave it to the user")
        if isinstance(value, str) and value.startswith("%"):
            wrong = f"{where} is the macro {value!r}, read from the user's working directory"
            yield Fault(f"configs/{name}.json", wrong, "write its content here")


def _references(value: Any) -> list[str]:
    return list(ReferenceResolver.match_refs_pattern(value)) if isinstance(value, str) else []


def _absolute_paths(text: str) -> Iterator[str]:
    if not text.startswith("$"):
        if _ABSOLUTE.match(text):
            yield text
        return
    if is_import(text):
        return
    try:
        nodes = list(ast.walk(expression_tree(text)))
    except SyntaxError:  # reported by check_expressions
        return
    # '/models' in `@bundle_root + '/models'` and in f'{root}/models' continues a path
    continuing = [node.right for node in nodes if isinstance(node, ast.BinOp)]
    continuing += [part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values[1:]]
    for node in nodes:
        content = node.value if isinstance(node, ast.Constant) and node not in continuing else None
        if isinstance(content, str) and len(content) > 1 and _ABSOLUTE.match(content):
            yield content
