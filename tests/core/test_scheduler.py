"""The scheduler, one rule at a time; any mixture of them is test_simulation's."""

import random

import pytest

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.plan import SAMPLE
from engineroom.engine.core.request import RequestState
from engineroom.engine.core.sampling_params import SamplingParams
from tests.core.bench import Bench, shares
from tests.core.fakes import EOS, Script, truth


class TestDoor:
    def refused(self, bench, code, *parts, **options):
        with pytest.raises(AdmissionError) as caught:
            bench.add(**options)
        assert caught.value.code == code
        for part in parts:
            assert str(part) in str(caught.value)
        bench.scheduler.check_integrity()
        assert not bench.scheduler.has_work and bench.scheduler.abort("r") == 0

    def test_an_empty_prompt(self):
        self.refused(Bench(), "prompt_empty", prompt=0)

    def test_beyond_the_context(self):
        bench = Bench(max_model_len=10)
        self.refused(bench, "context_length", 8, 3, 11, 10, prompt=8, max_tokens=3)
        bench.add(prompt=8, max_tokens=2)

    def test_beyond_the_pool(self):
        bench = Bench(num_blocks=4)
        self.refused(bench, "never_fits", 9, 5, 4, 8, prompt=5, max_tokens=5)
        # 8 tokens of room hold 9: the last one is never fed back.
        request = bench.add(prompt=5, max_tokens=4)
        bench.run()
        assert request.finish_reason is FinishReason.LENGTH

    def test_a_prompt_larger_than_the_pool(self):
        self.refused(Bench(num_blocks=8), "never_fits", 33, 17, 8, prompt=33, max_tokens=1)

    def test_a_full_queue(self):
        bench = Bench(max_waiting=2)
        bench.add("a")
        bench.add("b")
        with pytest.raises(AdmissionError, match="max_waiting=2") as caught:
            bench.add("c")
        assert caught.value.code == "queue_full"
        bench.step()
        bench.add("c")

    def test_a_duplicate(self):
        bench = Bench()
        bench.add("a")
        with pytest.raises(AdmissionError, match="'a'") as caught:
            bench.add("a")
        assert caught.value.code == "duplicate_id"
        bench.run()
        bench.add("a")

    def test_all_or_none(self):
        bench = Bench(max_waiting=3)
        group = [bench.request("a", sample_index=i) for i in range(4)]
        with pytest.raises(AdmissionError):
            bench.scheduler.add(*group)
        with pytest.raises(AdmissionError):
            bench.scheduler.add(group[0], bench.request("a", sample_index=0))
        with pytest.raises(AdmissionError):
            bench.scheduler.add(group[0], bench.request("b", prompt=0))
        assert not bench.scheduler.has_work
        bench.scheduler.add(*group[:3])
        assert bench.scheduler.num_waiting == 3

    @pytest.mark.parametrize("name", ["max_num_seqs", "block_size", "num_blocks"])
    def test_limits(self, name):
        with pytest.raises(ValueError, match=name):
            Bench(**{name: 0})


class TestTheLaw:
    def test_catching_up_under_a_budget(self):
        bench = Bench(max_num_batched_tokens=5)
        bench.add("a", 4)
        bench.add("b", 9)
        assert shares(bench.step()) == [("a", 0, 4), ("b", 0, 1)]
        assert shares(bench.step()) == [("a", 4, 1), ("b", 1, 4)]
        assert shares(bench.step()) == [("a", 5, 1), ("b", 5, 4)]

    def test_rows_are_asked_only_where_a_token_is_sampled(self):
        bench = Bench(max_num_batched_tokens=3)
        bench.add("a", 4)
        (first,) = bench.step().requests
        assert first.logit_offsets == first.targets == () and not first.samples
        (second,) = bench.step().requests
        assert second.logit_offsets == (0,) and second.targets == (SAMPLE,) and second.samples
        (third,) = bench.step().requests
        assert third.decodes and not second.decodes

    def test_no_more_than_max_num_seqs(self):
        bench = Bench(max_num_seqs=2)
        for name in "abc":
            bench.add(name)
        assert len(bench.step().requests) == 2
        assert bench.scheduler.num_running == 2 and bench.scheduler.num_waiting == 1
        bench.run()
        assert all(u.request.is_finished for u in bench.updates)

    def test_a_plan_is_complete_and_counts_itself(self):
        bench = Bench()
        bench.add("a", 5)
        plan = bench.scheduler.schedule()
        assert plan.num_tokens == 5 and plan.num_logit_rows == 1 and plan.step_id == 0
        assert list(plan.requests[0].token_ids) == [1, 2, 3, 4, 5]
        assert len(plan.requests[0].block_ids) == 3

    def test_nothing_to_do(self):
        bench = Bench()
        assert bench.scheduler.schedule() is None and not bench.scheduler.has_work


