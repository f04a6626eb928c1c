"""The step log's ring and file, and timelines whose segments sum exactly."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineroom.engine.core.steplog import StepLog, StepRecord, Timeline


def record(step_id):
    return StepRecord(
        step_id=step_id,
        t_start=1.5,
        t_schedule_s=0.1,
        t_build_s=0.1,
        t_execute_s=0.2,
        t_commit_s=0.1,
        num_tokens=5,
        num_logit_rows=1,
        num_running=2,
        num_waiting=0,
        num_preempted=0,
        free_blocks=3,
        cached_blocks=1,
        requests=(("r", 0, 5, "prefill"),),
        backend="fake",
    )


class TestLog:
    def test_ring_keeps_the_latest(self):
        log = StepLog(capacity=2)
        for i in range(5):
            log.append(record(i))
        assert [r.step_id for r in log.records] == [3, 4] and log.num_steps == 5
        with pytest.raises(ValueError, match="capacity=0"):
            StepLog(capacity=0)

    def test_lines(self, tmp_path):
        path = tmp_path / "steps.jsonl"
        for i in range(2):  # appends to what is there
            log = StepLog(path=str(path))
            log.append(record(i))
            assert json.loads(path.read_text().splitlines()[-1])["step_id"] == i
            log.close()
            log.close()
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step_id"] for line in lines] == [0, 1]
        assert lines[0]["requests"] == [["r", 0, 5, "prefill"]]
        assert set(lines[0]) == set(StepRecord.__dataclass_fields__)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
    def test_a_full_disk_does_not_stop_the_engine(self, caplog):
        log = StepLog(path="/dev/full")
        log.append(record(0))
        log.append(record(1))
        assert log.write_error and len(log.records) == 2
        assert len([r for r in caplog.records if "/dev/full" in r.message]) == 1
        log.close()

    def test_a_path_that_cannot_be_opened_is_told_at_once(self, tmp_path):
        with pytest.raises(OSError):
            StepLog(path=str(tmp_path / "none" / "x"))


class TestTimeline:
    def test_segments(self):
        line = Timeline(1.0)
        line.mark("prefill", 1.5)
        line.mark("decode", 2.0)
        line.mark("decode", 2.5)
        line.close(3.0)
        assert [(s.state, s.length_ns) for s in line.segments] == [
            ("queued", 500_000_000),
            ("prefill", 500_000_000),
            ("decode", 1_000_000_000),
        ]
        assert line.seconds("queued", "decode") == 1.5
        line.mark("late", 9.0)
        line.close(9.0)
        assert line.state == "decode" and line.total_ns == 2_000_000_000

    def test_a_clock_that_steps_back_makes_no_negative_segment(self):
        line = Timeline(5.0)
        line.mark("prefill", 4.0)
        line.close(6.0)
        assert [s.length_ns for s in line.segments] == [0, 1_000_000_000]

    @given(
        st.floats(0, 1e6),
        st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e3)), max_size=20),
    )
    def test_segments_sum_to_wall_time_exactly(self, start, steps):
        line, now = Timeline(start), start
        for state, gap in steps:
            now += gap
            line.mark(state, now)
        line.close(now)
        assert sum(s.length_ns for s in line.segments) == line.total_ns
        assert line.total_ns == round(now * 1e9) - round(start * 1e9)
        assert all(
            a.end_ns == b.start_ns for a, b in zip(line.segments, line.segments[1:], strict=False)
        )
