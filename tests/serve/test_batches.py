"""/v1/files and /v1/batches with OpenAI's own client: the whole flow, misfortunes, strangers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine.config import ConfigError
from engineroom.engine.serve.settings import ServeConfig
from engineroom.engine.serve.storage import Storage
from tests.counts import count

from .conftest import Running, start
from .http import ask, chat, completion, get, post

openai = pytest.importorskip("openai", reason="the openai package is not installed")
pytest.importorskip("python_multipart", reason="python-multipart is not installed")

CHAT, PLAIN, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
KEYS = ("key-of-one-user", "key-of-another")


def client(running: Running, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=0)


def lines(url: str = CHAT, count: int = 4, **body: Any) -> bytes:
    rows = []
    for n in range(count):
        made = {PLAIN: completion, CHAT: chat}.get(url, lambda text: {"input": text})(f"say {n}")
        row = {"custom_id": f"r{n}", "method": "POST", "url": url, "body": {**made, **body}}
        rows.append(json.dumps(row))
    return "\n".join(rows).encode()


def upload(api: Any, data: bytes, name: str = "in.jsonl") -> Any:
    return api.files.create(file=(name, io.BytesIO(data)), purpose="batch")


def begin(api: Any, data: bytes, url: str = CHAT, **options: Any) -> Any:
    return api.batches.create(
        input_file_id=upload(api, data).id, endpoint=url, completion_window="24h", **options
    )


def wait(api: Any, batch: Any, seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < end, f"still {batch.status}"
        time.sleep(0.02)
        batch = api.batches.retrieve(batch.id)
    return batch


def answers(api: Any, file_id: str) -> dict[str, Any]:
    rows = [json.loads(line) for line in api.files.content(file_id).text.splitlines()]
    return {row["custom_id"]: row["response"] for row in rows}


@pytest.fixture
def keeping(serving: Callable[..., Running], tmp_path: Path) -> Callable[..., Running]:
    return lambda model="fake", **options: serving(
        model, **{"data_dir": str(tmp_path / "data"), **options}
    )


# ------------------------------------------------------------------------------------ the flow


def test_the_official_client_has_its_batch_answered(keeping: Any) -> None:
    running = keeping()
    api = client(running)
    file = upload(api, lines(max_tokens=5, seed=3), "../../etc/x\n\u202e.jsonl")
    assert file.purpose == "batch" and file.status == "processed"
    assert file.filename == "../../etc/x%0A?.jsonl"  # the client writes a newline so
    batch = api.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.object == "batch" and batch.expires_at - batch.created_at == 86400
    api.files.delete(file.id)  # the batch has the bytes
    done = wait(api, batch)
    assert done.status == "completed" and done.metadata == {"a": "b"}
    assert done.completed_at and done.in_progress_at and done.finalizing_at
    assert done.request_counts.model_dump() == {"total": 4, "completed": 4, "failed": 0}
    found = answers(api, done.output_file_id)
    assert list(found) == ["r0", "r1", "r2", "r3"] and done.error_file_id is None
    alone = post(running, CHAT, chat("say 2", max_tokens=5, seed=3)).json
    assert found["r2"]["body"]["choices"][0]["message"] == {
        "role": "assistant",
        "content": alone["choices"][0]["message"]["content"],
        "refusal": None,
    }
    assert found["r2"]["status_code"] == 200
    assert [f.purpose for f in api.files.list()] == ["batch_output"]
    assert [b.id for b in api.batches.list()] == [batch.id]
    page = get(running, "/metrics").body.decode()
    assert 'engineroom_batches_total{model="fake",status="completed"} 1.0' in page


def test_refused_and_failed_requests_are_in_the_error_file(keeping: Any) -> None:
    api = client(keeping())
    rows = [json.loads(line) for line in lines(PLAIN, 4, max_tokens=2).splitlines()]
    rows[1]["body"]["prompt"] = "refuse: it"
    rows[3]["body"]["prompt"] = "bug: it"
    done = wait(api, begin(api, "\n".join(map(json.dumps, rows)).encode(), PLAIN))
    assert done.request_counts.model_dump() == {"total": 4, "completed": 2, "failed": 2}
    assert list(answers(api, done.output_file_id)) == ["r0", "r2"]
    errors = answers(api, done.error_file_id)
    assert {k: e["status_code"] for k, e in errors.items()} == {"r1": 400, "r3": 500}
    assert "9000 tokens" in errors["r1"]["body"]["error"]["message"]


def test_embeddings(keeping: Any) -> None:
    running = keeping()
    api = client(running)
    done = wait(api, begin(api, lines(VECTORS, 3, dimensions=2), VECTORS))
    found = answers(api, done.output_file_id)
    alone = post(running, VECTORS, {"model": "fake", "input": "say 1", "dimensions": 2}).json
    assert found["r1"]["body"]["data"] == alone["data"]
    assert found["r1"]["body"]["usage"] == alone["usage"]
    done = wait(api, begin(api, lines(VECTORS, 1, dimensions=999), VECTORS))
    (error,) = answers(api, done.error_file_id).values()
    assert error["body"]["error"]["message"] == "dimensions=999, and the model has 8"


def test_pages_of_lists(keeping: Any) -> None:
    api = client(keeping())
    files = [upload(api, b"{}").id for _ in range(5)]
    assert sorted(f.id for f in api.files.list(limit=2)) == sorted(files)
    assert [f.id for f in api.files.list(order="asc")] == [f.id for f in api.files.list()][::-1]
    assert not list(api.files.list(purpose="batch_output"))
    batches = [begin(api, lines(count=1, max_tokens=1)).id for _ in range(5)]
    assert [b.id for b in api.batches.list(limit=2)] == batches[::-1]
    for query in ("limit=0", "limit=x", "order=up", "after=nothing", "page=2"):
        answer = get(api_of(api), f"/v1/files?{query}")
        assert answer.status in (400, 404) and answer.error["param"] == query.partition("=")[0]
    parameters = get(api_of(api), "/openapi.json").json["paths"]["/v1/files"]["get"]["parameters"]
    bounds = {p["name"]: p["schema"].get("maximum") for p in parameters if p["in"] == "query"}
    assert bounds == {"after": None, "limit": 10_000, "order": None, "purpose": None}


def api_of(api: Any) -> Any:
    """The server of a client, as http.py wants it."""

    class Where:
        port = api.base_url.port

    return Where


# ------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("data", "code", "line", "why"),
    [
        (b"hello\n" + lines(), "invalid_batch", 1, "Expecting value"),
        (lines() + b"\n\xff\xfe", "invalid_batch", 5, "line"),
        (lines() + b"\n\n" + lines(), "duplicate_custom_id", 6, "'r0' comes a second time"),
        (lines(PLAIN), "invalid_batch", 1, "url must be the batch's endpoint"),
        (lines(nonsense=1), "invalid_batch", 1, "body.nonsense"),
        (lines(model="gpt-9"), "invalid_batch", 1, "not the model"),
        (b"\n \n", "invalid_batch", None, "no request"),
        (b"", "invalid_batch", None, "no request"),
    ],
)
def test_a_file_that_is_no_batch_fails_with_its_line(
    data: bytes, code: str, line: int | None, why: str, keeping: Any, tmp_path: Path
) -> None:
    api = client(keeping())
    failed = wait(api, begin(api, data))
    assert failed.status == "failed" and failed.failed_at and failed.output_file_id is None
    (error,) = failed.errors.data
    assert (error.code, error.line) == (code, line)
    assert why in error.message and str(tmp_path) not in error.message


def test_without_a_folder_the_paths_say_how(server: Running) -> None:
    for method, path in (
        ("GET", "/v1/files"),
        ("POST", "/v1/files"),
        ("GET", "/v1/batches"),
        ("GET", "/v1/files/file-0"),
    ):
        answer = ask(server, method, path)
        assert answer.status == 400 and answer.error["code"] == "storage_off"
        assert "--data-dir" in answer.error["message"]


def test_another_key_sees_nothing_of_it(keeping: Any) -> None:
    running = keeping(api_keys=KEYS)
    mine, other = (client(running, key) for key in KEYS)
    batch = begin(mine, lines(max_tokens=2))
    done = wait(mine, batch)
    for call in (
        lambda: other.files.retrieve(done.output_file_id),
        lambda: other.files.content(done.output_file_id),
        lambda: other.files.delete(done.output_file_id),
        lambda: other.batches.retrieve(batch.id),
        lambda: other.batches.cancel(batch.id),
        lambda: begin_with(other, done.input_file_id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    assert not list(other.files.list()) and not list(other.batches.list())
    assert len(list(mine.files.list())) == 2
    assert get(running, "/v1/files").status == 401


def begin_with(api: Any, file_id: str, **options: Any) -> Any:
    given = {"endpoint": CHAT, "completion_window": "24h", **options}
    return api.batches.create(input_file_id=file_id, **given)


@pytest.mark.parametrize(
    "ident",
    ["..", "file-" + "0" * 24, "..%2f..%2fetc%2fpasswd", "%00", "file-" + "0" * 24 + ".json", "*"],
)
def test_ids_are_names_of_nothing_else(ident: str, keeping: Any, tmp_path: Path) -> None:
    running = keeping()
    upload(client(running), b"{}")
    before = sorted(tmp_path.rglob("*"))
    for method, path in (
        ("GET", f"/v1/files/{ident}"),
        ("GET", f"/v1/files/{ident}/content"),
        ("DELETE", f"/v1/files/{ident}"),
        ("GET", f"/v1/batches/{ident}"),
        ("POST", f"/v1/batches/{ident}/cancel"),
    ):
        assert ask(running, method, path).status == 404, path
    assert post(running, "/v1/batches", batch_body(ident)).status == 404
    assert sorted(tmp_path.rglob("*")) == before


def batch_body(file_id: str, **fields: Any) -> dict[str, Any]:
    return {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h", **fields}


def test_what_a_batch_may_not_ask_for(keeping: Any) -> None:
    running = keeping()
    file_id = upload(client(running), lines()).id
    for fields, param in (
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 9}}, "output_expires_after"),
        ({"nonsense": 1}, "nonsense"),
    ):
        answer = post(running, "/v1/batches", batch_body(file_id, **fields))
        assert answer.status == 400 and param in answer.error["param"], fields
    done = wait(client(running), begin(client(running), lines(max_tokens=1)))
    answer = post(running, "/v1/batches", batch_body(done.output_file_id))
    assert answer.status == 400 and "batch_output" in answer.error["message"]


def form(*parts: tuple[str, str, bytes]) -> tuple[bytes, dict[str, str]]:
    body = b""
    for name, extra, data in parts:
        head = f'--B\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'
        body += head.encode() + data + b"\r\n"
    return body + b"--B--\r\n", {"Content-Type": "multipart/form-data; boundary=B"}


def test_uploads_that_are_refused(keeping: Any, tmp_path: Path) -> None:
    running = keeping(max_file_bytes=10_000, max_storage_bytes=25_000)
    file = ("file", '; filename="a"', b"{}")
    purpose = ("purpose", "", b"batch")
    for parts, status, why in (
        ((purpose,), 400, "no file"),
        ((file,), 400, "no purpose"),
        ((file, ("purpose", "", b"fine-tune")), 400, "purpose='batch'"),
        ((file, purpose, ("expires_after[anchor]", "", b"created_at")), 400, "expires_after"),
        ((file, file, purpose), 400, "Too many files"),
        ((("file", '; filename="a"', bytes(10_001)), purpose), 413, "at most 10000"),
        ((("file", '; filename="a"', bytes(1 << 20)), purpose), 413, "exceeds 10000"),
    ):
        answer = ask(running, "POST", "/v1/files", *form(*parts))
        assert answer.status == status and why in answer.error["message"], parts
    assert post(running, "/v1/files", {}).status == 415
    broken, headers = form(file, purpose)
    assert ask(running, "POST", "/v1/files", broken[:40], headers).status == 400
    assert not list(tmp_path.rglob("file-*"))
    api = client(running)
    for _ in range(2):
        upload(api, bytes(8000))
    with pytest.raises(openai.APIStatusError) as caught:
        upload(api, bytes(8000))
    assert caught.value.status_code == 413 and caught.value.code == "storage_full"
    api.files.delete(next(iter(api.files.list())).id)
    upload(api, bytes(8000))


# ------------------------------------------------------------------------------ misfortunes


def test_a_cancelled_batch_keeps_what_was_answered(keeping: Any) -> None:
    running = keeping("paced", batch_requests=2)
    api = client(running)
    batch = begin(api, lines(PLAIN, 400, max_tokens=3), PLAIN)
    running.wait_until(lambda: api.batches.retrieve(batch.id).request_counts.completed > 5)
    assert api.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = wait(api, batch)
    assert done.status == "cancelled" and done.cancelled_at and done.cancelling_at
    assert 5 < done.request_counts.completed < 400
    assert len(answers(api, done.output_file_id)) == done.request_counts.completed
    with pytest.raises(openai.ConflictError):
        api.batches.cancel(batch.id)
    running.wait_until(lambda: running.service.keeper.llm.client.stats()["live"] == 0)


def test_a_batch_that_expires_keeps_what_was_answered(
    keeping: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engineroom.engine.serve.batches._DAY", 2)
    running = keeping("paced", batch_requests=1)
    api = client(running)
    done = wait(api, begin(api, lines(PLAIN, 40, max_tokens=200), PLAIN))
    assert done.status == "expired" and done.expired_at
    assert 0 < done.request_counts.completed < 40
    assert done.request_counts.total == 40


def test_an_engine_that_dies_in_the_middle(keeping: Any) -> None:
    running = keeping("paced", batch_requests=4)
    api = client(running)
    batch = begin(api, lines(PLAIN, 300, max_tokens=4, seed=1), PLAIN)
    running.wait_until(lambda: api.batches.retrieve(batch.id).request_counts.completed > 20)
    os.kill(running.service.info.pid, signal.SIGKILL)
    done = wait(api, batch)
    assert done.status == "completed" and done.request_counts.completed == 300
    assert running.service.keeper.num_restarts == 1


def test_interactive_requests_go_first_and_batches_share_the_room(keeping: Any) -> None:
    running = keeping("paced", api_keys=KEYS, batch_requests=6)
    first, second = (client(running, key) for key in KEYS)
    batches = [begin(api, lines(PLAIN, 60, max_tokens=100), PLAIN) for api in (first, second)]
    running.wait_until(lambda: running.service.keeper.llm.client.stats()["live"] > 0)
    live: list[int] = []
    for _ in range(30):
        live.append(running.service.keeper.llm.client.stats()["live"])
        time.sleep(0.01)
    assert 0 < max(live[-5:]) <= 6  # at first one may have begun before the other came
    own = {"Authorization": f"Bearer {KEYS[0]}"}
    started = time.monotonic()
    assert post(running, PLAIN, completion(max_tokens=2), own).status == 200
    assert time.monotonic() - started < 2
    for api, batch in zip((first, second), batches, strict=True):
        assert wait(api, batch).request_counts.completed == 60


def test_requests_of_a_batch_stand_behind_all_others() -> None:
    from engineroom.engine.core.checks import check_identity
    from engineroom.engine.serve.batch_engine import PRIORITY

    check_identity("a", PRIORITY, b"")
    assert PRIORITY > 1 << 20


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    options = {"data_dir": str(tmp_path / "data"), "batch_requests": 4}
    data = lines(PLAIN, 300, max_tokens=4)
    running = start("paced", **options)
    api = client(running)
    batch = begin(api, data, PLAIN)
    running.wait_until(lambda: api.batches.retrieve(batch.id).request_counts.completed > 20)
    service = running.service
    with pytest.raises(ConfigError, match="another server"):
        Storage(options["data_dir"], service.settings, service.keeper, service.metrics, "fake")  # type: ignore[arg-type]
    running.stop()
    again = start("paced", **options)
    try:
        api = client(again)
        assert api.batches.retrieve(batch.id).status == "in_progress"
        done = wait(api, batch)
        assert done.request_counts.completed == 300
        whole = api.files.content(done.output_file_id).content
        # An uninterrupted run gives the same bytes.
        other = wait(api, begin(api, data, PLAIN))
        assert api.files.content(other.output_file_id).content == whole
    finally:
        again.stop()


SERVER = """
import sys; sys.path.insert(0, {root!r})
from tests.serve.conftest import start
running = start("paced", data_dir={data!r}, batch_requests=4)
print(running.port, flush=True)
import threading; threading.Event().wait()
"""


def test_kill_9_in_the_middle(tmp_path: Path) -> None:
    """Killed while it answers, the server ends with the bytes of an uninterrupted one."""
    root = str(Path(__file__).resolve().parents[2])
    data = lines(PLAIN, 300, max_tokens=4)
    script = SERVER.format(root=root, data=str(tmp_path / "data"))
    batch_id = ""
    kills = count(reduced=1, full=5)
    for killed in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", timeout=10)
            batch_id = batch_id or begin(api, data, PLAIN).id
            if killed == kills:
                done = wait(api, api.batches.retrieve(batch_id))
                assert done.request_counts.completed == 300
                whole = api.files.content(done.output_file_id).content
                other = wait(api, begin(api, data, PLAIN))
                assert api.files.content(other.output_file_id).content == whole
            else:
                end = time.monotonic() + 10
                while api.batches.retrieve(batch_id).request_counts.completed < 30 + 40 * killed:
                    assert time.monotonic() < end
                    time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def test_options_of_storage_are_bounded() -> None:
    for name in ("max_file_bytes", "max_storage_bytes"):
        with pytest.raises(ConfigError):
            ServeConfig(**{name: 0})


def test_many_uploads_at_once_keep_the_quota(keeping: Any) -> None:
    running = keeping(max_storage_bytes=40_000)
    statuses: list[int] = []

    def one() -> None:
        file = ("file", '; filename="a"', bytes(4000))
        answer = ask(running, "POST", "/v1/files", *form(file, ("purpose", "", b"batch")))
        statuses.append(answer.status)

    threads = [threading.Thread(target=one) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(statuses) == [200] * 4 + [413] * 8