class TestOrder:
    def test_first_come_first_served(self):
        bench = Bench(max_num_seqs=1)
        late = bench.add("late", arrival=2.0)
        early = bench.add("early", arrival=1.0)
        bench.step()
        assert early.state is RequestState.RUNNING and late.state is RequestState.WAITING

    def test_ties_go_by_the_order_of_adding(self):
        bench = Bench()
        bench.add("a")
        bench.add("b")
        assert [s[0] for s in shares(bench.step())] == ["a", "b"]

    def test_priority_goes_first_and_takes_the_budget(self):
        bench = Bench(max_num_batched_tokens=4, enable_prefix_caching=False)
        bench.add("low", 4, priority=1)
        bench.step()
        bench.add("high", 6, priority=0)
        assert shares(bench.step()) == [("high", 0, 4)]
        assert shares(bench.step()) == [("high", 4, 2), ("low", 4, 1)]

    def test_priority_takes_a_seat(self):
        bench = Bench(max_num_seqs=1, enable_prefix_caching=False)
        low = bench.add("low", priority=1)
        bench.step()
        high = bench.add("high", priority=0)
        plan = bench.step()
        assert shares(plan) == [("high", 0, 4)] and plan.preempted == (low,)
        bench.run()
        assert low.output_token_ids == high.output_token_ids == (1, 2, 3, 4)

    def test_an_equal_never_takes_a_seat(self):
        bench = Bench(max_num_seqs=1)
        bench.add("a", arrival=5.0)
        bench.step()
        bench.add("b", arrival=1.0)
        assert [s[0] for s in shares(bench.step())] == ["a"]

    def test_priority_takes_blocks_from_the_lowest_latest_only(self):
        bench = Bench(num_blocks=8, enable_prefix_caching=False)
        a = bench.add("a", 4, priority=1)
        b = bench.add("b", 4, priority=2)
        c = bench.add("c", 4, priority=2)
        bench.step()
        bench.add("high", 4)
        assert bench.step().preempted == (c,)
        assert a.state is b.state is RequestState.RUNNING

    def test_nobody_is_preempted_in_vain(self):
        """The newcomer could not run even with every lower request's blocks."""
        bench = Bench(num_blocks=8, enable_prefix_caching=False)
        bench.add("top", 8, priority=0)
        low = bench.add("low", 4, priority=2)
        bench.step()
        bench.add("mid", 10, priority=1)
        assert bench.step().preempted == () and low.num_preemptions == 0


class TestPreemption:
    def test_the_output_is_kept_and_recomputed(self):
        bench = Bench(num_blocks=8, max_model_len=32, enable_prefix_caching=False)
        a = bench.add("a", 6, max_tokens=10)
        b = bench.add("b", [7, 8, 9, 10, 11, 12], max_tokens=10)
        preempted_with = None
        while not a.is_finished:
            plan = bench.step()
            if b in plan.preempted:
                preempted_with = b.output_token_ids
                assert b.block_ids == [] and b.num_computed == 0
        assert preempted_with
        bench.run()
        assert b.output_token_ids[: len(preempted_with)] == preempted_with
        assert a.num_preemptions == 0 and b.num_preemptions >= 1
        assert len(a.output_token_ids) == len(b.output_token_ids) == 10
        states = [s.state for s in b.timeline.segments]
        assert states[:4] == ["queued", "prefill", "decode", "preempted"]

    def test_recomputation_hits_what_is_still_cached(self):
        bench = Bench(max_num_seqs=1)
        low = bench.add("low", 8, priority=1)
        bench.step()
        bench.add("high", [9, 9], max_tokens=1)
        bench.step()
        assert shares(bench.step()) == [("low", 8, 1)]
        assert low.num_cached_tokens == 0  # counts the first admission alone

    def test_the_first_always_gets_on_in_a_pool_of_eight_blocks(self):
        bench = Bench(num_blocks=8, max_model_len=16, max_num_batched_tokens=16)
        requests = [bench.add(f"r{i}", [i + 1] * 5, max_tokens=11) for i in range(6)]
        order = []
        while bench.scheduler.has_work:
            first = min((r for r in requests if not r.is_finished), key=lambda r: r.order)
            before = first.num_computed
            bench.step()
            assert first.is_finished or first.num_computed > before
            order += [r.request_id for r in requests if r.is_finished and r.request_id not in order]
        assert order == [f"r{i}" for i in range(6)]

    def test_a_victim_is_not_in_the_step_it_gave_way_to(self):
        """It could be: of its blocks, copies of the winner's, it would need fewer now."""
        bench = Bench(num_blocks=7, max_model_len=14)
        bench.add("a", 5, max_tokens=9)
        b = bench.add("b", 5, max_tokens=9)
        plan = bench.step()
        while not plan.preempted:
            plan = bench.step()
        assert plan.preempted == (b,) and [s[0] for s in shares(plan)] == ["a"]
        assert [s[0] for s in shares(bench.step())] == ["a", "b"]
        bench.run()

    def test_admission_leaves_room_to_grow(self):
        """Without a watermark `b` would be admitted into the last blocks and preempted at once."""
        bench = Bench(num_blocks=4, enable_prefix_caching=False)
        a = bench.add("a", 4, max_tokens=4)
        b = bench.add("b", [7, 8, 9, 10], max_tokens=1)
        bench.step()
        assert b.state is RequestState.WAITING
        bench.run()
        assert a.num_preemptions == b.num_preemptions == 0


def test_the_naive_truth_agrees_on_a_plain_case():
    """The simulator's oracle itself, once by hand."""
    script = Script(base=0)
    params = SamplingParams(max_tokens=30, stop=["ab"])
    whole = truth(script, params, 30, frozenset({EOS}))
    said = [script.token(i) for i in range(30)]
    assert list(whole.tokens) == said[: len(whole.tokens)]
    assert "ab" not in whole.text


def test_a_long_random_mixture_conserves_blocks():
    rng = random.Random(5)
    bench = Bench(num_blocks=10, max_model_len=20, max_num_seqs=4)
    for i in range(200):
        prompt = [rng.randrange(1, 4) for _ in range(rng.randrange(1, 12))]
        if bench.scheduler.num_waiting < 20:
            bench.add(f"r{i}", prompt, max_tokens=rng.randrange(1, 8), priority=rng.randrange(3))
        bench.step()
    bench.run(2000)
    assert bench.scheduler.stats().owned_blocks == 0
