"""The data folder: files and batches, locked against a second server."""

from __future__ import annotations

import fcntl
from pathlib import Path

import msgspec

from ..config import ConfigError
from .batches import Batches
from .files import FileStore
from .keeper import Keeper
from .metrics import Metrics
from .settings import ServeConfig


class Storage:
    """What a server keeps on its disk. Errors: ConfigError("data_dir")."""

    def __init__(
        self, folder: str, settings: ServeConfig, keeper: Keeper, metrics: Metrics, name: str
    ) -> None:
        path = Path(folder)
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (path / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.files = FileStore(path / "files", max_bytes=settings.max_storage_bytes)
            self.batches = Batches(
                path / "batches", self.files, keeper, metrics, name, settings.batch_requests
            )
        except BlockingIOError:
            raise ConfigError(
                "data_dir", f"{folder}: another server keeps its files there"
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError("data_dir", f"{folder} cannot be used: {error}") from error

    def close(self) -> None:
        """End what runs; it goes on with the next server."""
        self.batches.stop()
        self._lock.close()


__all__ = ["Storage"]
