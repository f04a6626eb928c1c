"""What a caller sees of a request: its samples gathered into one cumulative RequestOutput."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .answers import CompletionOutput, Growth, Logprob, RequestOutput, TokenLogprob, Usage
from .cost import Cost
from .request import Request
from .sampling_params import SamplingParams
from .scheduler import Update

DecodeToken = Callable[[int], str]
Embedding = Callable[[], tuple[float, ...] | None]


def grows(params: SamplingParams) -> bool:
    """Whether steps bring a request of these parameters no more than text and tokens."""
    return params.num_samples == 1 and params.logprobs is None and params.prompt_logprobs is None


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
        growths: bool = False,
        embedding: Embedding | None = None,
    ) -> None:
        """final_only: nobody reads before the end, so nothing is made before it. growths: the
        reader adds up by itself what comes between a first and a last whole output, which is
        text and tokens of one sample (see grows()). `embedding` is asked at the end, where the
        request is for one."""
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
        # best_of asks for more samples than are returned: none shows before the end.
        self._ranked = len(samples) > params.n
        self._shows_parts = not (final_only or self._ranked)
        self._deltas = [echo_text] * len(samples)
        self._grows = growths
        self._has_begun = False  # to grow: behind its first output

    @property
    def finished(self) -> bool:
        return all([sample.is_finished for sample in self.samples])  # noqa: C419  (half the time)

    def take(self, update: Update) -> None:
        """Note the text that an update brought."""
        self._deltas[update.request.sample_index] += update.text_delta

    def growth(self, update: Update) -> Growth | None:
        """The update as what is told of it, where that is all; None where output() has to tell it.

        It is told at once, so nothing of it is kept.
        """
        if not self._has_begun or self.samples[0].is_finished:
            return None
        return Growth(self.request_id, update.new_token_ids, update.text_delta)

    def output(self, cost: Cost | None = None) -> RequestOutput:
        """Everything so far, with `deltas` since the last call."""
        finished = self.finished
        shown = self.samples
        if self._ranked:
            shown = self._best() if finished else ()
        outputs = tuple([self._completion(i, s) for i, s in enumerate(shown)])
        if self._shows_parts:
            deltas, self._deltas = self._deltas, [""] * len(self.samples)
        else:
            deltas = [output.text for output in outputs]
        first = self.samples[0]
        num_tokens = 0
        for sample in self.samples:
            num_tokens += sample.num_output_tokens
        self._has_begun = self._grows and num_tokens > 0
        # By place: names would double what making it costs, for every token that is shown.
        return RequestOutput(
            self.request_id,
            self._prompt,
            self._prompt_token_ids,
            None if self._params.prompt_logprobs is None else self._prompt_logprobs(first),
            outputs,
            finished,
            Usage(first.num_prompt_tokens, num_tokens, first.num_cached_tokens),
            first.timings(),
            tuple(deltas),
            cost,
            self._embedding() if finished and self._embedding is not None else None,
        )

    def _best(self) -> tuple[Request, ...]:
        """The n samples of highest mean logprob per token, best first; ties by sample index."""

        def mean(s: Request) -> float:
            values = [entry.logprob for entry in s.logprobs]
            return sum(values) / len(values) if values else float("-inf")

        ranked = sorted(self.samples, key=lambda s: (-mean(s), s.sample_index))
        return tuple(ranked[: self._params.n])

    def _completion(self, index: int, s: Request) -> CompletionOutput:
        text, entries = s.text, s.logprobs
        return CompletionOutput(
            index,
            self._echo if text is None else self._echo + text.text,
            s.output_token_ids,
            sum([e.logprob for e in entries]) if entries else None,
            None if self._params.logprobs is None else tuple([self._logprobs(e) for e in entries]),
            None if s.finish_reason is None else s.finish_reason.value,
            s.stop_reason,
            s.seed,
            s.error,
            _complete(s),
        )

    def _prompt_logprobs(self, s: Request) -> tuple[dict[int, Logprob] | None, ...]:
        return (None, *(self._logprobs(entry) for entry in s.prompt_logprobs))

    def _logprobs(self, entry: TokenLogprob) -> dict[int, Logprob]:
        out = {
            token: Logprob(value, rank, self._decode_token(token))
            for rank, (token, value) in enumerate(entry.top, start=1)
        }
        chosen = Logprob(entry.logprob, entry.rank, self._decode_token(entry.token_id))
        return {**out, entry.token_id: chosen}


def _complete(s: Request) -> bool | None:
    """A stop string cuts what had been complete with it."""
    complete = s.form.complete
    return complete and (s.text is None or s.text.matched is None)
