"""Our own /openapi.json against the server, by schemathesis: every operation, none left out.

The document names no model, so what it allows may be refused with a 404 for the model's name; the
operations that generate are not sounded deeper than that by positive_data_acceptance. So at full
counts each that names a model has a run of its own: in one with others it would be told of the
name by /v1/models, and then be refused what no schema can say.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.serve.openapi import OPERATIONS
from tests.counts import FULL

from .conftest import Running
from .http import get, post

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "positive_data_acceptance",
    "missing_required_header",
    "unsupported_method",
)


# schemathesis itself asks for the document, and counts it in no run
ALL = {op.handler: op.body for op in OPERATIONS if op.handler != "openapi"}
ALONE = [name for name, body in ALL.items() if body and "model" in body.__struct_fields__]
TOGETHER = [name for name in ALL if name not in ALONE]


# 413 besides what schemathesis takes for a refusal: a list too long may make a body too large.
REFUSALS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, "5xx"]
"""


@pytest.mark.parametrize("operations", [TOGETHER, *([n] for n in ALONE)] if FULL else [list(ALL)])
def test_the_server_keeps_to_its_own_document(
    serving: Any, tmp_path: Path, operations: list[str]
) -> None:
    server: Running = serving(data_dir=str(tmp_path / "data"))  # or files and batches are refused
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    options = {
        "--phases": "coverage,fuzzing" if FULL else "fuzzing",
        "--max-examples": "40" if FULL else "4",
        "--seed": "1",
        "--request-timeout": "20",
        "--checks": ",".join(CHECKS),
    }
    (tmp_path / "schemathesis.toml").write_text(REFUSALS)
    made = subprocess.run(
        [
            *command,
            f"{server.url}/openapi.json",
            "--no-color",
            "--continue-on-failure",
            *(part for option in options.items() for part in option),
            *(f"--include-operation-id={name}" for name in operations),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-1000:]
    assert sum(map(len, get(server, "/openapi.json").json["paths"].values())) - 1 == len(ALL)
    assert f"{len(operations)} selected / {len(ALL)} total" in made.stdout
    server.wait_until(lambda: server.service.num_live == 0)


def test_a_number_without_a_fraction_is_an_integer(server: Running) -> None:
    answer = post(server, "/detokenize", {"tokens": [104.0, 105.0]})
    assert (answer.status, answer.json["prompt"]) == (200, "hi")
    refused = post(server, "/detokenize", {"tokens": [104.5]})
    assert (refused.status, refused.error["param"]) == (400, "tokens[0]")


def test_the_document_knows_the_model_s_vocabulary(server: Running) -> None:
    schemas = get(server, "/openapi.json").json["components"]["schemas"]
    last = server.service.info.model.vocab_size - 1
    assert schemas["DetokenizeRequest"]["properties"]["tokens"]["items"]["maximum"] == last
