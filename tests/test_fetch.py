"""Fetching weights from a server that has good and bad days."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from med3d_nets import InputError, Med3DResNet, load_backbone
from med3d_nets.registry import HUB, WEIGHTS
from med3d_nets.weights import fetch, where
from med3d_nets.weights.download import Patience
from tests.weights_server import NAME, WeightsServer, serving, tiny_checkpoint, tiny_record

MODULE = importlib.import_module("med3d_nets.weights.fetch")  # `weights.fetch` is the function
QUICK = Patience(timeout=10, tries=3, wait=0.01, longest=1)

# What the server does, and what the message says of it.
BAD_DAYS = {
    "wrong": "not the file: its sha256 is [0-9a-f]{64} instead of [0-9a-f]{64}",
    "truncated": r"the file there has [\d,]+ bytes, [\d,]+ are right",
    "truncated_without_length": r"the connection ended after [\d,]+ of [\d,]+ bytes \(3 tries\)",
    "cut_always": r"the connection ended after 1,000 of [\d,]+ bytes \(3 tries\)",
    "longer": r"the server sends more than the [\d,]+ bytes of the file",
    "empty": r"the connection ended after 0 of [\d,]+ bytes",
    "html": "an HTML page in place of the file",
    "html_as_binary": "an HTML page in place of the file",
    "loop": "redirects in a loop, or more than 10",
    "absent": "HTTP 404 Not Found",
    "forbidden": "HTTP 403 Forbidden",
    "busy": r"HTTP 429 Too Many Requests \(3 tries\)",
    "busy_for_an_hour": "HTTP 429 Too Many Requests; the server asks to wait 3600 s",
    "broken": r"HTTP 500 Internal Server Error \(3 tries\)",
    "hang_up": r"Remote end closed connection without response \(3 tries\)",
}
# Days that end well, and the Range of each request.
GOOD_DAYS = {
    "good": [""],
    "without_length": [""],
    "redirect": ["", ""],
    "trickle": [""],
    "cut": ["", "bytes=HALF-"],
    "cut_then_no_range": ["", "bytes=1000-"],
    "busy_once": ["", ""],
    "broken_once": ["", ""],
}


@pytest.fixture(scope="module")
def content() -> bytes:
    return tiny_checkpoint()


@pytest.fixture
def server(content: bytes) -> Iterator[WeightsServer]:
    with serving(content) as server:
        yield server


@pytest.fixture(autouse=True)
def _store(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MED3D_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MED3D_WEIGHTS_URL", raising=False)
    monkeypatch.setitem(WEIGHTS, NAME, tiny_record(content))


def _partial() -> Path:
    return where(NAME).with_name(f".partial-{WEIGHTS[NAME].sha256[:12]}-{NAME}.pth")


def _left() -> set[str]:
    """Kinds of files in the store: of hidden ones what comes before the first hyphen."""
    return {path.name.split("-")[0] for path in where(NAME).parent.glob("*")} - {".lock"}


def _refused(urls: list[str], patience: Patience = QUICK) -> str:
    with pytest.raises(InputError) as error:
        fetch(NAME, urls, patience=patience)
    assert not where(NAME).exists()
    return str(error.value)


class TestGoodDays:
    @pytest.mark.parametrize("day", GOOD_DAYS)
    def test_the_file_is_there(self, day: str, server: WeightsServer, content: bytes) -> None:
        assert fetch(NAME, [server.url(day)], patience=QUICK) == where(NAME)
        assert where(NAME).read_bytes() == content
        assert server.ranges() == [asked.replace("HALF", str(len(content) // 2)) for asked in GOOD_DAYS[day]]
        assert _left() == {f"{NAME}.pth"}

    def test_as_long_as_bytes_come_no_try_is_used_up(self, server: WeightsServer, content: bytes) -> None:
        fetch(NAME, [server.url("cut_often")], patience=Patience(tries=2, wait=0.01))
        assert where(NAME).read_bytes() == content
        assert len(server.asked) == 6

    def test_what_is_there_is_not_fetched_again(self, server: WeightsServer) -> None:
        fetch(NAME, [server.url("good")])
        assert fetch(NAME, [server.url("good")]) == where(NAME)
        assert len(server.asked) == 1

    def test_a_damaged_file_is_replaced(self, server: WeightsServer, content: bytes) -> None:
        where(NAME).parent.mkdir()
        where(NAME).write_bytes(content[:-1])
        fetch(NAME, [server.url("good")])
        assert where(NAME).read_bytes() == content

    def test_by_name_into_a_network(
        self, server: WeightsServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("MED3D_WEIGHTS_URL", f"{server.base}/good/")
        net = Med3DResNet(10)
        account = load_backbone(net, NAME)
        assert len(account.loaded) == 72 and account.path == tmp_path / "store" / f"{NAME}.pth"
        assert (net.layer4[0].bn2.weight == 61).all()


class TestResuming:
    """What an earlier attempt left behind."""

    def _begin(self, content: bytes) -> None:
        _partial().parent.mkdir(parents=True)
        _partial().write_bytes(content)

    def test_goes_on(self, server: WeightsServer, content: bytes) -> None:
        self._begin(content[:3000])
        fetch(NAME, [server.url("good")])
        assert server.ranges() == ["bytes=3000-"]
        assert where(NAME).read_bytes() == content

    def test_whole_already(self, server: WeightsServer, content: bytes) -> None:
        self._begin(content)
        fetch(NAME, [server.url("good")])
        assert server.asked == [] and _left() == {f"{NAME}.pth"}

    @pytest.mark.parametrize("day", ["good", "no_range", "no_resume"])
    @pytest.mark.parametrize("begun", ["of another file", "too long", "as long and wrong"])
    def test_wrong_beginning(self, begun: str, day: str, server: WeightsServer, content: bytes) -> None:
        lengths = {"of another file": 500, "too long": len(content) + 1, "as long and wrong": len(content)}
        self._begin(b"\x00" * lengths[begun])
        fetch(NAME, [server.url(day)], patience=QUICK)
        assert where(NAME).read_bytes() == content
        assert server.ranges()[-1] == "" or day == "no_range"
        assert _left() == {f"{NAME}.pth"}

    def test_another_part_than_asked_for(self, server: WeightsServer, content: bytes) -> None:
        self._begin(content[:3000])
        assert "another part of the file" in _refused([server.url("other_part")])

    def test_kept_for_the_next_time(self, server: WeightsServer, content: bytes) -> None:
        _refused([server.url("cut_always")])
        assert _partial().read_bytes() == content[:1000]
        fetch(NAME, [server.url("good")])
        assert server.ranges()[-1] == "bytes=1000-" and where(NAME).read_bytes() == content


class TestBadDays:
    @pytest.mark.parametrize("day", BAD_DAYS)
    def test_says_why_and_what_to_do(self, day: str, server: WeightsServer) -> None:
        message = _refused([server.url(day)])
        assert re.search(f"  {re.escape(server.url(day))}: {BAD_DAYS[day]}", message), message
        record = WEIGHTS[NAME]
        assert f"by hand: {where(NAME)} ({record.size:,} bytes, sha256 {record.sha256})" in message
        assert f"python -m med3d_nets.weights verify {where(NAME)}" in message
        if day not in ("cut_always", "truncated_without_length"):  # what may be gone on with is kept
            assert _left() == set()

    def test_no_answer(self, server: WeightsServer) -> None:
        message = _refused([server.url("silent")], Patience(timeout=0.2, tries=2, wait=0.01))
        assert "no answer in time (2 tries)" in message and len(server.asked) == 2

    def test_no_server(self, content: bytes) -> None:
        with serving(content) as gone:
            url = gone.url("good")
        assert "no connection (Connection refused)" in _refused([url])

    def test_no_network(self) -> None:
        assert "no network, or no such server" in _refused(["http://weights.invalid/resnet_10.pth"])

    @pytest.mark.parametrize("url", ["http://127.0.0.1:port/a", "http:///a", "http://127.0.0.1/a b", "s3://a/b"])
    def test_no_address(self, url: str) -> None:
        assert re.search(r"no address|no host|is no http, https or file address", _refused([url]))

    def test_each_source_is_named_with_its_reason(self, server: WeightsServer, tmp_path: Path) -> None:
        message = _refused([server.url("absent"), server.url("wrong"), str(tmp_path / "none.pth")])
        assert [line.split(": ")[1] for line in message.splitlines()[1:4]] == [
            "HTTP 404 Not Found",
            "not the file",
            "No such file or directory",
        ]

    def test_the_next_source_is_asked(self, server: WeightsServer, content: bytes) -> None:
        fetch(
            NAME, [server.url(day) for day in ("loop", "cut_always", "wrong", "html", "good", "absent")], patience=QUICK
        )
        assert where(NAME).read_bytes() == content and server.asked[-1] == ("good", "")

    def test_a_login_page_does_not_cost_what_was_fetched(self, server: WeightsServer, content: bytes) -> None:
        _refused([server.url("cut_always")])
        _refused([server.url("html")])
        assert _partial().read_bytes() == content[:1000]
        fetch(NAME, [server.url("good")], patience=QUICK)
        assert where(NAME).read_bytes() == content and server.asked[-1] == ("good", "bytes=1000-")


class TestSources:
    def test_order(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        record = WEIGHTS["resnet_18_23dataset"]
        place = "TencentMedicalNet/MedicalNet-Resnet18/resolve"
        released = [
            f"{HUB}/{place}/{record.revision}/resnet_18_23dataset.pth",
            f"{HUB}/{place}/main/resnet_18_23dataset.pth",
            f"https://hf-mirror.com/{place}/{record.revision}/resnet_18_23dataset.pth",
        ]
        assert MODULE.known_sources(record) == released
        monkeypatch.setenv("MED3D_WEIGHTS_URL", "http://a/b/ file:///c")
        own = ["http://a/b/resnet_18_23dataset.pth", "file:///c/resnet_18_23dataset.pth"]
        assert MODULE.known_sources(record) == own + released
        (tmp_path / "with space").mkdir()
        monkeypatch.setenv("MED3D_WEIGHTS_URL", str(tmp_path / "with space"))
        assert MODULE.known_sources(record)[0] == str(tmp_path / "with space" / "resnet_18_23dataset.pth")
        assert len(MODULE.known_sources(WEIGHTS["resnet_34"])) == 3  # two of them its mirror's and main's

    @pytest.mark.parametrize("form", ["{}", "file://{}"])
    def test_folder(self, form: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "share").mkdir()
        (tmp_path / "share" / f"{NAME}.pth").write_bytes(content)
        monkeypatch.setenv("MED3D_WEIGHTS_URL", form.format(tmp_path / "share"))
        assert fetch(NAME).read_bytes() == content
        assert (tmp_path / "share" / f"{NAME}.pth").is_file()

    def test_own_weights_have_no_address(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("med3d_nets.weights.store._CLONE", tmp_path)
        with pytest.raises(InputError, match=r"come with a clone of the repository, as bundles/lung.*model\.pt"):
            fetch("lung_ct_segmentation_resnet10")
