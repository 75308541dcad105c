"""The bytes behind one address, into a partial file that a later attempt goes on with.

What they are worth is for the caller to check: nothing here knows a hash.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from med3d_nets.weights.store import is_page

_CHUNK = 1 << 18
_REDIRECTS = 10
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH)


@dataclass(frozen=True)
class Patience:
    """How long to try.

    Attributes:
        timeout: seconds without a byte after which a connection is given up.
        tries: attempts in a row that bring nothing new.
        wait: seconds before the second attempt; doubles from one to the next.
        longest: seconds that a wait may have, also one that the server asks for.
    """

    timeout: float = 20.0
    tries: int = 4
    wait: float = 1.0
    longest: float = 60.0


class SourceError(Exception):
    """Why one source gave no file."""


class StoreError(Exception):
    """Why the file cannot be written here, whatever the source."""


class _PassingError(Exception):
    """A fault that another attempt may not meet."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _REDIRECTS
    max_repeats = 2
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 lacks it


def download(url: str, partial: Path, size: int | None, patience: Patience, progress: bool) -> None:
    """Bring what is behind an address into ``partial``, after what that holds already.

    Args:
        url: ``http://`` or ``https://`` (with what the environment says of proxies), ``file://``, or a path.
        partial: file to append to; kept when a connection ends early, removed when its content cannot be right.
        size: bytes of the whole, None: as the server says.
        patience: how long to try.
        progress: show a bar, where there is a terminal.

    Raises:
        SourceError: the source does not give the file; the message is the reason.
        StoreError: ``partial`` cannot be written; the message is the reason.
    """
    scheme = url.split("://")[0] if "://" in url else ""
    if scheme not in ("http", "https"):
        path = Path(urllib.request.url2pathname(url.removeprefix("file://"))) if scheme == "file" else Path(url)
        if scheme not in ("", "file"):
            raise SourceError(f"{scheme} is no http, https or file address")
        _copy(path, partial, progress)
        return
    idle, most = 0, _held(partial)
    while True:
        try:
            _attempt(url, partial, size, patience.timeout, progress)
            return
        except _PassingError as error:
            idle = 1 if _held(partial) > most else idle + 1
            most = max(most, _held(partial))
            wait = error.wait if error.wait is not None else min(patience.wait * 2 ** (idle - 1), patience.longest)
            if wait > patience.longest:
                raise SourceError(f"{error}; the server asks to wait {wait:.0f} s") from error
            if idle >= patience.tries:
                raise SourceError(f"{error} ({idle} tries)") from error
        time.sleep(wait)


