"""Rows of CSV and Parquet files as requests by a prompt template, and answers as a Parquet file."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from engineroom.engine import batch
from engineroom.engine.batch import BatchError, Prompting
from engineroom.engine.batch.sources import open_source
from engineroom.engine.batch.template import Template
from tests.batch.child import MODEL, BatchFake, run, write_lines
from tests.counts import count

pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")

BY_TEXT = Prompting("Say: {text}")
CSV = 'id,text,more\na,one,1\n\nb,"two, ""2""\nand a line",2\nc,drei é,3\n'


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def table(path: Path, rows: int = 300, **columns: list[Any]) -> Path:
    made = {"text": [f"text {n}" for n in range(rows)], **columns}
    pq.write_table(pa.table(made), path, row_group_size=100)
    return path


def answers(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text().splitlines()]


def refused(source: Path, prompting: Prompting = BY_TEXT, **options: Any) -> str:
    engine = BatchFake()
    with pytest.raises(BatchError) as caught:
        run(source, source.with_name("out.jsonl"), engine, prompting=prompting, **options)
    assert not engine.asked, "something ran"
    return str(caught.value)


# ------------------------------------------------------------------------------------- templates


def test_a_template_has_names_of_columns_and_nothing_else() -> None:
    row = {"a": "1", "b.c": "{a}", "a[0]": "x"}
    assert Template("t", "{{{a}}} {b.c}{a[0]}").fill(row) == "{1} {a}x"
    assert Template("t", "{a} {a.__class__} {a[0]}").columns == ("a", "a.__class__", "a[0]")
    assert Template("t", "none").columns == ()


@pytest.mark.parametrize("text", ["{", "}", "{}", "{a!r}", "{a:>9}", "{a:{b}}", "{a!}", "{a"])
def test_a_template_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BatchError, match="t=") as caught:
        Template("t", text)
    assert caught.value.code == "E-BATCH-06"


@pytest.mark.parametrize(
    ("format", "prompting", "why"),
    [
        ("jsonl", BY_TEXT, "a line of them is a whole request"),
        ("jsonl", Prompting(chat=True), "chat and JSON lines"),
        ("text", BY_TEXT, "plain lines have no columns"),
        ("text", Prompting(id_column="a"), "id_column and format=text"),
        ("csv", Prompting(), "needs a prompt template"),
        ("csv", Prompting("{text}", system_template="Be brief"), "needs --chat"),
        ("xml", BY_TEXT, "not one of jsonl, text, csv, parquet"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    format: str, prompting: Prompting, why: str, tmp_path: Path
) -> None:
    assert why in refused(write(tmp_path / "in.csv", CSV), prompting, format=format)


# ------------------------------------------------------------------------------------------- rows


def test_csv_rows_become_prompts(tmp_path: Path) -> None:
    engine = BatchFake()
    output = tmp_path / "out.jsonl"
    source = write(tmp_path / "in.csv", "\ufeff" + CSV)
    summary = run(source, output, engine, prompting=Prompting("Say: {text}", id_column="id"))
    assert summary.done == 3
    asked = ["Say: drei é", "Say: one", 'Say: two, "2"\nand a line']
    assert sorted(map(str, engine.asked)) == sorted(asked)
    assert [a["custom_id"] for a in answers(output)] == ["a", "b", "c"]


def test_rows_without_ids_are_named_by_their_places(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", CSV.replace("\n", "\r\n"))
    run(source, tmp_path / "one.jsonl", prompting=BY_TEXT)
    assert [a["custom_id"] for a in answers(tmp_path / "one.jsonl")] == [
        "line-2",
        "line-4",
        "line-6",
    ]
    files = [table(tmp_path / "a.parquet", 2), table(tmp_path / "b.parquet", 1)]
    output = tmp_path / "two.jsonl"
    batch.run(BatchFake(), files, output, model=MODEL, prompting=BY_TEXT, progress=False)
    ids = [a["custom_id"] for a in answers(output)]
    assert ids == ["file-1-row-1", "file-1-row-2", "file-2-row-1"]


def test_chat_rows_have_a_system_message(tmp_path: Path) -> None:
    engine = BatchFake()
    output = tmp_path / "out.jsonl"
    by = Prompting("{text}", system_template="Speak {more}", chat=True)
    run(write(tmp_path / "in.csv", CSV), output, engine, prompting=by)
    assert "system:Speak 1;user:one;[]" in [bytes(p).decode() for p in engine.asked]  # type: ignore[arg-type]
    assert answers(output)[0]["response"]["body"]["object"] == "chat.completion"
    run(
        write(tmp_path / "in.txt", "hi"),
        tmp_path / "o",
        engine,
        format="text",
        prompting=Prompting(chat=True),
    )
    assert engine.asked[-1] == list(b"user:hi;[]")


def test_parquet_rows_become_prompts(tmp_path: Path) -> None:
    columns = {"n": list(range(300)), "x": [n / 4 for n in range(300)], "yes": [True, False] * 150}
    kinds = pa.array([f"k{n % 3}" for n in range(300)]).dictionary_encode()
    source = table(tmp_path / "in.parquet", **columns, kind=kinds)
    engine = BatchFake()
    output = tmp_path / "out.jsonl"
    by = Prompting("{text} {n} {x} {yes} {kind}", id_column="n")
    assert run(source, output, engine, prompting=by).done == 300
    assert "text 7 7 1.75 false k1" in engine.asked
    assert [a["custom_id"] for a in answers(output)] == [str(n) for n in range(300)]


@pytest.mark.parametrize("seed", range(count(reduced=5, full=100)))
def test_any_row_is_read_again_as_it_was_listed(seed: int, tmp_path: Path) -> None:
    """CSV and Parquet, in any order, whatever the fields hold."""
    rng = random.Random(seed)
    letters = 'ab,"\n\r é\u2028{}\x00'
    texts = ["".join(rng.choices(letters, k=rng.randrange(1, 12))) for _ in range(250)]
    quoted = "".join(f'"{t.replace(chr(34), chr(34) * 2)}",x\r\n' for t in texts)
    files = {
        "csv": write(tmp_path / "in.csv", "text,y\n" + quoted),
        "parquet": table(tmp_path / "in.parquet", text=texts),
    }
    for format, path in files.items():
        source = open_source(path, format, ["text"])
        listed = {at: row for at, _, row in source.scan()}
        assert [row["text"] for row in listed.values()] == texts  # type: ignore[call-overload,index]
        for at in rng.sample(sorted(listed), 40):
            assert source.read(at) == listed[at]
        source.close()


BAD_ROWS = [
    ("text,b\n1,2\n3\n", "line 3: the row has 1 fields and the header 2"),
    ("text,b\n1,2\n3,4,5\n", "line 3: the row has 3 fields"),
    ("text,b\n1,2\n,4\n", "line 3: column 'text' is empty"),
    ('text,b\n1,2\n"3" x,4\n', "line 3: not CSV"),
    ('text,b\n1,2\n"3,4\n5,6\n', "line 3: not CSV"),
    (b"text,b\n1,2\n\xff,4\n", "line 3: column 'text' is not UTF-8"),
]


@pytest.mark.parametrize(("text", "why"), BAD_ROWS)
def test_a_bad_row_stops_before_anything_runs_or_is_recorded(
    text: str | bytes, why: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "in.csv", text)
    assert why in refused(source)
    output = tmp_path / "out.jsonl"
    assert run(source, output, prompting=BY_TEXT, on_error="record").errors == 1
    first, second = answers(output)
    assert first["response"]["status_code"] == 200
    assert second["custom_id"] == "line-3"
    assert second["response"]["body"]["error"]["message"] in why.split(": ", 1)[1] or re.search(
        why.split(": ", 1)[1], second["response"]["body"]["error"]["message"]
    )


def test_a_missing_value_of_a_parquet_file_names_its_row(tmp_path: Path) -> None:
    source = table(tmp_path / "in.parquet", 3, text=["a", None, ""])
    assert "in.parquet row 2: column 'text' is empty" in refused(source)


@pytest.mark.parametrize("name", ["in.csv", "in.parquet"])
def test_an_unknown_column_is_named_with_those_there_are(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    source = write(path, CSV) if name == "in.csv" else table(path)
    message = refused(source, Prompting("{texts}"))
    assert "no column 'texts'; did you mean 'text'? It has" in message
    assert "no column 'key'" in refused(source, Prompting("{text}", id_column="key"))


def test_other_tables_that_cannot_be_used(tmp_path: Path) -> None:
    assert "'text' is there 2 times" in refused(write(tmp_path / "a.csv", "text,text\n1,2\n"))
    assert "no header" in refused(write(tmp_path / "b.csv", ""))
    assert "no Parquet file" in refused(write(tmp_path / "c.parquet", CSV))
    lists = table(tmp_path / "d.parquet", 1, many=[[1]])
    assert "has the type list" in refused(lists, Prompting("{many}"))
    assert "several formats" in _mixed(tmp_path)
    assert "custom_id 'x'" in refused(
        write(tmp_path / "e.csv", "text,id\n1,x\n2,x\n"), Prompting("{text}", id_column="id")
    )
    damaged = bytearray(table(tmp_path / "f.parquet").read_bytes())
    damaged[4:400] = bytes(396)
    assert "f.parquet" in refused(write(tmp_path / "f.parquet", bytes(damaged)))


def _mixed(folder: Path) -> str:
    with pytest.raises(BatchError) as caught:
        batch.run(BatchFake(), ["a.csv", "b.parquet"], folder / "o", model=MODEL)
    return str(caught.value)


def test_a_changed_template_is_noticed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", CSV)
    run(source, tmp_path / "out.jsonl", prompting=BY_TEXT)
    assert "prompting.prompt_template" in refused(source, Prompting("Sing: {text}"))


def test_a_large_row_group_is_read_by_parts(tmp_path: Path) -> None:
    """60 MB of text in one row group: neither listing nor answering holds it."""
    path = tmp_path / "in.parquet"
    rng = random.Random(1)
    texts = [f"{n} " + rng.randbytes(5000).hex() for n in range(6000)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=6000, compression="none")
    del texts
    before = pa.total_allocated_bytes()
    source = open_source(path, "parquet", ["text"])
    tracemalloc.start()
    most = 0
    for _ in source.scan():
        most = max(most, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    source.close()
    assert most + peak < 32 << 20


# ------------------------------------------------------------------------------------- the output


def test_parquet_output_has_the_answers_in_order(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", 30)
    with source.open("a") as file:
        file.write("{\n")
    lines, output = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    for path in (lines, output):
        run(source, path, on_error="record")
    rows = pq.read_table(output).to_pylist()
    made = answers(lines)
    assert [r["custom_id"] for r in rows] == [a["custom_id"] for a in made]
    assert [json.loads(r["response"]) for r in rows] == [
        # ids derive from the manifest, which does not know the output
        a["response"]["body"]
        for a in made
    ]
    assert rows[1]["text"] == made[1]["response"]["body"]["choices"][0]["message"]["content"]
    assert rows[3]["text"] == made[3]["response"]["body"]["choices"][0]["text"]
    assert rows[1]["completion_tokens"] == 2 and rows[1]["finish_reason"] == "length"
    assert rows[-1]["status_code"] == 400 and rows[-1]["text"] is None
    assert rows[-1]["error"] == made[-1]["response"]["body"]["error"]["message"]
    assert batch.verify(output).complete


def test_a_changed_table_is_found(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    run(write_lines(tmp_path / "in.jsonl", 12), output)
    whole = pq.read_table(output)
    texts = whole.column("text").to_pylist()
    texts[4] = "other"
    other = whole.set_column(2, "text", pa.array(texts))
    for damaged, why in ((other, "row 5"), (whole.slice(0, 11), "11 rows of 12")):
        pq.write_table(damaged, output)
        with pytest.raises(BatchError, match=why):
            batch.verify(output)
    output.write_bytes(b"PAR1")
    with pytest.raises(BatchError, match="after row 0"):
        batch.verify(output)


def test_without_pyarrow_parquet_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    source = write_lines(tmp_path / "in.jsonl", 2)
    engine = BatchFake()
    with pytest.raises(BatchError, match=r"pip install 'engineroom\[parquet\]'"):
        run(source, tmp_path / "out.parquet", engine)
    assert not engine.asked
    assert not (tmp_path / "out.parquet.journal").exists()
