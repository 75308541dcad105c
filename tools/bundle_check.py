"""All checks of a bundle folder, in the order of their report. Every fault is found at once; none ends the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from tools import bundle_configs, bundle_documents, bundle_expressions, bundle_metadata
from tools.bundle_folder import Bundle, Fault
from tools.bundle_network import check_network

CHECKS: tuple[Callable[[Bundle], Iterator[Fault]], ...] = (
    bundle_documents.check_files,
    bundle_documents.check_licence,
    bundle_configs.check_name,
    bundle_configs.check_readable,
    bundle_metadata.check_schema,
    bundle_metadata.check_version,
    bundle_metadata.check_packages,
    bundle_metadata.check_channels,
    bundle_metadata.check_weights_record,
    bundle_configs.check_properties,
    bundle_configs.check_one_network,
    bundle_configs.check_imports,
    bundle_configs.check_overlays,
    bundle_configs.check_paths,
    bundle_expressions.check_targets,
    bundle_expressions.check_references,
    bundle_expressions.check_expressions,
    bundle_documents.check_large_files,
    bundle_documents.check_logging,
    bundle_documents.check_commands,
    bundle_documents.check_weight_names,
)


def check_bundle(folder: str | Path, fast: bool = False) -> list[Fault]:
    """Check one bundle folder.

    Args:
        folder: the bundle's root; any MONAI bundle with one network in ``network_def``.
        fast: leave out TorchScript.

    Returns:
        Every fault, each once.
    """
    if not Path(folder).is_dir():
        return [Fault(".", "no such folder", "give the path of a bundle")]
    bundle = Bundle(folder)
    faults = [fault for check in CHECKS for fault in check(bundle)]
    return list(dict.fromkeys([*faults, *check_network(bundle, script=not fast)]))
