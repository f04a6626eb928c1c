"""The journal's reader: a torn end is cut off, damage is named, and no answer is ever wrong."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from engineroom.engine.batch import BatchError, status, verify
from engineroom.engine.batch.journal import Journal, Result, journal_path, pack_record
from tests.batch.child import run, write_lines
from tests.counts import count

REQUESTS = 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("journal") / "in.jsonl", REQUESTS)


@pytest.fixture(scope="module")
def whole(source: Path) -> tuple[bytes, bytes]:
    """(journal, output) of a finished run."""
    output = source.with_name("out.jsonl")
    run(source, output)
    return journal_path(output).read_bytes(), output.read_bytes()


def _again(source: Path, output: Path, journal: bytes) -> int:
    journal_path(output).write_bytes(journal)
    return run(source, output).done_before


@pytest.mark.parametrize("seed", range(count(reduced=60, full=2000)))
def test_a_flipped_byte_is_detected_or_harmless(
    seed: int, source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    damaged = bytearray(whole[0])
    flips = rng.choice((1, 1, 3))
    for _ in range(flips):
        damaged[rng.randrange(len(damaged))] ^= rng.randrange(1, 256)
    output = tmp_path / "out.jsonl"
    try:
        before = _again(source, output, bytes(damaged))
    except BatchError as error:
        assert error.code == "E-BATCH-04"
        assert re.search(r"record \d+ at byte \d+", str(error))
        return
    # Records at the very end, all of them damaged, may pass for a torn end: they are made again.
    assert REQUESTS - flips <= before < REQUESTS
    assert output.read_bytes() == whole[1]


@pytest.mark.parametrize("seed", range(count(reduced=20, full=500)))
def test_a_torn_end_is_cut_off(
    seed: int, source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    rng = random.Random(seed)
    torn = whole[0][: rng.randrange(len(whole[0]))] + bytes(rng.choice((0, 0, 7, 5000)))
    output = tmp_path / "out.jsonl"
    _again(source, output, torn)
    assert output.read_bytes() == whole[1]
    assert status(output).torn == 0


def test_damage_in_the_middle_names_the_record_and_the_cure(
    source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    damaged = bytearray(whole[0])
    damaged[len(damaged) // 2] ^= 1
    output = tmp_path / "out.jsonl"
    with pytest.raises(BatchError, match="a good record with another number") as caught:
        _again(source, output, bytes(damaged))
    assert not output.exists()
    cut = re.search(r"truncate -s (\d+)", str(caught.value))
    assert cut is not None
    _again(source, output, bytes(damaged[: int(cut[1])]))
    assert output.read_bytes() == whole[1]


@pytest.mark.parametrize(("index", "why"), [(3, "a second time"), (REQUESTS, "of 12")])
def test_a_record_that_belongs_to_no_open_request(
    index: int, why: str, source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    extra = Result(index, 1, 1, 0, 0.1, 200, b"{}\n").pack()
    with pytest.raises(BatchError, match=why):
        _again(source, tmp_path / "o", whole[0] + pack_record(REQUESTS + 1, extra))


def test_a_record_of_another_place_is_damage(whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    """A good record with a wrong sequence number: something before it is missing."""
    path = tmp_path / "o.journal"
    path.write_bytes(whole[0] + pack_record(99, b"R"))
    with pytest.raises(BatchError, match="record 13 .* is damaged"):
        journal = Journal(path)
        list(journal.reader.payloads())


def test_an_output_that_was_changed_is_found(
    source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    _again(source, output, whole[0])
    assert verify(output).complete
    lines = output.read_bytes().splitlines(keepends=True)
    for damaged, why in (
        ([*lines[:4], lines[4].replace(b"fake", b"fakf"), *lines[5:]], "line 5"),
        ([lines[1], lines[0], *lines[2:]], "line 1"),
        (lines[:-1], f"{REQUESTS - 1} lines of {REQUESTS}"),
        ([*lines, lines[0]], f"line {REQUESTS + 1}"),
    ):
        output.write_bytes(b"".join(damaged))
        with pytest.raises(BatchError, match=why):
            verify(output)
