"""Checks of what configs refer to: classes, their arguments, references, and the code in ``$`` expressions.

Nothing is instantiated: MONAI finds such a fault only when a run comes to it, one at a time, after the data is loaded.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from pydoc import locate
from types import ModuleType
from typing import Any

import monai
import numpy as np
import torch
from monai.bundle import ComponentLocator, ConfigComponent, ConfigExpression, ConfigParser, ReferenceResolver

from tools.bundle_folder import WORKFLOWS, Bundle, Fault

Found = tuple[str, str]
"""What is wrong at an id, and what to do."""

_GIVEN_NAMES = {"monai": monai, "torch": torch, "np": np, "numpy": np, "__local_refs": None}


def check_targets(bundle: Bundle) -> Iterator[Fault]:
    """Each ``_target_`` exists and takes the arguments that it is given."""
    return _in_workflows(bundle, _target_faults)


def check_references(bundle: Bundle) -> Iterator[Fault]:
    """Each ``@id`` exists."""
    return _in_workflows(bundle, _reference_faults)


def check_expressions(bundle: Bundle) -> Iterator[Fault]:
    """Each ``$`` expression is Python whose names, module contents and calls exist."""
    return _in_workflows(bundle, _expression_faults)


def walk(config: Any, id: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a config with its id, ``train::dataset::data``; the metadata left out."""
    if isinstance(config, (dict, list)):
        for key, sub_id, value in ReferenceResolver.iter_subconfigs(id, config):
            if key != ConfigParser.meta_key:
                yield sub_id, value
                yield from walk(value, sub_id)


def expression_tree(text: str) -> ast.AST:
    """Parse a ``$`` expression, references replaced by look-ups.

    Raises:
        SyntaxError: it is no Python.
    """
    refs = dict.fromkeys(ReferenceResolver.match_refs_pattern(text))
    return ast.parse(ReferenceResolver.update_refs_pattern(text, refs)[1:].strip())


def is_import(value: Any) -> bool:
    """Whether a value of a config is an import statement, ``$import os``."""
    return isinstance(value, str) and value.startswith(("$import ", "$from "))


def _in_workflows(bundle: Bundle, faults: Callable[[ConfigParser], Iterator[Found]]) -> Iterator[Fault]:
    """Look through all workflows; what a base is blamed for is not said again of its overlay."""
    seen: set[tuple[str, Found]] = set()
    for name, parts in WORKFLOWS.items():
        parser = bundle.workflow(name)
        if parser is None:
            continue
        for found in faults(parser):
            if (parts[0], found) not in seen:
                seen.add((parts[0], found))
                yield Fault(f"configs/{name}.json", *found)


@cache
def _locator() -> ComponentLocator:
    return ComponentLocator()


def _target_faults(parser: ConfigParser) -> Iterator[Found]:
    for id, config in walk(parser.get()):
        if not ConfigComponent.is_instantiable(config) or config["_target_"].startswith(("$", "@")):
            continue
        component = ConfigComponent(config, id, _locator())
        path = component.resolve_module_name()
        target = locate(path)
        if target is None:
            yield f"{id}: there is no {path}", "correct _target_ (outside MONAI the whole dotted path is needed)"
            continue
        arguments = component.resolve_args()
        fault = _call_fault(target, (), arguments, partial=config.get("_mode_") == "callable")
        if fault:
            yield f"{id}: {path} does not take these arguments ({fault})", "correct their names"


def _reference_faults(parser: ConfigParser) -> Iterator[Found]:
    for id, value in walk(parser.get()):
        if isinstance(value, str):
            value = ConfigParser.resolve_relative_ids(id, value)
            for reference in ReferenceResolver.match_refs_pattern(value):
                if reference not in parser:
                    yield f"{id}: @{reference} refers to nothing", "define it or correct the reference"


def _expression_faults(parser: ConfigParser) -> Iterator[Found]:
    names: dict[str, Any] = dict(_GIVEN_NAMES)
    for id, value in walk(parser.get()):
        if is_import(value):
            try:
                names.update(_imported(value[1:]))
            except (ImportError, AttributeError, SyntaxError) as error:
                yield f"{id}: {value!r} fails ({error})", "correct the import or install the package"
    for id, value in walk(parser.get()):
        if ConfigExpression.is_expression(value) and not is_import(value):
            try:
                tree = expression_tree(ConfigParser.resolve_relative_ids(id, value))
            except SyntaxError as error:
                yield f"{id}: {value!r} is no Python ({error.msg})", "correct the expression"
                continue
            for fault in _code_faults(tree, names):
                yield f"{id}: {fault} in {value!r}", "correct the expression or add the import"


def _imported(statement: str) -> dict[str, Any]:
    """What MONAI makes of an import statement: one name."""
    node = ast.parse(statement).body[0]
    assert isinstance(node, (ast.Import, ast.ImportFrom))
    name, known_as = node.names[0].name, node.names[0].asname
    module = import_module(name if isinstance(node, ast.Import) else str(node.module))
    return {known_as or name: module if isinstance(node, ast.Import) else getattr(module, name)}


def _code_faults(tree: ast.AST, names: dict[str, Any]) -> Iterator[str]:
    nodes = list(ast.walk(tree))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            if node.id not in names and node.id not in bound and not hasattr(builtins, node.id):
                yield f"unknown name {node.id}"
        elif isinstance(node, ast.Attribute):
            owner = _value(node.value, names)
            if isinstance(owner, (ModuleType, type)) and not hasattr(owner, node.attr):
                yield f"{owner.__name__} has no {node.attr}"
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg: None for keyword in node.keywords}
            starred = None in keywords or any(isinstance(argument, ast.Starred) for argument in node.args)
            fault = "" if starred else _call_fault(_value(node.func, names), tuple(node.args), keywords)
            if fault:
                yield f"{ast.unparse(node.func)} does not take these arguments ({fault})"


def _value(node: ast.AST, names: dict[str, Any]) -> Any:
    """What a dotted name stands for, None where that is known at run time only."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, names)
        return getattr(owner, node.attr, None) if isinstance(owner, (ModuleType, type)) else None
    return None


def _call_fault(target: Any, args: tuple[Any, ...], keywords: dict[Any, Any], partial: bool = False) -> str:
    if not callable(target):
        return ""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):  # written in C, without a signature
        return ""
    try:
        (signature.bind_partial if partial else signature.bind)(*args, **keywords)
    except TypeError as error:
        return str(error)
    return ""
