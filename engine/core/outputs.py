"""What a caller sees of a request: its samples gathered into one cumulative RequestOutput."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .cost import Cost
from .plan import TokenLogprob
from .request import (
    CompletionOutput,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    Usage,
)
from .scheduler import Update

DecodeToken = Callable[[int], str]
Embedding = Callable[[], tuple[float, ...] | None]


class OutputGroup:
    """The n (or best_of) samples of one request, from admission to the last finish."""

    def __init__(
        self,
        request_id: str,
        *,
        prompt: str | None,
        echo_text: str,
        params: SamplingParams,
        samples: Sequence[Request],
        decode_token: DecodeToken,
        final_only: bool = False,
        embedding: Embedding | None = None,
    ) -> None:
        """final_only: nobody reads before the end, so nothing is made before it. `embedding` is
        asked at the end, where the request is for one."""
        self.request_id = request_id
        self.samples = tuple(samples)
        self.nanojoules = self.nanoseconds = 0  # its share of the machine: the ledger's
        self._prompt_token_ids = samples[0].prompt_token_ids
        self._prompt = prompt
        self._params = params
        self._decode_token = decode_token
        self.final_only = final_only
        self._embedding = embedding
        self._echo = echo_text
        self._shows_parts = not (final_only or self.ranked)
        self._deltas = [echo_text] * len(samples)

    @property
    def finished(self) -> bool:
        return all(s.is_finished for s in self.samples)

    @property
    def ranked(self) -> bool:
        """True where best_of asks for more samples than are returned: none shows before the end."""
        return len(self.samples) > self._params.n

    def take(self, update: Update) -> None:
        """Note the text that an update brought."""
        self._deltas[update.request.sample_index] += update.text_delta

    def output(self, cost: Cost | None = None) -> RequestOutput:
        """Everything so far, with `deltas` since the last call."""
        finished = self.finished
        shown = self.samples
        if self.ranked:
            shown = self._best() if finished else ()
        outputs = tuple([self._completion(i, s) for i, s in enumerate(shown)])
        if self._shows_parts:
            deltas, self._deltas = self._deltas, [""] * len(self.samples)
        else:
            deltas = [output.text for output in outputs]
        first = self.samples[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            prompt_logprobs=self._prompt_logprobs(first),
            outputs=outputs,
            finished=finished,
            usage=Usage(
                prompt_tokens=first.num_prompt_tokens,
                completion_tokens=sum([s.num_output_tokens for s in self.samples]),
                cached_tokens=first.num_cached_tokens,
            ),
            timings=first.timings(),
            deltas=tuple(deltas),
            cost=cost,
            embedding=self._embedding() if finished and self._embedding is not None else None,
        )

    def _best(self) -> tuple[Request, ...]:
        """The n samples of highest mean logprob per token, best first; ties by sample index."""

        def mean(s: Request) -> float:
            values = [entry.logprob for entry in s.logprobs]
            return sum(values) / len(values) if values else float("-inf")

        ranked = sorted(self.samples, key=lambda s: (-mean(s), s.sample_index))
        return tuple(ranked[: self._params.n])

    def _completion(self, index: int, s: Request) -> CompletionOutput:
        wanted = self._params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=self._echo + _text(s),
            token_ids=s.output_token_ids,
            cumulative_logprob=sum(e.logprob for e in s.logprobs) if s.logprobs else None,
            logprobs=tuple(self._logprobs(e) for e in s.logprobs) if wanted else None,
            finish_reason=s.finish_reason.value if s.finish_reason is not None else None,
            stop_reason=s.stop_reason,
            seed=s.seed,
            error=s.error,
        )

    def _prompt_logprobs(self, s: Request) -> tuple[dict[int, Logprob] | None, ...] | None:
        if self._params.prompt_logprobs is None:
            return None
        return (None, *(self._logprobs(entry) for entry in s.prompt_logprobs))

    def _logprobs(self, entry: TokenLogprob) -> dict[int, Logprob]:
        out = {
            token: Logprob(value, rank, self._decode_token(token))
            for rank, (token, value) in enumerate(entry.top, start=1)
        }
        chosen = Logprob(entry.logprob, entry.rank, self._decode_token(entry.token_id))
        return {**out, entry.token_id: chosen}


def _text(s: Request) -> str:
    return s.text.text if s.text is not None else ""
