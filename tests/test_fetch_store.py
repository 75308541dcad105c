"""Fetching when the store is shared, full or not to be written."""

from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from med3d_nets import InputError
from med3d_nets.registry import WEIGHTS
from med3d_nets.weights import download, fetch, where
from tests.weights_server import NAME, WeightsServer, serving, tiny_checkpoint, tiny_record

MODULE = importlib.import_module("med3d_nets.weights.fetch")  # `weights.fetch` is the function
# A copy of this process, so that it has the small record and starts at once; it does no tensor work.
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WeightsServer]:
    content = tiny_checkpoint()
    monkeypatch.setenv("MED3D_HOME", str(tmp_path / "store"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("MED3D_WEIGHTS_URL", raising=False)
    monkeypatch.setitem(WEIGHTS, NAME, tiny_record(content))
    with serving(content) as server:
        yield server


def _fetch_and_tell(url: str, told: Any) -> None:
    told.put(str(fetch(NAME, [url], progress=False)))


def _wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def _partials() -> list[Path]:
    return list(where(NAME).parent.glob(".partial*"))


class TestTwoProcesses:
    def test_one_fetches_the_other_takes_it(self, server: WeightsServer) -> None:
        told = FORK.Queue()
        processes = [FORK.Process(target=_fetch_and_tell, args=(server.url("trickle"), told)) for _ in range(2)]
        for process in processes:
            process.start()
        assert [told.get(timeout=60) for _ in processes] == [str(where(NAME))] * 2
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
        assert len(server.asked) == 1
        assert where(NAME).read_bytes() == server.content and not _partials()

    def test_what_a_killed_one_had_is_gone_on_with(self, server: WeightsServer) -> None:
        process = FORK.Process(target=_fetch_and_tell, args=(server.url("trickle"), FORK.Queue()))
        process.start()
        _wait_until(lambda: any(path.stat().st_size for path in _partials()))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert not where(NAME).exists()
        held = _partials()[0].stat().st_size
        fetch(NAME, [server.url("good")])
        assert server.ranges()[-1] == f"bytes={held}-"
        assert where(NAME).read_bytes() == server.content and not _partials()

    def test_the_second_says_that_it_waits(
        self, server: WeightsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        process = FORK.Process(target=_fetch_and_tell, args=(server.url("trickle"), FORK.Queue()))
        process.start()
        _wait_until(lambda: bool(_partials()))
        assert fetch(NAME, [server.url("absent")]) == where(NAME)
        process.join(60)
        assert "another process is fetching it" in caplog.text
        assert [day for day, _ in server.asked] == ["trickle"]


class TestStore:
    def _refused(self, server: WeightsServer) -> str:
        with pytest.raises(InputError) as error:
            fetch(NAME, [server.url("good")])
        assert not where(NAME).exists() and not _partials()
        assert f"{where(NAME)}: cannot be written" in str(error.value)
        assert "Free space or set MED3D_HOME to another folder" in str(error.value)
        assert WEIGHTS[NAME].sha256 in str(error.value)
        return str(error.value)

    def test_disk_full_while_writing(self, server: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
        class Full:
            def __enter__(self) -> Full:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def write(self, chunk: bytes) -> int:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(download, "open", lambda path, mode: Full(), raising=False)
        assert "(No space left on device)" in self._refused(server)
        assert len(server.asked) == 1  # no other attempt would help

    def test_too_little_space(self, server: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "1,000 bytes are free" in self._refused(server)
        assert server.asked == []

    def test_no_folder_can_be_made(
        self, server: WeightsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("MED3D_HOME", str(tmp_path / "file" / "store"))
        assert "(Not a directory)" in self._refused(server)

    def test_read_only(self, server: WeightsServer, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(MODULE.FileLock, "acquire", refuse)
        assert "(Read-only file system)" in self._refused(server)

    def test_the_name_is_taken_by_a_folder(self, server: WeightsServer) -> None:
        where(NAME).mkdir(parents=True)
        with pytest.raises(InputError, match=r"cannot be written \(Is a directory\)"):
            fetch(NAME, [server.url("good")])
        assert where(NAME).is_dir() and not _partials()
