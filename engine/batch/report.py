"""What a batch has come to: the summary of a run, the status of a journal, and its check."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.cost import Cost, total
from .errors import CHANGED, DAMAGED, NOT_READ, BatchError
from .journal import FORMAT, Reader, Result, journal_path, not_read
from .outputs import verify_output


@dataclass
class Summary:
    """One run of a batch. Tokens, latencies, seconds and cost are of this run; latencies in
    seconds."""

    output: Path
    requests: int = 0
    done_before: int = 0
    done: int = 0
    errors: int = 0  # of all that are done
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    cost: Cost | None = None
    money_before: float = 0.0  # of earlier runs
    latencies: array[float] = field(default_factory=lambda: array("f"), repr=False)

    def count(self, result: Result) -> None:
        """Take in one more answer."""
        self.done += 1
        self.errors += result.status != 200
        self.prompt_tokens += result.prompt_tokens
        self.completion_tokens += result.completion_tokens
        self.cached_tokens += result.cached_tokens
        self.cost = total((self.cost, result.cost))
        if result.status == 200:
            self.latencies.append(result.seconds)

    @property
    def money(self) -> float:
        """What the batch has cost so far, earlier runs included."""
        return self.money_before + ((self.cost.money if self.cost else None) or 0.0)

    @property
    def tokens_per_joule(self) -> float | None:
        """Tokens read and written for each joule; None where none was counted."""
        joules = self.cost.joules if self.cost else 0.0
        return (self.prompt_tokens + self.completion_tokens) / joules if joules else None

    def percentile(self, percent: float) -> float:
        """Latency that so many percent of the answers do not exceed, seconds; 0 of none."""
        ranked = sorted(self.latencies)
        if not ranked:
            return 0.0
        return ranked[min(int(len(ranked) * percent / 100), len(ranked) - 1)]

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del rows["latencies"]
        ranks = {f"p{p}": round(self.percentile(p), 4) for p in (50, 90, 99)}
        return {
            **rows,
            "output": str(self.output),
            "cost": None if self.cost is None else dataclasses.asdict(self.cost),
            "tokens_per_joule": self.tokens_per_joule,
            "latency_seconds": ranks,
        }

    def __str__(self) -> str:
        pace = 1 / self.seconds if self.seconds else 0.0
        before = f", {self.done_before} of them before this run" if self.done_before else ""
        share = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        lines = [
            f"{self.done + self.done_before} of {self.requests} requests done{before}, "
            f"{self.errors} with an error, in {self.seconds:.1f} s",
        ]
        if self.done:
            lines += [
                f"tokens in {self.prompt_tokens} ({self.prompt_tokens * pace:.0f}/s, {share:.0%} "
                f"of them found in the prefix cache), out {self.completion_tokens} "
                f"({self.completion_tokens * pace:.0f}/s)",
                "latency " + ", ".join(f"p{p} {self.percentile(p):.2f} s" for p in (50, 90, 99)),
            ]
        if self.cost is not None:
            lines.append(f"energy {self.cost}, {self.tokens_per_joule or 0.0:.2f} tokens per joule")
        return "\n".join(lines)


@dataclass(frozen=True)
class Status:
    """A journal as it lies on the disk. torn: bytes of an unfinished record at its end."""

    output: Path
    manifest: dict[str, Any]
    requests: int
    done: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    torn: int
    written: bool  # whether the output file is there

    @property
    def complete(self) -> bool:
        return self.done == self.requests and self.written

    def as_plain(self) -> dict[str, Any]:
        """For JSON."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**rows, "output": str(self.output), "complete": self.complete}

    def __str__(self) -> str:
        model, version = self.manifest["model"]["name"], self.manifest["engineroom"]
        state = "complete" if self.complete else "the same `batch run` goes on with it"
        torn = f"; {self.torn} bytes of a torn record at its end" if self.torn else ""
        return (
            f"{self.output}: {self.done} of {self.requests} requests done, {self.errors} with an "
            f"error: {state}{torn}\n{model}, engineroom {version}, tokens in {self.prompt_tokens}, "
            f"out {self.completion_tokens}"
        )


def status(output: str | Path) -> Status:
    """Read the whole journal of `output`. Errors: BatchError where it is missing or damaged."""
    path = Path(output)
    with _reader(path) as reader:
        return _status(path, reader)[0]


def verify(output: str | Path) -> Status:
    """status(), and that the output is, byte for byte, the journal's answers in order.

    An output that is not there yet is no error. Errors: BatchError.
    """
    path = Path(output)
    with _reader(path) as reader:
        found, seen = _status(path, reader)
        if not found.written:
            return found
        if found.done < found.requests:
            raise BatchError(
                DAMAGED,
                f"{path} is there, but its journal has {found.done} of {found.requests} answers",
            )
        verify_output(path, map(reader.line, seen.offsets), found.requests)
        return found


def _status(path: Path, reader: Reader) -> tuple[Status, Seen]:
    manifest = _manifest(reader, path)
    requests = sum(f["lines"] for f in manifest["inputs"])
    seen = Seen(requests, journal_path(path))
    done = errors = prompt = completion = 0
    for offset, result in reader.results():
        seen.note(result.index, offset)
        done += 1
        errors += result.status != 200
        prompt += result.prompt_tokens
        completion += result.completion_tokens
    written = path.exists()
    found = Status(path, manifest, requests, done, errors, prompt, completion, reader.torn, written)
    return found, seen


class Seen:
    """Where each answer lies in the journal: 8 bytes a request. Offset 0 is the manifest's."""

    def __init__(self, requests: int, journal: Path) -> None:
        self.offsets = array("Q", bytes(8 * requests))
        self._journal = journal

    def __contains__(self, index: int) -> bool:
        return self.offsets[index] != 0

    def note(self, index: int, offset: int) -> None:
        """Errors: BatchError for an index that comes twice, or that no line has."""
        known = index < len(self.offsets)
        if not known or index in self:
            why = "a second time" if known else f"of {len(self.offsets)}"
            raise BatchError(
                DAMAGED,
                f"{self._journal}: the record at byte {offset} answers request {index} {why}; "
                "begin anew with --restart",
            )
        self.offsets[index] = offset


@contextmanager
def _reader(output: Path) -> Iterator[Reader]:
    path = journal_path(output)
    try:
        with path.open("rb") as file:
            yield Reader(file.fileno(), path)
    except OSError as error:
        raise not_read(path, error) from error


def _manifest(reader: Reader, output: Path) -> dict[str, Any]:
    manifest = reader.manifest()
    if manifest is None:
        raise BatchError(NOT_READ, f"{journal_path(output)} holds no record: nothing ran yet")
    if manifest.get("journal") != FORMAT:
        raise BatchError(
            CHANGED,
            f"{journal_path(output)} is a journal of form {manifest.get('journal')}, and this "
            f"version reads form {FORMAT}; read it with engineroom {manifest.get('engineroom')}",
        )
    return manifest


__all__ = ["Seen", "Status", "Summary", "status", "verify"]
