"""A real MONAI Label server as a process of its own, driven over REST; shared by the tests of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import nibabel as nib
import numpy as np

from tools.label_server import prepare
from tools.phantom import make_phantom

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("MED3D_LABEL_PYTHON", "")
LUNG = "lung_ct_segmentation_resnet10"
LIVER = "liver_ct_segmentation_resnet10"
MULTI = "med3d_multidomain_segmentation_resnet10"
BUDGET = {"max_epochs": 2, "samples_per_epoch": 2, "batch_size": 1, "norm_batches": 1}

_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
_START_S, _ANSWER_S, _TRAIN_S = 180.0, 180, 300.0


class Server:
    """``monailabel start_server`` on a free port; stopped by its process id when the block ends.

    Args:
        app: the app's folder.
        studies: folder of the scans.
        conf: its ``--conf``.
        path: PYTHONPATH of the server.
    """

    def __init__(self, app: Path, studies: Path, path: str = str(ROOT), **conf: str) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log_file = app / "test.log"
        words = [word for pair in conf.items() for word in ("--conf", *pair)]
        self.command = [PYTHON, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
        self.command += ["--host", "127.0.0.1", "--port", str(port), *words]
        self.environment = {**_ENVIRONMENT, "PYTHONPATH": path, "MONAI_LABEL_AUTO_UPDATE_SCORING": "false"}

    def __enter__(self) -> Server:
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.log_file.parent,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(self._is_up, _START_S, "the server does not answer")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is not None:
            print(self.log[-6000:])

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def stop(self) -> None:
        """End this process, then what it has started."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # the group of this process alone
            self.process.wait()

    def ask(self, path: str, method: str = "GET", data: Any = None) -> Any:
        """Send JSON and read JSON."""
        body = None if data is None else json.dumps(data).encode()
        return json.loads(self.send(path, method, body, "application/json"))

    def send(self, path: str, method: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return answer.read()

    def infer(self, model: str, image: str, out: Path, **options: Any) -> nib.Nifti1Image:
        """The mask that a client gets, on disk as ``out``."""
        body, kind = _form({"params": json.dumps(options).encode()})
        out.write_bytes(self.send(f"/infer/{model}?image={image}&output=image", "POST", body, kind))
        return nib.load(out)

    def submit(self, image: str, label: Path, names: dict[str, int]) -> None:
        """Save a label as 3D Slicer does."""
        info = {"label_info": [{"name": name, "idx": value} for name, value in names.items()]}
        body, kind = _form({"params": json.dumps(info).encode(), "label": label.read_bytes()})
        self.send(f"/datastore/label?image={image}&tag=final", "PUT", body, kind)

    def train(self, model: str, **changed: Any) -> dict[str, Any]:
        """Train with the options that 3D Slicer sends: all of ``/info/``, the first of each list, some changed."""
        shown = self.ask("/info/")["trainers"][model]["config"]
        options = {key: value[0] if isinstance(value, list) else value for key, value in shown.items()}
        unknown = set(changed) - set(options)
        assert not unknown, f"the client does not show {unknown}"
        self.ask(f"/train/{model}", "POST", {**options, **changed})
        _wait(lambda: self._status()["status"] not in ("SUBMITTED", "RUNNING"), _TRAIN_S, "the training does not end")
        return self._status()

    def _status(self) -> dict[str, Any]:
        return self.ask("/train/")

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"the server has ended:\n{self.log[-4000:]}"
        try:
            self.ask("/info/")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True


def own_app(folder: Path, bundle: str, domain: str = "") -> tuple[Path, Path]:
    """Our app with a copy of a bundle: both folders."""
    copy = prepare(bundle, str(folder / "app"), domain)
    return folder / "app", copy


def stock_app(folder: Path) -> Path:
    """The app ``monaibundle`` as the package ships it, without a bundle."""
    command = [PYTHON, "-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(folder)]
    subprocess.run(command, check=True, env=_ENVIRONMENT, capture_output=True)
    (folder / "monaibundle" / "model").mkdir()
    return folder / "monaibundle"


def add_bundle(app: Path, bundle: str, name: str = "") -> Path:
    """Copy a bundle into an app."""
    return shutil.copytree(ROOT / "bundles" / bundle, app / "model" / (name or bundle))


def write_studies(folder: Path, organ: str, count: int) -> tuple[Path, Path]:
    """Scans ``case0`` … of one synthetic patient, mirrored in x and y on disk, of thick slices; and their label.

    The label of the liver counts tumours in.
    """
    region = "thorax" if organ == "lungs" else "abdomen"
    phantom = make_phantom(3, (240, 190, 72), (2.5, 2.5, 4.0), region, None, 12.0, organ)
    middle = int(np.nonzero(phantom.label)[2].mean())
    part = (slice(None, None, -1), slice(None, None, -1), slice(max(0, middle - 9), middle + 9))
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:3, 3] = [*(np.array(phantom.image.shape[:2]) - 1), part[2].start]
    affine = phantom.affine @ turn
    (folder / "studies").mkdir(parents=True)
    for index in range(count):
        image = np.rint(phantom.image[part]).astype(np.int16) + index
        nib.save(nib.Nifti1Image(image, affine), folder / "studies" / f"case{index}.nii.gz")
    label = phantom.label[part] if organ == "lungs" else (phantom.label[part] > 0).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, affine), folder / "label.nii.gz")
    return folder / "studies", folder / "label.nii.gz"


def run_bundle(copy: Path, scan: Path, out: Path, *more: str) -> nib.Nifti1Image:
    """The mask of ``monai.bundle run`` in the server's environment."""
    options = {"bundle_root": copy, "dataset_dir": scan, "output_dir": out}
    files = {"config_file": copy / "configs" / "inference.json"}
    pairs = [str(word) for name, value in {**files, **options}.items() for word in (f"--{name}", value)]
    done = subprocess.run(
        [PYTHON, "-m", "monai.bundle", "run", *pairs, *more], env=_ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return nib.load(next(out.glob("*_seg.nii.gz")))


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit a JSON file."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def assert_same_mask(served: nib.Nifti1Image, reference: nib.Nifti1Image) -> None:
    """Voxel for voxel, on one grid, and not empty."""
    assert served.shape == reference.shape
    np.testing.assert_allclose(served.affine, reference.affine, atol=1e-4)
    one, other = (np.asarray(image.dataobj).astype(int) for image in (served, reference))
    assert other.any(), "the reference is empty"
    assert (one == other).all(), f"{np.count_nonzero(one != other)} of {one.size} voxels differ"


def assert_clean(log: str) -> None:
    """Nothing in a server's log that an administrator would have to look into."""
    for bad in ("Traceback", "keys don't match", "[ERROR]", "[WARNING]"):
        found = [line for line in log.splitlines() if bad in line and "Reload model from cache" not in line]
        assert not found, "\n".join(found[:5])


def _wait(done: Callable[[], bool], seconds: float, message: str) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, f"{message} within {seconds:g} s"
        time.sleep(0.3)


def _form(parts: dict[str, bytes]) -> tuple[bytes, str]:
    """A multipart form: its body and content type; ``label`` is a file."""
    edge = uuid.uuid4().hex
    body = b""
    for name, content in parts.items():
        file = '; filename="label.nii.gz"' if name == "label" else ""
        body += f'--{edge}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
    return body + f"--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"
