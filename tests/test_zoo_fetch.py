"""Bundles are fetched from a zoo whole or not at all, and nothing harmful is unpacked."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from med3d_nets.errors import InputError
from med3d_nets.weights.download import Patience
from tests.zoo_server import LUNG, SMALL, dist, served
from tools.zoo_archive import unpack
from tools.zoo_fetch import fetch
from tools.zoo_index import newest, read_index

__all__ = ["dist", "served"]  # fixtures

ROOT = Path(__file__).parents[1]
HASTY = Patience(timeout=5, tries=1)


class TestFetch:
    @pytest.mark.parametrize("suffix", ["", "model_info.json"])
    def test_a_bundle_comes_whole(self, served: tuple[str, Path], tmp_path: Path, suffix: str) -> None:
        folder = fetch(SMALL, served[0] + suffix, tmp_path / "out")
        _assert_same(folder, ROOT / "bundles" / SMALL)
        with pytest.raises(InputError, match="is there already"):
            fetch(SMALL, served[0], tmp_path / "out")

    def test_from_a_folder(self, dist: Path, tmp_path: Path) -> None:
        _assert_same(fetch(SMALL, str(dist), tmp_path / "out"), ROOT / "bundles" / SMALL)

    @pytest.mark.parametrize(
        ("tamper", "told"),
        [
            (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "sha256 .*the index tells"),
            (lambda content: content[: len(content) // 2], "has .* bytes, .* are right"),
            (lambda content: content + b"more", "has .* bytes, .* are right"),
            (lambda content: b"<html>log in</html>", "HTML page|are right"),
        ],
        ids=["hash", "truncated", "longer", "page"],
    )
    def test_other_bytes(
        self, served: tuple[str, Path], tmp_path: Path, tamper: Callable[[bytes], bytes], told: str
    ) -> None:
        path = served[1] / f"{SMALL}_v0.1.0.zip"
        path.write_bytes(tamper(path.read_bytes()))
        with pytest.raises(InputError, match=told):
            fetch(SMALL, served[0], tmp_path / "out", patience=HASTY)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    def test_unknown(self, served: tuple[str, Path], tmp_path: Path) -> None:
        for name, version, told in (
            ("other", "", f"no such bundle. It has {LUNG}"),
            (SMALL, "9.0.0", "no version 9.0.0. There are 0.1.0"),
        ):
            with pytest.raises(InputError, match=told):
                fetch(name, served[0], tmp_path / "out", version)
        with pytest.raises(InputError, match="cannot be had"):
            fetch(SMALL, "http://127.0.0.1:9/", tmp_path / "out", patience=HASTY)
        assert not (tmp_path / "out").exists()

    def test_the_newest_is_by_numbers(self) -> None:
        record = {"source": "x", "sha256": "0", "size": 1, "unpacked_size": 1}
        index = read_index(json.dumps({f"a_v0.{n}.0": record for n in (9, 10, 2)}), "here")
        assert newest(index, "a") == "a_v0.10.0" and newest(index, "a", "0.2.0") == "a_v0.2.0"

    @pytest.mark.parametrize(
        ("change", "told"),
        [({"source": "file:///dev/zero"}, "no http address"), ({"unpacked_size": 10**15}, "no bundle has as many")],
    )
    def test_an_index_is_not_trusted(self, served: tuple[str, Path], tmp_path: Path, change: dict, told: str) -> None:
        path = served[1] / "model_info.json"
        index = json.loads(path.read_text())
        index[f"{SMALL}_v0.1.0"].update(change)
        path.write_text(json.dumps(index))
        with pytest.raises(InputError, match=told):
            fetch(SMALL, served[0], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("{", "is no JSON"),
            ("[]", "is no zoo's"),
            ('{"a_v1.0.0": {}}', "has no source, sha256"),
            ('{"a": 1}', "has no"),
        ],
    )
    def test_no_index(self, tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "model_info.json").write_text(text)
        with pytest.raises(InputError, match=told):
            fetch("a", str(tmp_path), tmp_path / "out")


def _zip(path: Path, *entries: tuple[str, bytes, int]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


FILE = stat.S_IFREG | 0o644
HARMFUL = {
    "traversal": (("b/../../evil", b"x", FILE), "not within b/"),
    "another folder": (("c/evil", b"x", FILE), "not within b/"),
    "absolute": (("/tmp/evil", b"x", FILE), "an absolute path"),
    "drive": (("C:/evil", b"x", FILE), "an absolute path or one of another system"),
    "backslash": (("b\\..\\evil", b"x", FILE), "one of another system"),
    "symbolic link": (("b/link", b"/etc/passwd", stat.S_IFLNK | 0o777), "a link or device"),
    "twice": (("b/A", b"x", FILE), "there twice"),
    "bomb": (("b/zeros", bytes(10_000_000), FILE), "are allowed"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_zips_leave_nothing(name: str, tmp_path: Path) -> None:
    entry, told = HARMFUL[name]
    path = _zip(tmp_path / "b.zip", ("b/a", b"fine", FILE), entry)
    with pytest.raises(InputError, match=told):
        unpack(path, "b", tmp_path / "out", most_bytes=1_000_000)
    assert not list((tmp_path / "out").iterdir()) and not (tmp_path / "evil").exists()


def test_a_zip_that_lies_about_its_size(tmp_path: Path) -> None:
    path = _zip(tmp_path / "b.zip", ("b/zeros", bytes(3_000_000), FILE))
    path.write_bytes(path.read_bytes().replace((3_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(InputError, match="damaged zip"):
        unpack(path, "b", tmp_path / "out", most_bytes=1_000_000)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_content(tmp_path: Path) -> None:
    path = _zip(tmp_path / "b.zip", ("b/a", bytes(range(256)) * 40, FILE))
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged zip"):
        unpack(path, "b", tmp_path / "out", most_bytes=1_000_000)
    assert not list((tmp_path / "out").iterdir())


def test_truncated(tmp_path: Path) -> None:
    path = _zip(tmp_path / "b.zip", ("b/a", b"fine" * 1000, FILE))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="damaged zip"):
        unpack(path, "b", tmp_path / "out", most_bytes=1_000_000)
    assert not list((tmp_path / "out").iterdir())


def _assert_same(a: Path, b: Path) -> None:
    one, other = (_content(folder) for folder in (a, b))
    assert one == other


def _content(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
