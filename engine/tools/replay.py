"""`engineroom replay`: receipts computed again, beside other work, and held to what they say."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.answers import RequestOutput
from ..core.checks import AdmissionError
from ..core.parameter import ParameterError
from ..core.sampling_params import SamplingParams
from ..engine import Engine
from ..receipts import Receipt, ReceiptError, changes, first_difference, make, read
from ..receipts.facts import DECIDING

_DEVICES = {"cpu": "cpu", "reference": "reference", "triton": "cuda"}
_NOISE = 96  # tokens at most that a request beside a receipt reads, and writes


@dataclass(frozen=True)
class Verdict:
    """number: of the receipt, from 1. difference: the first, None where every bit is the same.
    changes: what decides an answer and is not what it was."""

    number: int
    tokens: int
    difference: str | None
    changes: list[str]

    def __str__(self) -> str:
        said = "the same" if self.difference is None else self.difference
        lines = [f"receipt {self.number}: {said} ({self.tokens} tokens)"]
        return "\n".join([*lines, *(f"  {change}" for change in self.changes)])


def read_receipts(paths: Sequence[str]) -> list[Receipt]:
    """Of files of one receipt, or with one a line; lines of a batch's output count.

    Errors: ReceiptError naming file and line.
    """
    found = []
    for path in paths:
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ReceiptError(f"{path}: {error}") from error
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    found.append(read(line))
                except ReceiptError as error:
                    raise ReceiptError(f"{path} line {number}: {error}") from None
    if not found:
        raise ReceiptError(f"{', '.join(paths)}: no receipt in it")
    return found


def append(path: str, receipt: Receipt) -> None:
    """As the last line of a file. Errors: ReceiptError where it cannot be written."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(receipt.to_json() + "\n")
    except OSError as error:
        raise ReceiptError(f"the receipt could not be written: {path}: {error.strerror}") from error


def options(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """EngineConfig options under which these receipts came about.

    Errors: ReceiptError where they are of several configurations.
    """
    wanted = [_options(receipt) for receipt in receipts]
    for number, other in enumerate(wanted, start=1):
        if other != wanted[0]:
            raise ReceiptError(
                f"receipt {number} is of an engine with {other}, receipt 1 with {wanted[0]}: "
                "replay them apart"
            )
    return wanted[0]


def _options(receipt: Receipt) -> dict[str, Any]:
    model = receipt.model
    try:
        device = model["backend"]["backend"].partition("+")[0]
        chosen = {name: model[name] for name in DECIDING}
        return {"device": _DEVICES[device], "max_model_len": model["context"], **chosen}
    except (KeyError, TypeError, AttributeError) as error:
        raise ReceiptError(f"a receipt does not say how it was computed: {error}") from error


def replay(
    engine: Engine, receipts: Sequence[Receipt], *, beside: int = 0, seed: int = 0
) -> Iterator[Verdict]:
    """Compute receipts again, many at once, with `beside` random requests always running too.

    Yields in the order of their ends. seed: of those random requests.
    Errors: AdmissionError, ParameterError, the message naming the receipt that cannot run here.
    """
    rng = random.Random(seed)
    waiting = list(enumerate(receipts, start=1))[::-1]
    running: dict[str, tuple[int, Receipt]] = {}
    noise: set[str] = set()
    most = engine.config.max_num_seqs
    made = 0
    try:
        while waiting or running:
            while len(noise) < beside:
                made += 1
                noise.add(_add_noise(engine, f"beside-{made}", rng))
            while waiting and len(running) < most:
                number, receipt = waiting.pop()
                running[_add(engine, number, receipt)] = (number, receipt)
            for output in engine.step():
                if output.finished:
                    noise.discard(output.request_id)
                    found = running.pop(output.request_id, None)
                    if found is not None:
                        yield _verdict(engine, *found, output)
    finally:
        for request_id in [*running, *noise]:
            engine.abort(request_id)
        engine.step()


def _add(engine: Engine, number: int, receipt: Receipt) -> str:
    request_id = f"receipt-{number}"
    try:
        params = receipt.sampling_params
        engine.add_request(request_id, receipt.prompt_token_ids, params, final_only=True)
    except (AdmissionError, ParameterError) as error:
        error.add_note(f"(receipt {number})")
        raise
    return request_id


def _add_noise(engine: Engine, request_id: str, rng: random.Random) -> str:
    """A request of random length, content and temperature, as the rest of a busy engine."""
    room = max(engine.memory.max_model_len - 2, 2)
    prompt = [
        rng.randrange(engine.tokenizer.vocab_size)
        for _ in range(rng.randint(1, min(_NOISE, room // 2)))
    ]
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.3)),
        max_tokens=rng.randint(1, min(_NOISE, room // 2)),
        ignore_eos=True,
        seed=rng.getrandbits(32),
    )
    engine.add_request(request_id, prompt, params, final_only=True)
    return request_id


def _verdict(engine: Engine, number: int, receipt: Receipt, output: RequestOutput) -> Verdict:
    tokens = sum(len(c.token_ids) for c in output.outputs)
    try:
        again = make(engine.facts(), output, receipt.sampling_params)
    except ReceiptError as error:
        return Verdict(number, tokens, str(error), [])
    return Verdict(number, tokens, first_difference(receipt, again), changes(receipt, again))


__all__ = ["Verdict", "append", "options", "read_receipts", "replay"]
