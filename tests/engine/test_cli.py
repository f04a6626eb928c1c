"""The command: every option has a flag, every error its code and status, pipes stay pipes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine import cli
from engineroom.engine.config import ConfigError, EngineConfig
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.structured import StructuredOutput
from engineroom.engine.load.source import SourceError
from engineroom.engine.tools import options, session
from engineroom.engine.tools.errors import ERRORS, EXIT_STATUSES, find

from .cli_engine import ScriptedEngine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """The commands open this engine; its `config` is what they asked for."""
    made = ScriptedEngine(["Once", " upon", " a", " time"])

    def open_engine(config: EngineConfig) -> ScriptedEngine:
        made.config = config  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(session, "open_engine", open_engine)
    return made


def run(*arguments: str) -> int:
    return cli.main(arguments)


# ------------------------------------------------------------------------------------- the flags

SAMPLES: dict[str, tuple[list[str], Any]] = {
    "int": (["3"], 3),
    "float": (["0.5"], 0.5),
    "tuple[str, ...]": (["ab"], ("ab",)),
    "tuple[int, ...]": (["4,5"], (4, 5)),
    "Mapping[int, float]": (["198=-5"], {198: -5.0}),
}
TOGETHER = {"best_of": ["--n", "2"], "dry_base": []}


@pytest.mark.parametrize("field", dataclasses.fields(SamplingParams), ids=lambda f: f.name)
def test_every_sampling_field_has_a_flag(
    field: dataclasses.Field[Any], engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    if field.name == "logits_processor":
        assert run("complete", "x", "--logits-processor", "f") == 2
        return
    if field.name == "structured":  # a flag for each form, below
        return
    flag = "--" + field.name.replace("_", "-")
    kind = str(field.type).removesuffix(" | None")
    if kind == "bool":
        value = not field.default
        given = [flag if value else flag.replace("--", "--no-", 1)]
    else:
        text, value = SAMPLES[kind]
        if field.name == "dry_base":
            text, value = ["1.5"], 1.5
        given = [flag, *text]
    assert run("complete", "x", "--json", *given) == 0, capsys.readouterr().err
    assert getattr(engine.asked[0][1], field.name) == value


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (["--json-schema", "FILE"], StructuredOutput(json_schema='{"type": "integer"}')),
        (["--json-object"], StructuredOutput(json_object=True)),
        (["--regex", "[ab]+"], StructuredOutput(regex="[ab]+")),
        (["--grammar", "FILE"], StructuredOutput(grammar='{"type": "integer"}')),
        (["--choice", "yes", "--choice", "no"], StructuredOutput(choice=("yes", "no"))),
    ],
)
def test_every_form_of_output_has_a_flag(
    given: list[str], form: StructuredOutput, engine: ScriptedEngine, tmp_path: Path
) -> None:
    (tmp_path / "form").write_text('{"type": "integer"}')
    flags = [str(tmp_path / "form") if text == "FILE" else text for text in given]
    assert run("complete", "x", *flags) == 0
    assert engine.asked[0][1].structured == form


def test_a_form_that_cannot_be_read_is_named(
    engine: ScriptedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("complete", "x", "--json-schema", str(tmp_path / "missing")) != 0
    assert "--json-schema" in capsys.readouterr().err
    assert run("complete", "x", "--regex", "a", "--choice", "b") != 0
    assert "exactly one of" in capsys.readouterr().err


ENGINE_VALUES = {
    "energy_meter": ("model", "model"),
    "device": ("reference", "reference"),
    "dtype": ("float32", "float32"),
    "quantization": ("int8", "int8"),
    "save": ("small", "small"),
    "activations": ("float32", "float32"),
    "kv_cache_dtype": ("int8", "int8"),
    "max_model_len": ("4k", 4000),
    "max_num_batched_tokens": ("1K", 1024),
    "memory_budget": ("2GiB", "2GiB"),
    "chat_template": ("t.jinja", "t.jinja"),
    "step_log": ("log.jsonl", "log.jsonl"),
}
WITHOUT_FLAG = {"model", "tensor_parallel_size", "trust_remote_code"}


@pytest.mark.parametrize("field", dataclasses.fields(EngineConfig), ids=lambda f: f.name)
def test_every_engine_option_has_a_flag(
    field: dataclasses.Field[Any], engine: ScriptedEngine
) -> None:
    flag = "--" + field.name.replace("_", "-")
    if field.name in WITHOUT_FLAG:
        if field.name != "model":
            assert run("complete", "x", flag, "1") == 2
        return
    if str(field.type) == "bool":
        given, value = [flag.replace("--", "--no-", 1)], False
    else:
        text, value = ENGINE_VALUES.get(field.name, ("7", 7))
        given = [flag, text]
    assert run("complete", "x", *given) == 0
    assert getattr(engine.config, field.name) == value  # type: ignore[attr-defined]


def test_every_field_has_its_sentence() -> None:
    assert set(options.SAMPLING_HELP) == {f.name for f in dataclasses.fields(SamplingParams)}
    assert set(options.ENGINE_HELP) | {"model"} == {
        f.name for f in dataclasses.fields(EngineConfig)
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("4k", 4000), ("25.6k", 25_600), ("32K", 32_768), ("2Ki", 2048), ("-1", -1)],
)
def test_human_numbers(text: str, value: int) -> None:
    assert options.count(text) == value


@pytest.mark.parametrize("text", ["", "k", "4kk", "1.0001k", "nan", "4x", "1e3", "infk"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        options.count(text)


# ------------------------------------------------------------------------------------- the faces


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    import engineroom

    assert run("--version") == 0
    assert capsys.readouterr().out == f"engineroom {engineroom.__version__}\n"
    assert run("--help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("chat", "complete", "inspect", "doctor", "models"))
    assert run() == 0
    assert capsys.readouterr().out == listed
    for name in ("chat", "complete", "inspect", "doctor", "models"):
        assert run(name, "--help") == 0
        assert f"usage: engineroom {name}" in capsys.readouterr().out


def test_complete_streams_its_text_and_nothing_else(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("complete", "Tell me") == 0
    seen = capsys.readouterr()
    assert seen.out == "Once upon a time"
    assert seen.err == ""
    prompt, params = engine.asked[0]
    assert prompt == "Tell me"
    assert (params.temperature, params.max_tokens) == (0.0, 256)
    assert engine.config.max_num_seqs == 1  # type: ignore[attr-defined]
    assert engine.closed


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_complete_reads_a_pipe(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert run("complete", *arguments) == 0
    assert engine.asked[0][0] == "two\nlines"


def test_complete_json(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("complete", "x", "--json", "-m", "some-model") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"] == "some-model"
    assert answer["outputs"][0]["text"] == "Once upon a time"
    assert answer["outputs"][0]["finish_reason"] == "stop"
    assert answer["outputs"][0]["seed"] == 7
    assert answer["usage"]["prompt_tokens"] == 2
    assert "deltas" not in answer


def test_logprobs_need_json(engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("complete", "x", "--logprobs", "2") == 2
    assert "--json" in capsys.readouterr().err
    assert run("chat", "--prompt", "x", "--n", "2") == 2
    assert "complete" in capsys.readouterr().err


def test_chat_answers_one_prompt(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", "--prompt", "Hello", "--system", "Be brief.") == 0
    seen = capsys.readouterr()
    assert seen.out == "Once upon a time\n"
    assert seen.err == ""
    assert engine.rendered[0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_models_list(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ENGINEROOM_CACHE", str(tmp_path))
    assert run("models", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"smollm2", "gemma3-270m"} <= {m["name"] for m in report["models"]}
    assert "LlamaForCausalLM" in report["architectures"]["llama"]["hf"]
    assert run("models") == 0
    assert "not fetched" in capsys.readouterr().out
    assert run("models", "--fetch", "smolm2") == 3
    assert "Nearest: smollm2" in capsys.readouterr().err
    assert run("models", "--fetch", "gemma3-270m") == 3
    assert "E-FETCH-04" in capsys.readouterr().err
    assert run("models", "--accept-terms") == 2


def test_inspect_reads_headers(golden_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", str(golden_model), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["fits"] is True
    assert report["chat_template"] is True
    assert report["formats"][0]["format"] == "F32"
    assert report["formats"][0]["bits_per_weight"] == 32
    memory = report["memory"]
    assert memory["kv_bytes_per_token"] == 2 * 3 * 2 * 8 * 4  # K and V, layers, heads, dim, fp32
    assert memory["total"] == memory["weights"] + memory["kv"] + memory["workspace"]
    assert run("inspect", str(golden_model)) == 0
    assert "will it fit: yes, because weights" in capsys.readouterr().out
    assert run("inspect", str(golden_model), "--memory-budget", "10kB") == 5
    assert "will it fit: no, because" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["chosen"] == "cpu"
    assert report["packages"]["needed"]["numpy"]
    assert len(report["checks"]) >= 2
    assert all(check["passed"] for check in report["checks"])


def test_a_failed_check_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    from engineroom.engine.tools import selfcheck

    original = selfcheck.dequantise
    monkeypatch.setattr(selfcheck, "dequantise", lambda weight: -original(weight))
    assert run("doctor") == 9
    assert "FAILED native dequantisation" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["complete", "x", "--temprature", "1"], "did you mean --temperature"),
        (["complete", "x", "--temp", "1"], "unknown argument '--temp'"),
        (["complete", "x", "--temperature", "nan"], "not a finite number"),
        (["complete", "x", "--temperature", "-1"], "0.0..100.0"),
        (["complete", "x", "--top-k", "many"], "not a whole number"),
        (["complete", "x", "--logit-bias", "5"], "ID=NUMBER"),
        (["complete", "x", "--max-num-seqs", "0"], "1..4096"),
        (["complete", "x", "--device", "tpu"], "auto, cpu, cuda, reference"),
        (["bogus"], "unknown command 'bogus' (known: chat, complete,"),
        (["compelte", "x"], "did you mean complete?"),
        (["inspect"], "required"),
    ],
)
def test_a_wrong_command_line(
    engine: ScriptedEngine, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("engineroom: E-")
    assert "Traceback" not in error


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_engine(config: EngineConfig) -> None:
        raise error

    monkeypatch.setattr(session, "open_engine", open_engine)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SourceError("E-MODEL-01", "No model at /x"), 3, "E-MODEL-01"),
        (SourceError("E-FETCH-02", "other sum"), 3, "E-FETCH-02"),
        (AdmissionError("context_length", "9 > 8"), 6, "E-CTX-01"),
        (AdmissionError("never_fits", "9 > 8"), 6, "E-REQ-01"),
        (ParameterError("top_p", "top_p=2"), 2, "E-PARAM-01"),
        (ConfigError("block_size", "block_size=0"), 2, "E-CONFIG-01"),
        (ConfigError("architectures", "unknown architecture"), 4, "E-CKPT-02"),
        (session.RequestFailed("a bug"), 8, "E-ENGINE-01"),
        (ZeroDivisionError("division by zero"), 1, "E-INTERNAL-01"),
    ],
)
def test_each_error_has_its_code_and_status(
    error: Exception,
    status: int,
    code: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raising(error, monkeypatch)
    monkeypatch.delenv("ENGINEROOM_DEBUG", raising=False)
    assert run("complete", "x") == status
    said = capsys.readouterr().err
    assert said.startswith(f"engineroom: {code}  ")
    assert str(error) in said
    assert f"docs/errors.md#{code.lower()}" in said
    assert "Traceback" not in said
    assert run("complete", "x", "-v") == status
    assert "Traceback" in capsys.readouterr().err
    assert run("-v", "complete", "x") == status
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("ENGINEROOM_DEBUG", "1")
    assert run("complete", "x") == status
    assert "Traceback" in capsys.readouterr().err


def test_a_long_error_is_cut_to_a_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(ValueError("\n".join("line" for _ in range(500))), monkeypatch)
    assert run("complete", "x") == 1
    assert len(capsys.readouterr().err.splitlines()) < 24


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert run("complete", "x") == 130


def test_the_table_of_errors_names_what_exists() -> None:
    assert len({row.code for row in ERRORS}) == len(ERRORS)
    for row in ERRORS:
        assert row.exit_status in EXIT_STATUSES
        if row.raised:
            module, _, name = row.raised.rpartition(".")
            assert issubclass(
                getattr(importlib.import_module(f"engineroom.{module}"), name), Exception
            )
    admission = {row.detail for row in ERRORS if row.raised.endswith("AdmissionError")}
    assert admission == set(AdmissionError.CODES)


def test_every_public_error_is_in_the_table() -> None:
    import engineroom

    for name in engineroom.__all__:
        if name.endswith(("Error", "Unavailable")) or name == "DoesNotFit":
            kind = getattr(engineroom, name)
            error = kind.__new__(kind)
            codes = {"SourceError": "E-MODEL-01", "AdmissionError": "queue_full"}
            if name in (*codes, "BatchError"):
                error.code = codes.get(name, "E-BATCH-01")
            assert find(error).code != "E-INTERNAL-01", name


def test_a_reader_who_leaves_ends_the_command_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "engineroom", "models"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(30) == 141
    assert error == b""


def test_no_colour_and_no_bars_in_a_pipe(golden_model: Path) -> None:
    pytest.importorskip("torch", reason="the reference backend needs torch")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "engineroom", "complete"),
            *("-m", str(golden_model), "hi", "--max-tokens", "4"),
        ],
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"\x1b" not in done.stdout
    assert done.stderr == b""


def test_a_server_without_its_packages_says_what_brings_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "engineroom.engine.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run("serve", "some-model") == 2
    said = capsys.readouterr().err
    assert "E-SERVE-02" in said and "uvicorn" in said
    assert "pip install 'engineroom[serve]'" in said