def _copy(path: Path, partial: Path, progress: bool) -> None:
    _remove(partial)  # the disk is quick, and what lies there may be of another source
    try:
        with open(path, "rb") as source, _bar(partial, path.stat().st_size, 0, progress) as bar:
            while chunk := source.read(_CHUNK):
                _append(partial, chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise SourceError(error.strerror or str(error)) from error


def _attempt(url: str, partial: Path, size: int | None, timeout: float, progress: bool) -> None:
    held = _held(partial)
    if size is not None and held >= size:  # whole: the hash decides; longer: a new start
        if held == size:
            return
        held = _remove(partial)
    try:
        with _opened(url, held, partial, timeout) as answer:
            total = _total(answer, held)
            if held and not (answer.status == 206 and _first_byte(answer) == held):
                if answer.status == 206:
                    raise SourceError("the server sends another part of the file than the one asked for")
                held, total = 0, _total(answer, 0)  # the server ignores Range
            _receive(answer, partial, held, total, size, progress)
    except (OSError, http.client.HTTPException) as error:
        _fail(error)


@contextmanager
def _opened(url: str, held: int, partial: Path, timeout: float) -> Iterator[http.client.HTTPResponse]:
    headers = {"User-Agent": "med3d_nets", "Accept-Encoding": "identity"}
    if held:
        headers["Range"] = f"bytes={held}-"
    opener = urllib.request.build_opener(_Redirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except ValueError as error:
        raise SourceError(f"no address ({error})") from error
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and held:
                _remove(partial)
                raise _PassingError("HTTP 416: the server has no bytes after those held") from error
            _refused(error)
    with answer:
        yield answer


def _receive(
    answer: http.client.HTTPResponse, partial: Path, held: int, total: int | None, size: int | None, progress: bool
) -> None:
    whole = total if size is None else size
    page = answer.headers.get_content_type() == "text/html"
    with _bar(partial, whole, held, progress) as bar:
        while chunk := answer.read1(_CHUNK):
            if page or (held == 0 and is_page(chunk)):
                raise SourceError("an HTML page in place of the file (a login page, or a proxy's?)")
            if None not in (size, total) and total != size:
                raise SourceError(f"the file there has {total:,} bytes, {size:,} are right")
            if held == 0:
                _remove(partial)  # only now: what a login page answered is no reason to lose what was fetched
            _append(partial, chunk)
            bar.update(len(chunk))
            held += len(chunk)
            if whole is not None and held > whole:
                _remove(partial)
                raise SourceError(f"the server sends more than the {whole:,} bytes of the file")
    if whole is not None and held < whole:
        raise _PassingError(f"the connection ended after {held:,} of {whole:,} bytes")


def _refused(error: urllib.error.HTTPError) -> NoReturn:
    if 300 <= error.code < 400:
        loop = "infinite loop" in str(error.reason)
        raise SourceError(
            f"redirects in a loop, or more than {_REDIRECTS}" if loop else f"HTTP {error.code} leads nowhere"
        )
    reason = f"HTTP {error.code} {error.reason}".strip()
    if error.code in (408, 425, 429) or error.code >= 500:
        raise _PassingError(reason, _retry_after(error.headers))
    raise SourceError(reason)


def _fail(error: OSError | http.client.HTTPException) -> NoReturn:
    connecting = isinstance(error, urllib.error.URLError)
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, socket.gaierror):
        raise SourceError(f"no network, or no such server ({cause.strerror})") from error
    if isinstance(cause, ssl.SSLCertVerificationError):
        raise SourceError(f"the certificate is not accepted ({cause.verify_message})") from error
    if isinstance(cause, http.client.InvalidURL):
        raise SourceError(f"no address ({cause})") from error
    if isinstance(cause, ConnectionRefusedError) or getattr(cause, "errno", None) in _NO_WAY:
        raise SourceError(f"no connection ({getattr(cause, 'strerror', cause)})") from error
    if isinstance(cause, TimeoutError):  # to wait for a connection again and again would take minutes without network
        raise (SourceError if connecting else _PassingError)("no answer in time") from error
    raise _PassingError(getattr(cause, "strerror", None) or str(cause) or type(cause).__name__) from error


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait; it may give a date."""
    text = (headers.get("Retry-After") or "").strip()
    if text.isdigit():
        return float(text)
    date = email.utils.parsedate_tz(text)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _total(answer: http.client.HTTPResponse, held: int) -> int | None:
    """Bytes of the whole file, as far as the server says."""
    length = answer.headers.get("Content-Length", "")
    return held + int(length) if length.isdigit() else None


def _first_byte(answer: http.client.HTTPResponse) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _bar(partial: Path, total: int | None, held: int, progress: bool) -> tqdm:
    name = partial.name.rsplit("-", 1)[-1]
    return tqdm(
        total=total, initial=held, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=not progress or None
    )


def _append(partial: Path, chunk: bytes) -> None:
    """Write and close, so that every fault of the disk comes up here and is none of the source's."""
    try:
        with open(partial, "ab") as file:
            file.write(chunk)
    except OSError as error:
        raise StoreError(error.strerror or str(error)) from error


def _held(partial: Path) -> int:
    return partial.stat().st_size if partial.is_file() else 0


def _remove(partial: Path) -> int:
    partial.unlink(missing_ok=True)
    return 0
