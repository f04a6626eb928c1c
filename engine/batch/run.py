"""The run: lines in the order that suits the engine, answers into the journal, and at the end the
output in the order of the input."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config import EngineConfig
from ..core.answers import RequestOutput
from ..core.sampling_params import SamplingParams
from ..load.template_process import TemplateError
from ..receipts import Receipt
from . import manifest as manifests
from .answers import Lines
from .errors import BAD_REQUEST, NOT_READ, NOT_WRITTEN, BatchError, LineError
from .inputs import Inputs, spool
from .journal import Journal, Result, journal_path
from .limits import Limits
from .outputs import check_output, write_output
from .report import Seen, Summary
from .requests import BatchRequest
from .sources import guess_format
from .template import PLAIN, Prompting

# What a line leaves out. OpenAI's own defaults but for max_tokens, where 16 helps nobody.
BATCH_DEFAULTS = SamplingParams(max_tokens=256)
# Refusals that say something of this machine and not of the request: nothing to keep.
_PASSING = ("never_fits", "queue_full")
# Of Engine.receipt().
MakeReceipt = Callable[[RequestOutput, SamplingParams], Receipt]
_SHARED = 256  # characters that requests of a group have in common


@dataclass(frozen=True)
class Refused:
    """What step() of an engine far away gives for a request that its door refused."""

    request_id: str
    error: Exception
    failed: bool = False  # through no fault of the request's


class EngineLike(Protocol):
    """What a batch uses of an engine; LLM and the server give views of their own."""

    @property
    def config(self) -> EngineConfig: ...

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        final_only: bool = False,
        embed: bool = False,
    ) -> Any: ...

    def abort(self, request_id: str) -> bool: ...

    def step(self) -> Sequence[RequestOutput | Refused]: ...

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]: ...


def run(
    engine: EngineLike,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    model: Mapping[str, Any],
    also_called: Sequence[str] = (),
    format: str | None = None,
    prompting: Prompting = PLAIN,
    params: SamplingParams = BATCH_DEFAULTS,
    on_error: str = "stop",
    restart: bool = False,
    limits: Limits | None = None,
    progress: bool = True,
    check: Callable[[], None] = lambda: None,
    watch: Callable[[Summary], None] = lambda summary: None,
    at_once: Callable[[], int] | None = None,
    receipts: MakeReceipt | None = None,
) -> Summary:
    """Answer every line of `inputs` ("-": standard input) into `output`, or go on with doing so.

    format: one of FORMATS, by the files' names where it is None; prompting: of one that is not JSON
    lines. model: manifest.engine_facts(). also_called: more names that a body may call it by.
    check() is called at every step and ends the run by raising. on_error: "stop" at the first line
    that is no request or is refused, or "record" it. watch() is shown the summary as it grows.
    at_once() is how many samples the engine is to hold (by default twice what it runs at once,
    which keeps its step full, and memory flat). receipts: makes what each answer's body carries as
    its `receipt`. Whatever is raised, what was answered stays. Errors: BatchError.
    """
    if on_error not in ("stop", "record"):
        raise BatchError(NOT_READ, f"on_error={on_error!r} is not stop or record")
    if not inputs:
        raise BatchError(NOT_READ, "no input: name a file, or - for standard input")
    format = format or guess_format([str(p) for p in inputs])
    target = Path(output)
    check_output(target)
    journal = _open(target, restart)
    try:
        begun = journal.reader.size > 0
        paths = [
            spool(sys.stdin.buffer, target, begun) if str(p) == "-" else Path(p) for p in inputs
        ]
        lines = Inputs(
            paths,
            format=format,
            prompting=prompting,
            params=params,
            models=frozenset([model["name"], *also_called]),
            record=on_error == "record",
        )
        try:
            manifest = manifests.make(model, lines, params, format, prompting)
            if receipts is not None:  # another output, byte for byte
                manifest["receipts"] = True
            summary = Summary(target, requests=len(lines))
            seen = _resume(journal, manifest, summary)
            watch(summary)
            bar = _progress_bar(summary) if progress and sys.stderr.isatty() else None
            most = engine.config.max_num_seqs * 2
            made = Lines(manifests.digest(manifest), model["name"])
            limits = limits or Limits()
            record = on_error == "record"
            batch = _Run(engine, lines, journal, seen, made, summary, record, limits, bar, receipts)
            batch.run(check, watch, at_once or (lambda: most))
            lines.check_unchanged()
        finally:
            lines.close()
        write_output(target, map(journal.line, seen.offsets))
        return summary
    finally:
        journal.close()


class _Run:
    """One run's requests in flight."""

    def __init__(
        self,
        engine: EngineLike,
        inputs: Inputs,
        journal: Journal,
        seen: Seen,
        lines: Lines,
        summary: Summary,
        record: bool,
        limits: Limits,
        bar: Any,
        receipts: MakeReceipt | None,
    ) -> None:
        self._engine = engine
        self._inputs = inputs
        self._journal = journal
        self._seen = seen
        self._lines = lines
        self._summary = summary
        self._record = record
        self._limits = limits
        self._bar = bar
        self._receipts = receipts
        self._running: dict[str, tuple[int, BatchRequest]] = {}
        self._samples = 0
        self._prefix = f"batch-{secrets.token_hex(4)}-"  # apart from other callers' requests

    def run(
        self,
        check: Callable[[], None],
        watch: Callable[[Summary], None],
        at_once: Callable[[], int],
    ) -> None:
        """Until every line has its answer in the journal, on the disk."""
        started = time.monotonic()
        feed = self._feed()
        try:
            following = next(feed, None)
            while following is not None or self._running:
                check()
                self._limits.check_time()
                most = at_once()
                while following is not None and self._samples < most and self._affords():
                    if not self._admit(*following):
                        break
                    following = next(feed, None)
                if self._running:
                    for output in self._engine.step():
                        self._take(output)
                    watch(self._summary)
                self._journal.sync_if_due()
            self._journal.sync()
        except BaseException as error:
            self._end(error)
            raise
        finally:
            self._summary.seconds = time.monotonic() - started
            if self._bar is not None:
                self._bar.close()

    def _affords(self) -> bool:
        """Whether one more may begin. Errors: BatchError where none may and none runs."""
        s, running = self._summary, len(self._running)
        if self._limits.afford(s.money, s.done_before + s.done, running):
            return True
        if not running:
            self._limits.raise_spent(s.money)
        return False

    def _end(self, error: BaseException) -> None:
        """Leave nothing running, and keep what was answered where the journal still can."""
        for request_id in self._running:
            self._engine.abort(request_id)
        if not (isinstance(error, BatchError) and error.code == NOT_WRITTEN):
            self._journal.sync()

    def _feed(self) -> Iterator[tuple[int, BatchRequest]]:
        """Requests still to be answered: within a window shared beginnings together, the longest
        group first. Bad lines are recorded on the way."""
        for window in self._inputs.windows(lambda index: index not in self._seen):
            groups: dict[str, list[tuple[str, int, BatchRequest]]] = {}
            for index, request in window:
                if isinstance(request, LineError):
                    self._refuse(index, request.custom_id, str(request), request.field)
                else:
                    text = request.text
                    groups.setdefault(text[:_SHARED], []).append((text, index, request))
            self._inputs.check_unchanged()
            longest = sorted(groups.values(), key=lambda g: -max(len(text) for text, _, _ in g))
            for group in longest:
                for _, index, request in sorted(group, key=lambda entry: entry[:2]):
                    yield index, request

    def _admit(self, index: int, request: BatchRequest) -> bool:
        """Hand a request to the engine, or record its refusal. False: later, the queue is full."""
        params = request.params
        if params.seed is None and request.vector is None:
            params = params.replace(seed=self._lines.seed(request.custom_id))
        request_id = f"{self._prefix}{index}"
        try:
            prompt: str | Sequence[int] = request.prompt
            if request.messages:
                prompt = self._engine.render_chat(request.messages, **request.template)
            self._engine.add_request(
                request_id, prompt, params, final_only=True, embed=request.vector is not None
            )
        except (TemplateError, ValueError) as error:  # ValueError: what the tokenizer refuses, too
            if getattr(error, "code", "") == "queue_full" and self._running:
                return False
            self._turn_away(index, request, error)
        else:
            self._running[request_id] = (index, request)
            self._samples += params.num_samples
        return True

    def _turn_away(self, index: int, request: BatchRequest, error: Exception) -> None:
        """Record what the engine's door refused. Errors: those that will pass; BatchError."""
        code = str(getattr(error, "code", ""))
        if code in _PASSING:
            raise error
        field = "messages" if isinstance(error, TemplateError) else getattr(error, "field", code)
        self._refuse(index, request.custom_id, str(error), str(field))

    def _take(self, output: RequestOutput | Refused) -> None:
        over = isinstance(output, Refused) or output.finished
        if not over or output.request_id not in self._running:
            return
        index, request = self._running.pop(output.request_id)
        self._samples -= request.params.num_samples
        if isinstance(output, Refused):
            if output.failed:
                line = self._failure(index, request, str(output.error))
                self._keep(Result(index, 0, 0, 0, 0.0, 500, line))
            else:
                self._turn_away(index, request, output.error)
            return
        reasons = {c.finish_reason for c in output.outputs}
        if "abort" in reasons:
            raise BatchError(BAD_REQUEST, f"{self._inputs.place(index)}: somebody aborted it")
        status, usage = 200, output.usage
        if "error" in reasons:
            why = next((c.error for c in output.outputs if c.error), "the engine gave no reason")
            status, line = 500, self._failure(index, request, why)
        else:
            try:
                line = self._lines.answer(request, output, self._receipt(request, output))
            except LineError as error:
                self._turn_away(index, request, error)
                return
            except ValueError as error:
                status, line = 500, self._failure(index, request, str(error))
        self._keep(
            Result(
                index,
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                output.timings.total_s,
                status,
                line,
                output.cost,
            )
        )
        self._limits.check_cost(output.cost)

    def _receipt(self, request: BatchRequest, output: RequestOutput) -> Any | None:
        """Where receipts are asked for; an embedding samples nothing and has none."""
        if self._receipts is None or request.vector is not None:
            return None
        return self._receipts(output, request.params).as_plain()

    def _failure(self, index: int, request: BatchRequest, why: str) -> bytes:
        if not self._record:
            raise BatchError(BAD_REQUEST, f"{self._inputs.place(index)} failed: {why}")
        return self._lines.failure(request.custom_id, why)

    def _refuse(self, index: int, custom_id: str | None, why: str, field: str) -> None:
        if not self._record:
            raise BatchError(
                BAD_REQUEST,
                f"{self._inputs.place(index)}: {why}. What was answered before is kept; with "
                "--on-error record such lines become errors of the output",
            )
        line = self._lines.refusal(custom_id, index, why, field)
        self._keep(Result(index, 0, 0, 0, 0.0, 400, line))

    def _keep(self, result: Result) -> None:
        self._seen.note(result.index, self._journal.add(result))
        self._summary.count(result)
        if self._bar is not None:
            s = self._summary
            self._bar.set_postfix(
                {"in": s.prompt_tokens, "out": s.completion_tokens, "cached": s.cached_tokens},
                refresh=False,
            )
            self._bar.update()


