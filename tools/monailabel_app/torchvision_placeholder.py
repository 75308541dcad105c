"""Let MONAI Label start where no torchvision fits the installed torch: run with the Python of its environment.

MONAI Label imports torchvision for two functions that draw pictures in apps other than ours. Where the import fails, as
with CPU builds of torch without a torchvision of the same build, this writes a package of that name with the two,
which raise when called, into that environment alone.
"""

import importlib
import sysconfig
from pathlib import Path

_PACKAGE = (
    '"""Placeholder: no torchvision fits this torch; see torchvision_placeholder.py."""\n\n__version__ = "0.0.0"\n'
)
_UTILS = """
def make_grid(*args, **kwargs):
    raise RuntimeError("This needs torchvision; in this environment is a placeholder of it.")


save_image = make_grid
"""


def main() -> None:
    """Write the placeholder if it is needed, and say so."""
    try:
        importlib.import_module("torchvision.utils")
    except (ImportError, RuntimeError, AttributeError) as error:
        folder = Path(sysconfig.get_paths()["purelib"]) / "torchvision"
        if folder.exists():
            raise SystemExit(
                f"{folder} does not work with this torch ({error}). Uninstall it, then do this again."
            ) from error
        folder.mkdir()
        (folder / "utils.py").write_text(_UTILS)
        (folder / "__init__.py").write_text(_PACKAGE)
        print(
            "No torchvision fits the installed torch: MONAI Label gets a placeholder of the two functions it imports."
        )


if __name__ == "__main__":
    main()
