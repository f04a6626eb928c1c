"""What a form costs: compiling it, and tokens a second with it beside the same requests without.

`python benchmarks/structured.py [--model smollm2]` alternates the two (A B A B), prints medians.
The form is a list of objects; with `max_tokens` of 100 every token is settled against the reserve,
with 400 the first part of them is not. Outputs with a form end where it does, each at its own
length: the requests without are cut to the same lengths, so that both fill their steps alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from engineroom import LLM, SamplingParams
from engineroom.engine.core.structured import StructuredOutput

ITEM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string"},
        "active": {"type": "boolean"},
    },
    "required": ["name", "age", "email", "active"],
    "additionalProperties": False,
}
WIDE = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(200)}}
FORMS = {
    "the vocabulary, and any JSON object": StructuredOutput(json_object=True),
    "an object of 4 properties": StructuredOutput(json_schema=json.dumps(ITEM)),
    "an object of 200 properties": StructuredOutput(json_schema=json.dumps(WIDE)),
    "an expression for an e-mail address": StructuredOutput(regex=r"[a-z]+@[a-z]+\.(com|org)"),
    "1,000 choices": StructuredOutput(choice=tuple(f"value {i}" for i in range(1000))),
}
LIST = StructuredOutput(json_schema=json.dumps({"type": "array", "items": ITEM}))
ROUNDS = 5


def run(llm: LLM, lengths: Sequence[int], form: StructuredOutput | None) -> tuple[float, list[int]]:
    """Seconds that requests take which come at once, at most so many tokens each, and how many
    tokens each has."""
    prompt = [{"role": "user", "content": "List people as JSON."}]
    ids = llm.engine.render_chat(prompt)
    params = [
        SamplingParams(temperature=0.8, seed=i, max_tokens=length, ignore_eos=True, structured=form)
        for i, length in enumerate(lengths)
    ]
    started = time.perf_counter()
    outputs = llm.generate([ids] * len(lengths), params, use_tqdm=False)
    seconds = time.perf_counter() - started
    return seconds, [len(out.outputs[0].token_ids) for out in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    llm = LLM(parser.parse_args().model, max_num_seqs=32, max_model_len=1024)
    for name, form in FORMS.items():
        started = time.perf_counter()
        llm.engine.prepare(SamplingParams(structured=form, max_tokens=512))
        print(f"compiling {name}: {1000 * (time.perf_counter() - started):.0f} ms", flush=True)
    llm.engine.prepare(SamplingParams(structured=LIST, max_tokens=512))
    for streams in (1, 32):
        for tokens in (100, 400):
            _, lengths = run(llm, [tokens] * streams, LIST)  # warms up, too
            plain, formed = [], []
            for _ in range(ROUNDS):
                plain.append(run(llm, lengths, None)[0])
                formed.append(run(llm, [tokens] * streams, LIST)[0])
            a, b = (sum(lengths) / statistics.median(times) for times in (plain, formed))
            print(
                f"{streams} streams of at most {tokens} tokens, {sum(lengths)} in all: "
                f"{b:.0f} tok/s with the form, {a:.0f} without, ratio {b / a:.2f}",
                flush=True,
            )
    llm.close()


if __name__ == "__main__":
    main()