def _open(output: Path, restart: bool) -> Journal:
    """Errors: BatchError where the output is there and no journal says that it is ours."""
    if output.exists() and not restart and not journal_path(output).exists():
        raise BatchError(
            NOT_WRITTEN,
            f"{output} is there already and has no journal: name another output, or --restart "
            "overwrites it",
        )
    if output.is_dir():
        raise BatchError(NOT_WRITTEN, f"{output} is a folder; name a file")
    journal = Journal(journal_path(output), restart=restart)
    if restart:
        output.unlink(missing_ok=True)  # what lies there is of another batch now
    return journal


def _resume(journal: Journal, manifest: dict[str, Any], summary: Summary) -> Seen:
    """Read what is done, or begin. Errors: BatchError."""
    old = journal.reader.manifest()
    if old is None:
        journal.begin(manifest)
        return Seen(summary.requests, journal.path)
    manifests.check_same(journal.path, old, manifest)
    return _replay(journal, summary)


def _replay(journal: Journal, summary: Summary) -> Seen:
    """What is done, of a journal whose manifest was read; it is ready to go on then."""
    seen = Seen(summary.requests, journal.path)
    for offset, result in journal.reader.results():
        seen.note(result.index, offset)
        summary.done_before += 1
        summary.errors += result.status != 200
        summary.money_before += (result.cost.money if result.cost else None) or 0.0
    journal.go_on()
    return seen


def _progress_bar(summary: Summary) -> Any:
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    return tqdm(total=summary.requests, initial=summary.done_before, desc="answering", unit="req")


def partial(output: str | Path) -> Summary:
    """Write what the journal has so far into the output, for a batch that will not go on.

    Errors: BatchError.
    """
    target = Path(output)
    journal = Journal(journal_path(target))
    try:
        manifest = journal.reader.manifest()
        summary = Summary(target)
        if manifest is not None:
            summary.requests = sum(f["lines"] for f in manifest["inputs"])
            seen = _replay(journal, summary)
            write_output(target, (journal.line(o) for o in seen.offsets if o))
        return summary
    finally:
        journal.close()


__all__ = ["BATCH_DEFAULTS", "EngineLike", "Refused", "partial", "run"]
