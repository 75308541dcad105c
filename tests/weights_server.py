"""A loopback server of weights that does, by the first part of the address, what servers do on good and bad days."""

from __future__ import annotations

import hashlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from med3d_nets.registry import WEIGHTS, Weight
from tests import reference

NAME = "resnet_10"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"


def tiny_checkpoint() -> bytes:
    """A checkpoint of the released form, each tensor one stored element expanded: 72 tensors in a small file."""
    state = {
        f"module.{key}": torch.tensor(n if key.endswith("tracked") else float(n)).expand(shape)
        for n, (key, shape) in enumerate(reference.encoder_shapes(10, "B").items())
    }
    buffer = io.BytesIO()
    torch.save({"state_dict": state}, buffer)
    return buffer.getvalue()


def tiny_record(content: bytes) -> Weight:
    """The registry's record of resnet_10, with size and hash of other content."""
    return replace(WEIGHTS[NAME], size=len(content), sha256=hashlib.sha256(content).hexdigest())


class WeightsServer:
    """What the server has, and what it was asked.

    ``url("cut")`` is an address where it does what the method ``cut`` says.
    """

    def __init__(self, content: bytes, port: int) -> None:
        self.content, self.port = content, port
        self.asked: list[tuple[str, str]] = []  # what the server did, and the Range of the request

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, day: str) -> str:
        return f"{self.base}/{day}/{NAME}.pth"

    def ranges(self) -> list[str]:
        return [asked for _, asked in self.asked]


@contextmanager
def serving(content: bytes) -> Iterator[WeightsServer]:
    """Serve on a free port of the loopback interface, in a thread."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    http.daemon_threads = True
    http.state = WeightsServer(content, http.server_address[1])  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield http.state  # type: ignore[attr-defined]
    finally:
        http.shutdown()
        http.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.state: WeightsServer = self.server.state  # type: ignore[attr-defined]
        day = self.path.split("/")[1]
        self.nth = sum(done == day for done, _ in self.state.asked)
        self.state.asked.append((day, self.headers.get("Range", "")))
        behaviour: Callable[[], None] = getattr(self, day, self.absent)
        behaviour()

    def log_message(self, *_: object) -> None:
        pass

    # Good days.

    def good(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        whole = self.state.content
        if start >= len(whole):
            self._answer(416, b"", {"Content-Range": f"bytes */{len(whole)}"})
        elif start:
            self._answer(206, whole[start:], {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"})
        else:
            self._answer(200, whole)

    def without_length(self) -> None:
        self._answer(200, self.state.content, length=None)

    def redirect(self) -> None:
        self._answer(302, b"", {"Location": f"/good/{Path(self.path).name}"})

    def trickle(self) -> None:
        self._answer(200, b"", length=len(self.state.content))
        for start in range(0, len(self.state.content), 4096):
            self.wfile.write(self.state.content[start : start + 4096])
            time.sleep(0.1)

    # Days that get better.

    def cut(self) -> None:
        self._cut_at(len(self.state.content) // 2) if self.nth == 0 else self.good()

    def cut_often(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        part = self.state.content[start : start + len(self.state.content) // 6 + 1]
        place = {"Content-Range": f"bytes {start}-{len(self.state.content) - 1}/{len(self.state.content)}"}
        self._answer(206 if start else 200, part, place if start else {}, length=len(self.state.content) - start)

    def cut_then_no_range(self) -> None:
        self._cut_at(1000) if self.nth == 0 else self.no_range()

    def no_range(self) -> None:
        self._answer(200, self.state.content)

    def busy_once(self) -> None:
        self._answer(429, b"", {"Retry-After": "0"}) if self.nth == 0 else self.good()

    def broken_once(self) -> None:
        self._answer(503, b"") if self.nth == 0 else self.good()

    def no_resume(self) -> None:
        self._answer(416, b"") if "Range" in self.headers else self.good()

    # Bad days.

    def wrong(self) -> None:
        self._answer(200, bytes(255 - byte for byte in self.state.content))

    def truncated(self) -> None:
        self._answer(200, self.state.content[:-100])

    def truncated_without_length(self) -> None:
        self._answer(200, self.state.content[:-100], length=None)

    def cut_always(self) -> None:
        self._cut_at(1000)

    def longer(self) -> None:
        self._answer(200, self.state.content + b"more", length=None)

    def other_part(self) -> None:
        self._answer(206, self.state.content[7:], {"Content-Range": f"bytes 7-{len(self.state.content) - 1}/*"})

    def html(self) -> None:
        self._answer(200, PAGE, {"Content-Type": "text/html; charset=utf-8"})

    def html_as_binary(self) -> None:
        self._answer(200, b"\n" + PAGE)

    def empty(self) -> None:
        self._answer(200, b"")

    def loop(self) -> None:
        self._answer(302, b"", {"Location": self.path})

    def absent(self) -> None:
        self._answer(404, b"no")

    def forbidden(self) -> None:
        self._answer(403, b"no")

    def busy(self) -> None:
        self._answer(429, b"")

    def busy_for_an_hour(self) -> None:
        self._answer(429, b"", {"Retry-After": "3600"})

    def broken(self) -> None:
        self._answer(500, b"")

    def silent(self) -> None:
        time.sleep(1.0)

    def hang_up(self) -> None:
        self.close_connection = True

    def _cut_at(self, end: int) -> None:
        self._answer(200, self.state.content[:end], length=len(self.state.content))

    def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = -1) -> None:
        """Send; ``length`` None: leave Content-Length out, -1: that of the body."""
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        self.end_headers()
        self.wfile.write(body)
