"""The bundles as a zoo: packed, served, published, fetched and compared.

python -m tools.zoo pack [NAMES…] --out dist                  zips and model_info.json
python -m tools.zoo serve dist [--port 8000]                   a private zoo with a page for people
python -m tools.zoo fetch NAME --index URL [--out .]           one bundle, its hash checked
python -m tools.zoo publish --to github --repo O/R/TAG         what a release needs, and the commands
python -m tools.zoo diff A B                                   what two versions differ in
"""

from __future__ import annotations

import shlex
from pathlib import Path

import fire

from med3d_nets.errors import InputError, clear_errors
from med3d_nets.switches import is_on
from tools import zoo_publish
from tools.zoo_diff import diff as compare
from tools.zoo_fetch import fetch as get
from tools.zoo_index import load_index, save_index
from tools.zoo_server import Zoo

_LAYOUTS = {
    "github": (zoo_publish.github, ("GH_TOKEN", "GITHUB_TOKEN")),
    "huggingface": (zoo_publish.huggingface, ("HF_TOKEN",)),
}
ROOT = Path(__file__).resolve().parents[1]


def pack(
    *names: str,
    out: str = "dist",
    large_files: str = "keep",
    url: str = "",
    fast: bool = False,
    bundles: str | Path = ROOT / "bundles",
) -> None:
    """Pack bundles as ``NAME_vVERSION.zip`` and write the index.

    Args:
        names: bundles; all by default.
        out: the zoo's folder. Bundles that its index has already and that are not named stay.
        large_files: "keep" or "resolve", see `zoo_pack.pack_bundle`.
        url: address of the folder that will hold the zips; empty: they lie beside the index.
        fast: leave out the slow checks of each bundle.
        bundles: folder of the bundles.

    Raises:
        InputError: no such bundle, or see `zoo_pack.pack_bundle`; bundles before it are packed.
    """
    from tools.zoo_pack import pack_bundle  # its checks need the extra `dev`, which fetch does without

    folders = [Path(bundles) / name for name in names] or sorted(
        path.parent.parent for path in Path(bundles).glob("*/configs/metadata.json")
    )
    missing = [str(folder) for folder in folders if not (folder / "configs").is_dir()]
    if missing or not folders:
        raise InputError(f"{', '.join(missing) or bundles}: no such bundle.")
    target = Path(out)
    index = load_index(target)
    for folder in folders:
        key = pack_bundle(folder, target, index, large_files, url, is_on(fast))
        save_index(index, target)
        print(f"{key}.zip: {index[key]['size'] / 1e6:.1f} MB, sha256 {index[key]['sha256']}", flush=True)


def serve(dist: str = "dist", host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a zoo's folder until interrupted.

    Args:
        dist: folder that `pack` made.
        host: address to listen on; 0.0.0.0 is open to the network.
        port: port.
    """
    if not load_index(Path(dist)):
        raise InputError(f"{dist}: has no packed bundles. Run python -m tools.zoo pack --out {dist} first.")
    try:
        server = Zoo(Path(dist), host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{host}:{port}: cannot be listened on ({reason}). Give another --port.") from error
    print(f"http://{host}:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def fetch(name: str, index: str = "http://127.0.0.1:8000/", out: str = ".", version: str = "") -> None:
    """Fetch a bundle, check its hash, and unpack it with care.

    Args:
        name: the bundle.
        index: address or path of the zoo or its ``model_info.json``.
        out: folder in which the bundle's folder is made.
        version: empty: the newest.

    Raises:
        InputError: see `zoo_fetch.fetch`; nothing is left then.
    """
    print(get(name, index, Path(out), str(version)))


def publish(to: str, repo: str, dist: str = "dist", out: str = "", upload: bool = False) -> None:
    """Prepare a release, and print the commands that publish it.

    Args:
        to: "github" or "huggingface".
        repo: OWNER/REPO/TAG, or the owner on the hub.
        dist: folder that `pack` made.
        out: folder to make; empty: beside ``dist``.
        upload: run the commands too; ``GH_TOKEN``, ``GITHUB_TOKEN`` or ``HF_TOKEN`` must hold a token.

    Raises:
        InputError: see `zoo_publish`.
    """
    if to not in _LAYOUTS:
        raise InputError(f"to={to!r}: allowed are {', '.join(_LAYOUTS)}.")
    layout, tokens = _LAYOUTS[to]
    if is_on(upload):
        zoo_publish.check_token(tokens)
    commands = layout(Path(dist), Path(out or f"{Path(dist)}_{to}"), repo)
    print("\n".join(map(shlex.join, commands)), flush=True)
    if is_on(upload):
        zoo_publish.upload(commands)


def diff(a: str, b: str) -> None:
    """Print what two versions of a bundle differ in.

    Args:
        a: folder or zip.
        b: likewise.

    Raises:
        InputError: one is no bundle.
    """
    print("\n".join(compare(Path(a), Path(b))) or "no difference")


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"pack": pack, "serve": serve, "fetch": fetch, "publish": publish, "diff": diff})
