"""Batches that clients leave here: OpenAI's /v1/batches, run by engine/batch/ over the server's
engine, behind all other requests, and gone on with after a restart of either.

One folder for each: batch.json (the object as clients see it), a link to the input, and the run's
journal and output until they are files of the client's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from .. import batch
from ..async_llm import EngineError
from ..core.checks import AdmissionError
from ..core.sampling_params import SamplingParams
from .batch_engine import BatchEngine
from .errors import ApiError
from .files import After, FileStore, new_file_id, page_of, replacing
from .keeper import Keeper
from .metrics import Metrics
from .strict import Strict

log = logging.getLogger(__name__)

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_ID = re.compile(r"batch_[0-9a-f]{24}")
_DAY = 86_400
_RETRY_SECONDS = 0.5  # between two attempts while the engine is down
_JOIN_SECONDS = 10.0
# What a line leaves out is what the server's own paths would take.
_PARAMS = {"/v1/chat/completions": SamplingParams(max_tokens=None)}
_Text = Annotated[str, Meta(max_length=512)]
_OVER = ("completed", "failed", "expired", "cancelled")


class BatchRequest(Strict, kw_only=True):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[Annotated[str, Meta(max_length=64)], _Text], Meta(max_length=16)] | (
        None
    ) = None
    output_expires_after: dict[str, Any] | None = None


class BatchQuery(Strict, kw_only=True):
    """Behind GET /v1/batches?."""

    after: After = ""
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class BatchError(msgspec.Struct, kw_only=True):
    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(msgspec.Struct, kw_only=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, kw_only=True):
    """OpenAI's batch object. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    metadata: dict[str, str] | None = None

    def enter(self, status: str) -> None:
        """Into another state, from now on."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))


class BatchList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class _Stored(msgspec.Struct, kw_only=True):
    """batch.json: the object, and the ids that its files will have, drawn when it was made."""

    batch: Batch
    output_id: str
    error_id: str
    salt: bytes  # of the prefix cache: its key's own


class _Ending(Exception):
    """The server ends: the batch goes on when it is started again."""


class _Cancelling(Exception):
    """Its owner wants no more of it."""


class Batches:
    """All batches of a server. Methods are for any thread; each owner's run one after another on a
    thread of their own. Errors: ApiError; OSError."""

    def __init__(
        self, folder: Path, files: FileStore, keeper: Keeper, metrics: Metrics, name: str, room: int
    ) -> None:
        """name: the served model's. room: requests in flight, of all batches together; 0 is as many
        as the engine runs at once."""
        self._folder = folder
        self._files = files
        self._keeper = keeper
        self._metrics = metrics
        self._name = name
        self._room = room
        self._lock = threading.RLock()
        self._all: dict[str, dict[str, _Stored]] = {}  # by owner, by id, the oldest first
        self._threads: dict[str, threading.Thread] = {}
        self._ending = threading.Event()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = [
            (path.parts[-3], msgspec.json.decode(path.read_bytes(), type=_Stored))
            for path in folder.glob("*/batch_*/batch.json")
        ]
        for owner, stored in sorted(found, key=lambda f: (f[1].batch.created_at, f[1].batch.id)):
            self._all.setdefault(owner, {})[stored.batch.id] = stored

    # ------------------------------------------------------------------------ of the clients

    def create(
        self,
        owner: str,
        salt: bytes,
        *,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        metadata: dict[str, str] | None,
    ) -> Batch:
        """salt: of the owner's prefix cache."""
        described = self._files.get(owner, input_file_id)
        if described.purpose != "batch":
            raise ApiError(
                "invalid_value",
                f"the file's purpose is {described.purpose!r}; a batch wants purpose='batch'",
                param="input_file_id",
            )
        now = int(time.time())
        made = Batch(
            id=f"batch_{secrets.token_hex(12)}",
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window=completion_window,
            created_at=now,
            expires_at=now + _DAY,
            metadata=metadata,
        )
        stored = _Stored(batch=made, output_id=new_file_id(), error_id=new_file_id(), salt=salt)
        folder = self._place(owner, made.id)
        folder.mkdir(mode=0o700, parents=True)
        # Its own name for the same bytes: the client may delete the file while the batch runs.
        os.link(self._files.path(owner, input_file_id), folder / "input.jsonl")
        with self._lock:
            self._all.setdefault(owner, {})[made.id] = stored
            self._save(owner, stored)
            self._go_on(owner)
            return _copy(made)

    def get(self, owner: str, batch_id: str) -> Batch:
        with self._lock:
            return _copy(self._find(owner, batch_id).batch)

    def page(self, owner: str, after: str, limit: int) -> tuple[list[Batch], bool]:
        """(the newest first, whether there are more)."""
        with self._lock:
            rows = [stored.batch for stored in self._all.get(owner, {}).values()][::-1]
            found, more = page_of(rows, after, limit)
            return [_copy(b) for b in found], more

    def cancel(self, owner: str, batch_id: str) -> Batch:
        """What was answered before becomes the output."""
        with self._lock:
            stored = self._find(owner, batch_id)
            if stored.batch.status in _OVER or stored.batch.status == "finalizing":
                raise ApiError(
                    "conflict", f"the batch is {stored.batch.status}: nothing is left to cancel"
                )
            if stored.batch.status != "cancelling":
                stored.batch.enter("cancelling")
                self._save(owner, stored)
            return _copy(stored.batch)

    # ------------------------------------------------------------------------- of the server

    def start(self) -> None:
        """Go on with what an earlier server left."""
        with self._lock:
            for owner in list(self._all):
                self._go_on(owner)

    def stop(self) -> None:
        """End every run within a step; all of them go on with start() of another server."""
        self._ending.set()
        with self._lock:
            threads = list(self._threads.values())
        for thread in threads:
            thread.join(_JOIN_SECONDS)

    def at_once(self) -> int:
        """Samples that one batch may have in flight now: its share of the room."""
        room = self._room or self._keeper.info.config.max_num_seqs
        return max(1, room // max(1, len(self._threads)))

    # ------------------------------------------------------------------------------- private

    def _find(self, owner: str, batch_id: str) -> _Stored:
        stored = self._all.get(owner, {}).get(batch_id)
        if stored is None:
            raise ApiError(
                "not_found", f"no batch {batch_id[:100]!r} of this key's", param="batch_id"
            )
        return stored

    def _place(self, owner: str, batch_id: str) -> Path:
        return self._folder / owner / batch_id

    def _save(self, owner: str, stored: _Stored) -> None:
        with replacing(self._place(owner, stored.batch.id) / "batch.json") as file:
            file.write(msgspec.json.encode(stored))

    def _enter(self, owner: str, stored: _Stored, status: str) -> None:
        with self._lock:
            stored.batch.enter(status)
            self._save(owner, stored)
        if status in _OVER:
            self._metrics.batch_ended(status)
            log.info("batch %s is %s", stored.batch.id, status)

    def _go_on(self, owner: str) -> None:
        """Have a thread for an owner with something to do. With the lock held."""
        if owner in self._threads or self._ending.is_set() or self._next(owner) is None:
            return
        thread = threading.Thread(
            target=self._work, args=(owner,), name=f"batches {owner[:8]}", daemon=True
        )
        self._threads[owner] = thread
        thread.start()

    def _next(self, owner: str) -> _Stored | None:
        waiting = self._all.get(owner, {}).values()
        return next((s for s in waiting if s.batch.status not in _OVER), None)

    def _work(self, owner: str) -> None:
        while True:
            with self._lock:
                stored = self._next(owner)
                if stored is None or self._ending.is_set():
                    del self._threads[owner]
                    return
            try:
                self._run(owner, stored)
            except _Ending:
                continue
            except Exception as error:  # a full disk, say: the client must not wait for ever
                log.exception("batch %s failed", stored.batch.id)
                self._fail(owner, stored, "server_error", f"the server could not go on: {error}")

    def _run(self, owner: str, stored: _Stored) -> None:
        """One batch to its end. Errors: _Ending."""
        folder = self._place(owner, stored.batch.id)
        ending = "completed"
        try:
            if stored.batch.status == "validating":
                self._validate(owner, stored)
                self._enter(owner, stored, "in_progress")
            if stored.batch.status != "finalizing":
                self._answer(owner, stored, folder)
        except _Cancelling:
            ending = "cancelled"
        except batch.BatchError as error:
            if error.code != batch.LIMIT:
                code = "duplicate_custom_id" if error.code == batch.DUPLICATE else "invalid_batch"
                said = error.why or str(error).replace(f"{folder}/", "")
                self._fail(owner, stored, code, said, error.line)
                return
            ending = "expired"
        if ending != "completed":
            batch.partial(folder / "output.jsonl")
        elif stored.batch.status != "finalizing":
            self._enter(owner, stored, "finalizing")
        self._finish(owner, stored, folder, ending)

    def _validate(self, owner: str, stored: _Stored) -> None:
        """Errors: batch.BatchError for the first line that is no request to the endpoint."""
        inputs = batch.Inputs(
            [self._place(owner, stored.batch.id) / "input.jsonl"],
            format="jsonl",
            params=_PARAMS.get(stored.batch.endpoint, SamplingParams()),
            models=frozenset([self._name]),
            record=False,
            url=stored.batch.endpoint,
        )
        with self._lock:
            stored.batch.request_counts.total = len(inputs)
        inputs.close()
        if not inputs.files[0].lines:
            raise batch.BatchError("", "", why="the file holds no request")

    def _answer(self, owner: str, stored: _Stored, folder: Path) -> None:
        """Until all is answered, through any number of engines. Errors: of batch.run(); _Ending;
        _Cancelling."""
        limits = batch.Limits(deadline=_iso(stored.batch.expires_at))

        def check() -> None:
            if self._ending.is_set():
                raise _Ending
            if stored.batch.status == "cancelling":
                raise _Cancelling

        def watch(summary: batch.Summary) -> None:
            counts = stored.batch.request_counts
            counts.total, counts.failed = summary.requests, summary.errors
            counts.completed = summary.done_before + summary.done - summary.errors

        while True:
            check()
            limits.check_time()
            try:
                client, config = self._keeper.llm.client, self._keeper.info.config
                batch.run(
                    BatchEngine(client, config, owner, stored.salt, self._metrics),
                    [folder / "input.jsonl"],
                    folder / "output.jsonl",
                    model={**client.facts(), "name": self._name},
                    params=_PARAMS.get(stored.batch.endpoint, SamplingParams()),
                    on_error="record",
                    limits=limits,
                    progress=False,
                    check=check,
                    watch=watch,
                    at_once=self.at_once,
                )
                return
            except (ApiError, EngineError, AdmissionError) as error:
                log.warning("batch %s waits for the engine: %s", stored.batch.id, error)
                self._ending.wait(_RETRY_SECONDS)

    def _finish(self, owner: str, stored: _Stored, folder: Path, ending: str) -> None:
        """The output as the client's files: answers in one, errors in another; safe to repeat."""
        output, made = folder / "output.jsonl", stored.batch
        counts = RequestCounts(total=made.request_counts.total)
        for good, file_id in ((True, stored.output_id), (False, stored.error_id)):
            lines = (line for line in _lines(output) if (_status(line) == 200) is good)
            first = next(lines, None)
            if first is None:
                continue
            name = f"{made.id}_{'output' if good else 'error'}.jsonl"
            number = itertools.count(1)
            chunks = (line for line in itertools.chain([first], lines) if next(number))
            self._files.put(owner, file_id, chunks, filename=name, purpose="batch_output")
            if good:
                made.output_file_id, counts.completed = file_id, next(number) - 1
            else:
                made.error_file_id, counts.failed = file_id, next(number) - 1
        made.request_counts = counts
        self._enter(owner, stored, ending)
        for path in folder.iterdir():
            if path.name != "batch.json":
                path.unlink()

    def _fail(
        self, owner: str, stored: _Stored, code: str, message: str, line: int | None = None
    ) -> None:
        stored.batch.errors = BatchErrors(data=[BatchError(code=code, message=message, line=line)])
        self._enter(owner, stored, "failed")


def _copy(made: Batch) -> Batch:
    """As it is now: the runner's thread goes on with the other."""
    return msgspec.structs.replace(
        made, request_counts=msgspec.structs.replace(made.request_counts)
    )


def _iso(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(seconds))


def _lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from file


def _status(line: bytes) -> int:
    return msgspec.json.decode(line, type=_Line).response.status_code


class _Response(msgspec.Struct):
    status_code: int


class _Line(msgspec.Struct):
    response: _Response


__all__ = ["ENDPOINTS", "Batch", "BatchList", "BatchQuery", "BatchRequest", "Batches"]
