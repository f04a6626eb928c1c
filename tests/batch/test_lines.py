"""What a line may be and what becomes of it; changed batches, refused lines, the order of both."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engineroom import LLM
from engineroom.engine import batch, cli
from engineroom.engine.batch import BatchError, manifest, requests
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.structured import StructuredOutput
from engineroom.engine.tools import session
from tests.batch.child import MODEL, BatchFake, run, write_lines
from tests.engine import golden

CHAT, PLAIN, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
SAY = [{"role": "user", "content": "hi"}]


def line(custom_id: Any = "a", url: Any = PLAIN, **body: Any) -> str:
    given = {"prompt": "p"} if url == PLAIN else {"messages": SAY}
    value = {"custom_id": custom_id, "method": "POST", "url": url, "body": {**given, **body}}
    return json.dumps(value)


def write(folder: Path, *lines: str) -> Path:
    path = folder / "in.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def answers(output: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in output.read_text().splitlines()]


def refused(source: Path, code: str, **options: Any) -> str:
    engine = BatchFake()
    with pytest.raises(BatchError) as caught:
        run(source, source.with_name("out.jsonl"), engine, **options)
    assert caught.value.code == code
    assert not engine.asked, "something ran"
    return str(caught.value)


BAD = [
    ("{", "Expecting"),
    ("[]", "not an object"),
    ('{"custom_id": "a", "custom_id": "b"}', "appears twice"),
    (line(7), "custom_id must be"),
    (line(""), "custom_id must be"),
    (line("\ud800"), "lone surrogate"),
    (line(url="/v1/responses"), "url must be"),
    (line(url=VECTORS, messages=None), "one text or one list"),
    (line(url=VECTORS, messages=None, input=["a", "b"]), "its own line"),
    (line(url=VECTORS, messages=None, input="a", dimensions=0), "dimensions must be"),
    (line(url=VECTORS, messages=None, input="a", encoding_format="hex"), "float or base64"),
    (line(url=VECTORS, messages=None, input="a", temperature=1), "body.temperature"),
    (line(url=[]), "url must be"),
    (line(temprature=1), "body.temprature"),
    (line(temperature=-1), "temperature=-1"),
    (line(stream=True), "stream"),
    (line(model="gpt-9"), r"not the model that was loaded \(fake\)"),
    (line(prompt=["a", "b"]), "its own line"),
    (line(prompt=None), "prompt"),
    (line(url=CHAT, messages=[]), "at least one"),
    (line(url=CHAT, messages=[{"role": "user", "content": [{"type": "image"}]}]), "text alone"),
    (line(url=CHAT, echo=True), "body.echo"),
    (line(url=CHAT, tools=[]), "body.tools"),
    (line(url=CHAT, response_format="json"), "response_format must be"),
    (line(response_format={"type": "json_schema"}), "response_format must be"),
    (line(response_format={"type": "json_object", "x": 1}), "response_format must be"),
    (
        line(response_format={"type": "json_schema", "json_schema": {"name": "n", "scema": {}}}),
        "has no 'scema'",
    ),
    (
        line(response_format={"type": "json_object"}, structured={"regex": "a"}),
        "not both",
    ),
    (line(url=CHAT, top_logprobs=2), "needs logprobs"),
    (line(url=CHAT, logprobs=3), "true or false"),
    (line(url=CHAT, max_tokens=2, max_completion_tokens=3), "the same thing"),
    (line(url=CHAT, chat_template_kwargs=3), "chat_template_kwargs"),
]


@pytest.mark.parametrize(("bad", "why"), BAD, ids=range(len(BAD)))
def test_a_bad_line_stops_before_anything_runs_or_is_recorded(
    bad: str, why: str, tmp_path: Path
) -> None:
    source = write(tmp_path, line("first"), "", bad, line("last"))
    message = refused(source, "E-BATCH-01")
    assert "in.jsonl line 3" in message
    assert re.search(why, message)
    output = source.with_name("out.jsonl")
    assert run(source, output, on_error="record").errors == 1
    first, second, third = answers(output)
    assert (first["custom_id"], third["custom_id"]) == ("first", "last")
    assert second["response"]["status_code"] == 400
    assert first["response"]["status_code"] == third["response"]["status_code"] == 200
    assert second["response"]["body"]["error"]["message"] in message


def test_a_refused_request_stops_or_is_recorded(tmp_path: Path) -> None:
    hostile = [{"role": "user", "content": "hostile"}]
    lines = [line("a"), line("b", prompt="refuse:"), line("c", CHAT, messages=hostile)]
    source = write(tmp_path, *lines)
    output = tmp_path / "out.jsonl"
    with pytest.raises(BatchError, match="line [23]: .*--on-error record"):
        run(source, output)
    assert run(source, output, on_error="record").errors == 2  # and goes on where it stopped
    found = [a["response"]["status_code"] for a in answers(output)]
    assert found == [200, 400, 400]


def test_a_custom_id_that_comes_twice_names_both_lines(tmp_path: Path) -> None:
    source = write(tmp_path, line("a"), line("b"), "", line("a"))
    message = refused(source, "E-BATCH-02")
    assert "in.jsonl line 1" in message
    assert "in.jsonl line 4" in message
    refused(source, "E-BATCH-02", on_error="record")


def test_what_changed_is_refused_and_named(tmp_path: Path) -> None:
    source = write(tmp_path, line("a"), line("b"))
    output = tmp_path / "out.jsonl"
    run(source, output)
    before = output.read_bytes()
    greedy = SamplingParams(temperature=0.0)
    assert "params.temperature: null before, 0.0 now" in refused(
        source, "E-BATCH-03", params=greedy
    )
    other = {**MODEL, "weights": "2"}
    assert 'model.weights: "1" before, "2" now' in refused(source, "E-BATCH-03", model=other)
    source.write_text(source.read_text().replace('"p"', '"q"', 1))
    assert "inputs[1].sha256" in refused(source, "E-BATCH-03")
    assert output.read_bytes() == before
    run(source, output, restart=True)
    assert output.read_bytes() != before


def test_an_input_that_changes_under_the_run_is_noticed(tmp_path: Path) -> None:
    source = write(tmp_path, *(line(f"{n}", max_tokens=5) for n in range(30)))
    engine = BatchFake()
    engine.on_step = lambda number: source.write_text("x" * number)
    with pytest.raises(BatchError, match="changed while"):
        run(source, tmp_path / "out.jsonl", engine)


def test_an_output_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path, line())
    output = tmp_path / "out.jsonl"
    output.write_text("mine")
    assert "no journal" in refused(source, "E-BATCH-05")
    assert output.read_text() == "mine"


def test_answers_are_in_openais_form_and_seeds_repeat(tmp_path: Path) -> None:
    lines = [
        line("one", seed=7, logprobs=2, echo=True, max_tokens=2),
        line("two", CHAT, logprobs=True, top_logprobs=1, max_completion_tokens=2, n=2),
        line("three", CHAT),
    ]
    output = tmp_path / "out.jsonl"
    run(write(tmp_path, *lines), output, params=SamplingParams(max_tokens=4))
    one, two, three = (a["response"]["body"] for a in answers(output))
    assert one["object"] == "text_completion"
    assert one["choices"][0]["seed"] == 7
    assert len(one["choices"][0]["logprobs"]["tokens"]) == 3  # "p" and two more
    assert two["object"] == "chat.completion"
    assert [len(c["logprobs"]["content"]) for c in two["choices"]] == [2, 2]
    assert len(two["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 1
    assert two["usage"]["completion_tokens"] == 4
    assert three["usage"]["completion_tokens"] == 4
    assert three["choices"][0]["message"]["role"] == "assistant"
    assert three["choices"][0]["seed"] != two["choices"][0]["seed"]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize("url", [CHAT, PLAIN])
def test_a_response_format_gives_the_output_its_form(url: str) -> None:
    def form(**asked: Any) -> StructuredOutput | None:
        text = line("a", url, **asked).encode()
        return requests.from_json(text, SamplingParams(), frozenset()).params.structured

    named = {"name": "n", "schema": SCHEMA, "strict": True}
    assert form(response_format={"type": "text"}) is form() is None
    assert form(response_format={"type": "json_object"}) == StructuredOutput(json_object=True)
    made = form(response_format={"type": "json_schema", "json_schema": named})
    assert made is not None and json.loads(made.json_schema or "") == SCHEMA
    assert form(structured={"regex": "a+"}) == StructuredOutput(regex="a+")


def test_embeddings_are_lines_like_others(tmp_path: Path) -> None:
    plain = {"messages": None, "input": "abcd"}
    lines = [
        line("whole", VECTORS, **plain),
        line("cut", VECTORS, **plain, dimensions=3, encoding_format="base64"),
        line("wide", VECTORS, **plain, dimensions=9),
        line("none", VECTORS, messages=None, input=[500]),
        line("text", prompt="a", max_tokens=1),
    ]
    output = tmp_path / "out.jsonl"
    assert run(write(tmp_path, *lines), output, on_error="record").errors == 2
    whole, cut, wide, none, text = (a["response"] for a in answers(output))
    (entry,) = whole["body"]["data"]
    assert whole["body"]["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    assert len(entry["embedding"]) == 8 and abs(sum(v * v for v in entry["embedding"]) - 1) < 1e-6
    short = struct.unpack("<3f", base64.b64decode(cut["body"]["data"][0]["embedding"]))
    norm = sum(v * v for v in entry["embedding"][:3]) ** 0.5 or 1.0
    assert short == pytest.approx([v / norm for v in entry["embedding"][:3]])
    assert "the model has 8" in wide["body"]["error"]["message"]
    assert (none["status_code"], text["status_code"]) == (500, 200)


def test_shared_beginnings_run_together_and_long_ones_first(tmp_path: Path) -> None:
    long, short = "x" * 300, "y" * 20
    prompts = [short + "b", long + "2", short + "a", long + "1", short + "b"]
    engine = BatchFake()
    output = tmp_path / "out.jsonl"
    run(write(tmp_path, *(line(f"{n}", prompt=p) for n, p in enumerate(prompts))), output, engine)
    assert engine.asked[:2] == [long + "1", long + "2"]
    assert [a["custom_id"] for a in answers(output)] == ["0", "1", "2", "3", "4"]


def test_text_and_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes("drei é\n".encode())
    engine = BatchFake()
    output = tmp_path / "out.jsonl"
    files = [tmp_path / name for name in ("a.txt", "empty.txt", "b.txt")]
    batch.run(engine, files, output, model=MODEL, format="text", progress=False)
    assert sorted(map(str, engine.asked)) == ["drei é", "one", "two"]
    ids = [a["custom_id"] for a in answers(output)]
    assert ids == ["file-1-line-1", "file-1-line-3", "file-3-line-1"]


# --------------------------------------------------------------------------------- the command


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> BatchFake:
    made = BatchFake()
    monkeypatch.setattr(session, "open_engine", lambda config: made)
    monkeypatch.setattr(manifest, "engine_facts", lambda engine: MODEL)
    return made


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_it_resumably(
    name: str,
    status: int,
    engine: BatchFake,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_lines(tmp_path / "in.jsonl", 40)
    output = str(tmp_path / "out.jsonl")
    engine.on_step = lambda number: (
        os.kill(os.getpid(), getattr(signal, name)) if number == 4 else None
    )
    assert cli.main(["batch", "run", str(source), "-o", output]) == status
    assert "goes on with it" in capsys.readouterr().err
    assert engine.closed
    assert cli.main(["batch", "status", output, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["done"] < 40
    assert not found["complete"]
    assert cli.main(["batch", "run", str(source), "-o", output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == found["done"]
    assert cli.main(["batch", "verify", output]) == 0
    assert "complete" in capsys.readouterr().out


def test_standard_input_is_kept_for_another_run(
    engine: BatchFake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def feed(data: bytes) -> int:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        output = str(tmp_path / "out.jsonl")
        return cli.main(["batch", "run", "-", "--format", "text", "-o", output])

    assert feed(b"one\ntwo\n") == 0
    assert feed(b"") == 0  # goes on with what came before
    assert feed(b"one\ntwo\n") == 0
    assert len(engine.asked) == 2
    assert feed(b"other\n") == 10
    assert feed(b"") == 0  # what was kept is still there


def test_exit_statuses(engine: BatchFake, tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    assert cli.main(["batch", "status", output]) == 2
    assert cli.main(["batch", "run", str(tmp_path / "none"), "-o", output]) == 2
    assert cli.main(["batch", "run", str(write(tmp_path, "{")), "-o", output]) == 6
    nowhere = str(tmp_path / "no" / "out")
    assert cli.main(["batch", "run", str(write(tmp_path, line())), "-o", nowhere]) == 10
    assert cli.main(["batch"]) == 2


def test_a_model_gives_what_generate_gives(tmp_path: Path) -> None:
    """Law 2: rows of a batch are those of any other run with the same seeds."""
    prompts = ["The sea", "A", "Once upon a time", "The sea is"]
    source = write(tmp_path, *(line(p, prompt=p, max_tokens=6) for p in prompts))
    chat = write_lines(tmp_path / "chat.jsonl", 3)
    output = tmp_path / "out.jsonl"
    with LLM(str(golden.write(tmp_path / "golden")), max_num_seqs=2) as llm:
        summary = llm.batch([source, chat], output, use_tqdm=False)
        made = [a["response"]["body"]["choices"][0] for a in answers(output)[: len(prompts)]]
        params = [SamplingParams(max_tokens=6, seed=c["seed"]) for c in made]
        alone = llm.generate(prompts, params, use_tqdm=False)
    assert summary.done == 7
    assert [c["text"] for c in made] == [out.outputs[0].text for out in alone]
    assert summary.errors == 0
    assert summary.cost is not None and summary.cost.joules > 0
    assert f"energy {summary.cost}" in str(summary)
