"""A private zoo: its zips, its index and a page of its bundles, over HTTP."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urljoin

from tools.zoo_index import NAME, Record, by_version, load_index, parse_key

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #d5d9de; padding: .5rem .6rem; text-align: left; vertical-align: top }
th { background: #f2f4f6 }
td:last-child { white-space: nowrap }
.how td { padding-top: 0; white-space: normal }
.how p { margin: 0 0 .4rem }
tr:not(.how) td { border-bottom: 0 }
pre { background: #f2f4f6; padding: .5rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 0 }
.wide { overflow-x: auto }
.muted { color: #59636e }
@media (prefers-color-scheme: dark) {
  body { background: #14171a; color: #e6e9ec } th, pre { background: #20252a } th, td { border-color: #3a4148 }
  a { color: #7ab7ff } .muted { color: #9aa4ae }
}
"""


class Zoo(ThreadingHTTPServer):
    """Server of a folder that `tools.zoo pack` made; it gives nothing but what the index names.

    Args:
        folder: with ``model_info.json`` and zips; both are read anew for each request.
        host: address to listen on.
        port: 0 is a free one, see ``server_port``.
    """

    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int) -> None:
        self.folder = folder
        super().__init__((host, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: Zoo

    def do_GET(self) -> None:
        index = load_index(self.server.folder)
        name = unquote(self.path.partition("?")[0]).lstrip("/")
        if name == "":
            scheme = self.headers.get("X-Forwarded-Proto", "http")  # of a proxy that adds TLS
            self._text(page(index, f"{scheme}://{self.headers.get('Host') or 'localhost'}/"), "text/html")
        elif name == NAME:
            self._text(json.dumps(index, indent=2), "application/json")
        elif name.endswith(".zip") and name.removesuffix(".zip") in index and (self.server.folder / name).is_file():
            self._file(self.server.folder / name)
        else:
            self.send_error(404, "The zoo has no such file; its list is at /")

    do_HEAD = do_GET

    def _text(self, text: str, kind: str) -> None:
        content = text.encode()
        self._head(200, len(content), f"{kind}; charset=utf-8")
        if self.command == "GET":
            self.wfile.write(content)

    def _file(self, path: Path) -> None:
        """A zip, or what comes after the byte that an interrupted download asks for."""
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        if start >= size:
            self.send_error(416)
            return
        if match:
            self._head(206, size - start, "application/zip", {"Content-Range": f"bytes {start}-{size - 1}/{size}"})
        else:
            self._head(200, size, "application/zip")
        if self.command == "GET":
            with path.open("rb") as stream:
                stream.seek(start)
                shutil.copyfileobj(stream, self.wfile)

    def _head(self, status: int, length: int, kind: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(length), "Accept-Ranges": "bytes", **(more or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def page(index: Mapping[str, Record], base: str) -> str:
    """The list of bundles as HTML, which needs no JavaScript.

    Args:
        index: records.
        base: address of the zoo, with ``/`` at its end.
    """
    keys = sorted(
        index, key=lambda key: (str(index[key].get("task", "")), index[key].get("depth") or 0, by_version(key))
    )
    rows = "".join(_row(key, index[key], base) for key in keys)
    heads = "".join(f"<th>{head}</th>" for head in ("Bundle", "Task", "Depth", "Weights", "Licence", "Size"))
    body = f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div>' if rows else "<p>No bundle yet.</p>"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Bundle zoo</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>Bundle zoo</h1><p>{len(index)} MONAI bundles; <a href="{NAME}">{NAME}</a>. '
        "The first command, from a clone of this project's repository, checks the download's SHA-256; the second, "
        "MONAI's own, does not.</p>"
        f"{body}</body></html>\n"
    )


def _row(key: str, record: Record, base: str) -> str:
    name, version = parse_key(key)
    source = urljoin(base, record["source"])
    commands = (
        f"python -m tools.zoo fetch {name} --index {base}{NAME} --version {version}\n"
        f"python -m monai.bundle download --name {name} --url {source} --bundle_dir ."
    )
    cells = (
        f"<strong>{escape(name).replace('_', '_<wbr>')}</strong> {escape(version)}",
        escape(str(record.get("task", ""))),
        escape(str(record.get("depth", ""))),
        "in the zip" if record.get("has_weights") else "see its README",
        escape(str(record.get("licence", ""))),
        f'<a href="{escape(source)}">{record["size"] / 1e6:.1f} MB</a>',
    )
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    about = f'<p class="muted">{escape(str(record.get("description", "")))}</p>{_scores(record.get("scores", {}))}'
    how = f'<td colspan="{len(cells)}">{about}<pre>{escape(commands)}</pre></td>'
    return f'<tr>{row}</tr><tr class="how">{how}</tr>'


def _scores(scores: Mapping[str, Any]) -> str:
    listed = [f"{escape(name.replace('_', ' '))} <b>{escape(str(value))}</b>" for name, value in scores.items()]
    return f"<p>Scores: {', '.join(listed)}</p>" if listed else "<p>No scores.</p>"
