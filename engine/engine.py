"""The engine: one model, its scheduler and its runner, turned one step at a time.

`Engine.step()` is schedule -> build -> execute -> commit; on a backend that overlaps, the last two
are of the step launched by the call before. It is not thread-safe: whoever turns it (LLM, or a
client's engine thread) is its only caller.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import receipts
from .account.ledger import EnergyStats, Ledger, Prices
from .account.meter import MeterUnavailable, open_meter
from .config import ConfigError, EngineConfig
from .core.answers import Growth, RequestOutput
from .core.checks import as_prompt, check_params, check_token_ids
from .core.outputs import OutputGroup, grows
from .core.sampling_params import SamplingParams
from .core.scheduler import Scheduler, SchedulerConfig, SchedulerStats, Update
from .core.steplog import RecentSteps, StepLog, StepRecord
from .door import Door, embedding_params, unicode_text
from .features.grammar import Grammars
from .receipts import Receipt
from .receipts.facts import all_facts
from .runtime.assemble import LoadedModel, Progress, load_model
from .runtime.pooling import Pool
from .runtime.runner import Execution, Flight, LogprobObserver

_log = logging.getLogger("engineroom")
_RECENT_STEPS = 512  # that stats() sums up
Tell = Callable[[Sequence[Growth]], None]


@dataclass(frozen=True)
class AddedRequest:
    """What admission settled: the seed that replays the request, and its prompt's length.

    `displaced`: waiting requests of another tenant that were aborted for it, in a full queue.
    """

    request_id: str
    seed: int
    num_prompt_tokens: int
    displaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineStats:
    """The engine at one moment; tokens and steps since it started."""

    scheduler: SchedulerStats
    num_steps: int
    num_prompt_tokens: int
    num_generated_tokens: int
    energy: EnergyStats
    recent: RecentSteps


@dataclass(frozen=True, slots=True)
class _Flying:
    """A step in flight, when its turn began, and how long it took to plan."""

    flight: Flight
    started: float
    schedule_s: float


class Engine:
    """Serves requests over one loaded model."""

    def __init__(self, loaded: LoadedModel, *, clock: Callable[[], float] = time.monotonic) -> None:
        config = loaded.config
        self.loaded = loaded
        self.config = config
        self.model_config = loaded.model
        self.memory = loaded.memory
        self.tokenizer = loaded.tokenizer
        self.chat_template = loaded.chat_template
        self.log = StepLog(path=config.step_log)
        self.ledger = _ledger(config, gpu=loaded.backend_choice.name == "triton")
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=loaded.memory.max_model_len,
                num_blocks=loaded.memory.num_blocks,
                block_size=config.block_size,
                max_waiting=config.max_waiting,
                enable_prefix_caching=config.enable_prefix_caching,
            ),
            clock=clock,
        )
        self._closed = False
        self._facts: dict[str, Any] | None = None
        self._clock = clock
        self._runner = loaded.runner
        self._grammars = Grammars(self.tokenizer)
        self._door = Door(
            self.tokenizer,
            self._grammars,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.memory.max_model_len,
            clock=clock,
        )
        self._groups: dict[str, OutputGroup] = {}
        self._growths: list[Growth] = []  # of the latest step
        self._in_flight: deque[_Flying] = deque()  # launched, not committed
        self._num_steps = 0
        self._num_prompt_tokens = 0

    @classmethod
    def from_model(
        cls, model: str, config: EngineConfig | None = None, progress: Progress | None = None
    ) -> Engine:
        """Load `model` and make its engine. Errors: those of runtime.assemble.load_model."""
        return cls(load_model(config or EngineConfig(model=model), progress))

    # ------------------------------------------------------------------------------- requests

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: bytes = b"",
        observer: LogprobObserver | None = None,
        final_only: bool = False,
        growths: bool = False,
        embed: bool = False,
        tenant: str = "",
        weight: float = 1.0,
    ) -> AddedRequest:
        """Admit a request, or refuse it with the reason; nothing changes where it is refused.

        `prompt` is text or token ids. `observer` is given full-vocabulary logprobs of the prompt
        in chunks (see `LLM.score`); it needs params.prompt_logprobs. With `final_only` the request
        has one RequestOutput, at its end, and costs nothing to show before. With `growths` steps
        between its first RequestOutput and its last may bring a Growth instead, which costs little
        (see take_growths()); one with several samples or logprobs has none. With `embed` it
        generates nothing and its one output has the embedding of the prompt. Waiting requests of
        several tenants are admitted by the tokens that each was served, over its weight.

        Errors: ParameterError (a bad parameter), AdmissionError (it cannot run here).
        """
        if self._closed:
            raise RuntimeError("this engine was closed; make a new one")
        check_params(params)
        prompt = as_prompt(prompt)
        text = prompt if isinstance(prompt, str) else None
        ids = self._door.prompt_ids(prompt, params)
        bad_words = self._door.bad_word_ids(params)
        check_token_ids(params, ids, self.model_config.vocab_size, bad_word_ids=bad_words)
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        run = embedding_params(params) if embed else params
        growths = growths and not (final_only or embed) and grows(params)
        samples = self._door.samples(
            request_id,
            ids,
            run,
            seed,
            bad_words,
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            weight=weight,
            final_only=final_only,
            growths=growths,
            reuses_prefix=not embed,  # a position that is not computed has no hidden state
        )
        pool = Pool(len(ids)) if embed else None
        echo = ""
        if params.echo:  # what the model is given: a truncated prompt as its tokens spell it
            whole = params.truncate_prompt_tokens is None
            echo = text if whole and text is not None else self.tokenizer.decode(ids)
        group = OutputGroup(
            request_id,
            prompt=text,
            echo_text=echo,
            params=run,
            samples=samples,
            decode_token=self._door.token_text,
            final_only=final_only or embed,
            growths=growths,
            embedding=None if pool is None else pool.embedding,
        )
        displaced = tuple(self.scheduler.add(*samples))
        self._groups[request_id] = group
        if pool is not None:
            self._runner.pooling.pools[samples[0].key] = pool
        if observer is not None:
            self._runner.observers[samples[0].key] = observer
        self._num_prompt_tokens += len(ids)
        return AddedRequest(request_id, seed, len(ids), displaced)

    def is_prepared(self, params: SamplingParams) -> bool:
        """Whether add_request() has nothing to compile for these parameters. From any thread."""
        return params.structured is None or self._grammars.is_kept(params.structured)

    def prepare(self, params: SamplingParams) -> None:
        """Compile what add_request() would have to: up to seconds, from any thread.

        Errors: ParameterError("structured").
        """
        if params.structured is not None:
            self._grammars.compile(params.structured)

    def abort(self, request_id: str) -> bool:
        """End a request now; its last RequestOutput comes with the next step. Unknown id: False."""
        return self.scheduler.abort(request_id) > 0

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation through the model's chat template.

        Errors: TemplateError where there is no template or it refuses the messages.
        """
        return self.tokenizer.encode(
            self.render_chat_text(messages, **options), add_special_tokens=False
        )

    def render_chat_text(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The text that `render_chat` encodes."""
        return self.loaded.require_chat_template().render(messages, **options)

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, as add_request() takes it. Errors: ParameterError("prompt")."""
        if add_special_tokens:
            return self._door.prompt_ids(text, SamplingParams())
        return self.tokenizer.encode(unicode_text(text), add_special_tokens=False)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids. Errors: AdmissionError("token_id")."""
        check_token_ids(SamplingParams(), token_ids, self.model_config.vocab_size)
        known = [t for t in token_ids if t < self.tokenizer.vocab_size]
        return self.tokenizer.decode(known, skip_special_tokens=skip_special_tokens)

    # ----------------------------------------------------------------------------------- steps

    @property
    def has_work(self) -> bool:
        return bool(self._groups or self._in_flight)

    def step(self, tell: Tell | None = None) -> list[RequestOutput]:
        """Turn the engine once: schedule, build, execute, commit. Returns what changed.

        `tell` is called in the middle, as soon as they are known, with growths that
        take_growths() has later where there is no `tell`, or no hurry. It calls nothing of ours.
        On a backend that overlaps, the step scheduled here is launched behind the one in flight,
        and that one is what is committed: its tokens are shown one call later.
        """
        started = self._clock()
        before = self._in_flight[-1] if self._in_flight else None
        if before is None:
            self.ledger.begin()
        plan = self.scheduler.schedule()
        flying = None
        if plan is not None:
            scheduled = self._clock()
            flight = self._runner.launch(plan, None if before is None else before.flight)
            flying = _Flying(flight, started, scheduled - started)
            self._in_flight.append(flying)
        outputs = None if before is None else self._commit(before, tell)
        if flying is not None:
            self._runner.sample(flying.flight)  # every token before it is known now
            if not self._runner.backend.overlaps:
                outputs = self._commit(flying, tell)
        if outputs is None:
            outputs = self._outputs(self.scheduler.drain_finished())
        if not self._in_flight:
            self.ledger.end(resting=not self._groups)
        return outputs

    def take_growths(self) -> list[Growth]:
        """What the latest step() brought requests of `growths`, beside the outputs it returned."""
        taken, self._growths = self._growths, []
        return taken

    def _commit(self, flying: _Flying, tell: Tell | None) -> list[RequestOutput]:
        """Wait for the oldest step in flight, take its answer and record it."""
        plan = flying.flight.plan
        execution = self._runner.answer(flying.flight)
        answered = self._clock()
        self._in_flight.popleft()
        growths = self.scheduler.growths(execution.outcome)
        if growths:
            (tell or self._growths.extend)(growths)
        self.ledger.charge(plan, self._groups, execution.execute_s)
        updates = [
            *self.scheduler.commit(plan, execution.outcome),
            *self.scheduler.drain_finished(),
        ]
        outputs = self._outputs(updates)
        self._record(flying, execution, self._clock() - answered)
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            self.scheduler.stats(),
            self._num_steps,
            self._num_prompt_tokens,
            self.scheduler.num_generated_tokens,
            self.ledger.stats(),
            self.log.recent(_RECENT_STEPS),
        )

    def facts(self) -> dict[str, Any]:
        """receipts.facts.all_facts(); the weights are read for it once, when first asked for."""
        if self._facts is None:
            self._facts = all_facts(self.loaded)
        return self._facts

    def receipt(self, output: RequestOutput, params: SamplingParams) -> Receipt:
        """Of a finished output of this engine. Errors: ReceiptError."""
        return receipts.make(self.facts(), output, params)

    def close(self) -> None:
        """Release the log, the template's helper process and the mapped file; a step in flight is
        let land, and its answer dropped."""
        self._closed = True
        for flying in self._in_flight:
            self._runner.answer(flying.flight)  # it may read what is released here
        self.log.close()
        self.ledger.close()
        self.loaded.close()

    # --------------------------------------------------------------------------------- private

    def _outputs(self, updates: Sequence[Update]) -> list[RequestOutput]:
        touched: dict[str, OutputGroup] = {}
        for update in updates:
            request_id = update.request.request_id
            group = self._groups.get(request_id)
            if group is None or (group.final_only and not update.finished):
                continue
            if (growth := group.growth(update)) is not None:
                self._growths.append(growth)
                continue
            group.take(update)
            touched[request_id] = group
        outputs = []
        for group in touched.values():
            if group.final_only and not group.finished:
                continue
            output = group.output(self.ledger.cost(group))
            outputs.append(output)
            if output.finished:
                del self._groups[group.request_id]
                self._runner.observers.pop(group.samples[0].key, None)
                self._runner.pooling.pools.pop(group.samples[0].key, None)
        return outputs

    def _record(self, flying: _Flying, execution: Execution, commit_s: float) -> None:
        plan = flying.flight.plan
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        self._num_steps += 1
        self.log.append(
            StepRecord(
                step_id=plan.step_id,
                t_start=flying.started,
                t_schedule_s=flying.schedule_s,
                t_build_s=execution.build_s,
                t_execute_s=execution.execute_s,
                t_commit_s=commit_s,
                num_tokens=plan.num_tokens,
                num_logit_rows=plan.num_logit_rows,
                num_running=scheduler.num_running,
                num_waiting=scheduler.num_waiting,
                num_preempted=len(plan.preempted),
                free_blocks=blocks.num_free - blocks.num_cached,
                cached_blocks=blocks.num_cached,
                requests=plan.roster.log_entries,
                backend=self._runner.backend.name,
            )
        )


def _ledger(config: EngineConfig, *, gpu: bool) -> Ledger:
    """Errors: ConfigError("energy_meter")."""
    try:
        meter, note = open_meter(config.energy_meter, gpu=gpu, watts_per_core=config.watts_per_core)
    except MeterUnavailable as why:
        raise ConfigError(
            "energy_meter",
            f"energy_meter={config.energy_meter!r} cannot be had here: {why}",
        ) from why
    if note:
        _log.warning("%s", note)
    prices = Prices(
        price_per_kwh=config.price_per_kwh,
        price_per_hour=config.price_per_hour,
        grams_per_kwh=config.grams_per_kwh,
    )
    return Ledger(meter, prices)
