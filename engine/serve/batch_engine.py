"""The server's engine as a batch uses it: requests behind all others, answers from a mailbox."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ..async_llm import EngineClient, EngineError, RequestFailed, RequestRefused
from ..batch import Refused
from ..config import EngineConfig
from ..core.answers import RequestOutput
from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from .metrics import Metrics

# Larger runs later. The scheduler gives seats and blocks to what has a lower one, and takes them
# from what runs with a higher one, so that a batch never delays another request by a step.
PRIORITY = 1 << 30
_WAIT_SECONDS = 0.25  # for an answer, before the batch looks whether it should end


class BatchEngine:
    """batch.EngineLike over a client; for one thread. Errors: EngineError besides Engine's."""

    def __init__(
        self,
        client: EngineClient,
        config: EngineConfig,
        owner: str,
        salt: bytes,
        metrics: Metrics,
    ) -> None:
        """owner: who shares the engine with other owners' batches; salt: of its prefix cache."""
        self.config = config
        self._client = client
        self._owner = owner
        self._salt = salt
        self._metrics = metrics
        self._mail: queue.SimpleQueue[tuple[str, RequestOutput | EngineError]]
        self._mail = queue.SimpleQueue()

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        final_only: bool = False,
        embed: bool = False,
    ) -> None:
        self._client.submit(
            request_id,
            prompt,
            params,
            priority=PRIORITY,
            cache_salt=self._salt,
            final_only=final_only,
            embed=embed,
            tenant=self._owner,
            sink=lambda item: self._mail.put((request_id, item)),
        )

    def abort(self, request_id: str) -> bool:
        self._client.abort(request_id)
        return True

    def step(self) -> list[RequestOutput | Refused]:
        """What has come, after a short wait where nothing has."""
        came: list[RequestOutput | Refused] = []
        end = time.monotonic() + _WAIT_SECONDS
        while not came and (left := end - time.monotonic()) > 0:
            try:
                came.append(self._open(*self._mail.get(timeout=left)))
                while True:
                    came.append(self._open(*self._mail.get_nowait()))
            except queue.Empty:
                continue
        return came

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        try:
            return self._client.render_chat(messages, **options)
        except RequestRefused as error:
            raise ParameterError(error.field or "messages", str(error)) from None

    def _open(self, request_id: str, item: RequestOutput | EngineError) -> RequestOutput | Refused:
        if isinstance(item, RequestRefused):
            error = item.unwrap()
            if getattr(error, "code", "") == "never_fits":  # this server will not grow
                error = ParameterError("prompt", str(error))
            return Refused(request_id, error)
        if isinstance(item, RequestFailed):
            return Refused(request_id, item, failed=True)
        if isinstance(item, EngineError):
            raise item
        if item.finished:
            self._metrics.ended(item, item.timings.total_s)
        return item


__all__ = ["PRIORITY", "BatchEngine"]
