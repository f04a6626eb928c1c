"""Our own /openapi.json against the server, by schemathesis: every operation, none left out.

positive_data_acceptance is not asked: what a schema-valid request holds may still not fit the model
(its name, its vocabulary, its context) or another field, and is refused with a 400 that says so.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.counts import FULL

from .conftest import Running
from .http import get

pytest.importorskip("schemathesis", reason="schemathesis is not installed")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
)


def test_the_server_keeps_to_its_own_document(server: Running, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "run"]
    options = {
        "--phases": "coverage,fuzzing" if FULL else "fuzzing",
        "--max-examples": "40" if FULL else "4",
        "--seed": "1",
        "--request-timeout": "20",
        "--checks": ",".join(CHECKS),
    }
    made = subprocess.run(
        [
            *command,
            f"{server.url}/openapi.json",
            "--no-color",
            "--continue-on-failure",
            *(part for option in options.items() for part in option),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-1000:]
    # schemathesis itself asks for the document, and counts it in no run
    operations = sum(map(len, get(server, "/openapi.json").json["paths"].values())) - 1
    assert f"{operations} selected / {operations} total" in made.stdout
    server.wait_until(lambda: server.service.num_live == 0)
