"""Reading, computing and writing at the same time: what overlaps, what waits, and whose error it is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from med3d_nets import processes
from med3d_nets.errors import InputError
from med3d_nets.processes import StopRequest, gather_rows, join_processes, share_cases
from med3d_nets.stages import Stages

PATIENCE = 20  # seconds


class Log:
    """Which case was read and written so far, and what is waited for."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.changed = threading.Condition()
        self.threads: set[str] = set()

    def load(self, index: int) -> int:
        self.threads.add(threading.current_thread().name)
        with self.changed:
            self.read.append(index)
            self.changed.notify_all()
        if index == 2:
            raise InputError("two is bad")
        return 10 * index

    def await_read(self, index: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: index in self.read, PATIENCE)


def refuse(words: str) -> Callable[[], None]:
    def write() -> None:
        raise InputError(words)

    return write


def test_the_next_case_is_read_and_the_last_is_written_meanwhile() -> None:
    log, failed = Log(), {}
    begun, computed = threading.Event(), threading.Event()

    def write() -> None:
        begun.set()
        assert computed.wait(PATIENCE), "the next case was not computed meanwhile"

    with Stages(log.load, [0, 1, 3, 4], lambda index, error: failed.update({index: error})) as stages:
        assert stages.take() == 0
        assert log.await_read(1)  # while 0 is computed
        assert log.read == [0, 1]  # and not further
        stages.put(0, write)
        assert stages.take() == 10
        assert begun.wait(PATIENCE)
        computed.set()
        assert stages.take() == 30 and stages.take() == 40
    assert failed == {} and threading.main_thread().name not in log.threads


@pytest.mark.parametrize("overlap", [True, False])
def test_errors_belong_to_their_case(overlap: bool) -> None:
    log, failed = Log(), {}
    with Stages(log.load, [1, 2, 3], lambda i, error: failed.update({i: str(error)}), overlap) as stages:
        assert stages.take() == 10
        stages.put(1, refuse("one cannot be written"))
        with pytest.raises(InputError, match="two is bad"):
            stages.take()
        assert stages.take() == 30
        stages.put(3, refuse("nor can three"))
    assert failed == {1: "one cannot be written", 3: "nor can three"}
    assert log.read == [1, 2, 3]


def test_a_written_case_is_waited_for_when_the_run_breaks_off() -> None:
    written = []
    with pytest.raises(KeyboardInterrupt), Stages(str, [0, 1, 2], lambda index, error: None) as stages:
        stages.take()
        stages.put(0, lambda: written.append(0))
        raise KeyboardInterrupt
    assert written == [0]


def test_a_stop_is_noted_once() -> None:
    before = signal.getsignal(signal.SIGTERM)
    caught: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with StopRequest() as stop:
            assert not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked and not caught
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_cases_are_shared_out_and_come_back_in_order(size: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"case": str(index), "image": f"{index}.nii"} for index in range(count)]
    shared: list[Any] = []
    at = [0]
    monkeypatch.setattr(processes, "find_cases", lambda path: cases)
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: size)
    monkeypatch.setattr(processes.dist, "get_rank", lambda: at[0])
    monkeypatch.setattr(
        processes.dist,
        "broadcast_object_list",
        lambda found: shared.extend(found) if at[0] == 0 else found.__setitem__(0, shared[0]),
    )
    parts = []
    for at[0] in range(size):
        parts.append(share_cases("scans"))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    monkeypatch.setattr(processes.dist, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), parts))
    assert gather_rows(parts[0]) == cases


def test_the_end_of_another_process_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(found: list[Any], mine: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.dist, "all_gather_object", broken)
    with pytest.raises(SystemExit, match="ended early: start the same command again"):
        gather_rows([])


def test_restarts_on_several_machines_need_a_new_store(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in {**told, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        join_processes()
