"""The scheduler, one rule at a time; any mixture of them is test_simulation's."""

import random

import pytest

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.detokenize import TextStream
from engineroom.engine.core.plan import SAMPLE, StepOutcome
from engineroom.engine.core.request import PENDING, Request, RequestState
from engineroom.engine.core.sampling_params import SamplingParams
from engineroom.engine.core.scheduler import Scheduler, SchedulerConfig
from tests.core.fakes import EOS, FakeDevice, Script, token_bytes, truth

BANNED = -1


class Bench:
    """A scheduler with a fake device; every commit checks the books."""

    def __init__(self, fault=None, **limits):
        defaults = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 64,
            "num_blocks": 32,
            "block_size": 2,
        }
        self.config = SchedulerConfig(**{**defaults, **limits})
        self.now = 0.0
        self.scheduler = Scheduler(self.config, clock=self.clock, fault=fault)
        self.device = FakeDevice(self.config.num_blocks, self.config.block_size)
        self.updates = []

    def clock(self):
        self.now += 1.0
        return self.now

    def request(self, name="r", prompt=4, *, max_tokens=4, tokens=None, **options):
        """`prompt`: token ids, or how many; `tokens`: what the model will say, else never EOS."""
        ids = list(range(1, prompt + 1)) if isinstance(prompt, int) else prompt
        params = options.pop("params", None) or SamplingParams(max_tokens=max_tokens)
        request = Request(
            request_id=name,
            prompt_token_ids=ids,
            params=params,
            max_tokens=max_tokens,
            seed=0,
            eos_token_ids=frozenset({EOS}),
            **options,
        )
        said = tokens if tokens is not None else [1 + i % 5 for i in range(max_tokens + 2)]
        self.device.scripts[request] = Said(said)
        return request

    def add(self, *args, **options):
        request = self.request(*args, **options)
        self.scheduler.add(request)
        return request

    def step(self):
        """Plan and commit one step; returns the plan."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self.commit(plan)
        return plan

    def commit(self, plan):
        self.updates += self.scheduler.commit(plan, self.device.execute(plan))
        self.scheduler.check_integrity()

    def run(self, limit=500):
        while self.scheduler.has_work:
            limit -= 1
            assert limit, "never ends"
            self.step()
            self.updates += self.scheduler.drain_finished()
        return self

    def of(self, request):
        return [u for u in self.updates if u.request is request]


class Said:
    def __init__(self, tokens):
        self.tokens = tokens

    def token(self, index):
        return self.tokens[index]


def shares(plan):
    """[(request id, start, number of tokens)] of a plan."""
    return [(s.request.request_id, s.start, s.num_tokens) for s in plan.requests]


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


class TestPrefix:
    def test_a_hit_leaves_a_token_to_compute(self):
        bench = Bench()
        bench.add("a", 8, max_tokens=1)
        bench.run()
        b = bench.add("b", 8, max_tokens=1)
        assert shares(bench.step()) == [("b", 6, 2)]
        assert b.num_cached_tokens == 6
        c = bench.add("c", [*range(1, 9), 5], max_tokens=1)
        assert shares(bench.step()) == [("c", 8, 1)] and c.num_cached_tokens == 8
        assert bench.scheduler.stats().num_cached_tokens == 14

    def test_output_is_hit_too(self):
        bench = Bench()
        a = bench.add("a", 4, max_tokens=5)
        bench.run()
        turn = [*range(1, 5), *a.output_token_ids, 9]
        bench.add("b", turn, max_tokens=1)
        assert shares(bench.step()) == [("b", 8, 2)]

    def test_another_salt_or_adapter_is_another_world(self):
        bench = Bench()
        bench.add("a", 8, max_tokens=1)
        bench.run()
        for name, scope in {"b": {"cache_salt": b"x"}, "c": {"adapter": 1}}.items():
            bench.add(name, 8, max_tokens=1, **scope)
            assert shares(bench.step()) == [(name, 0, 8)]

    def test_off(self):
        bench = Bench(enable_prefix_caching=False)
        for name in "ab":
            bench.add(name, 8, max_tokens=1)
            assert shares(bench.step()) == [(name, 0, 8)]
        assert bench.scheduler.stats().cached_blocks == 0

    def test_shared_blocks_are_shared(self):
        bench = Bench()
        bench.add("a", 8, max_tokens=1)
        bench.run()
        b, c = bench.add("b", 8), bench.add("c", 8)
        bench.step()
        assert b.block_ids[:3] == c.block_ids[:3] and b.block_ids[3] != c.block_ids[3]


class TestFollowers:
    def group(self, bench, prompt=8, n=3):
        leader = bench.request("g", prompt)
        followers = [bench.request("g", prompt, sample_index=i, leader=leader) for i in range(1, n)]
        bench.scheduler.add(leader, *followers)
        return leader, followers

    def test_they_wait_for_the_leader_and_hit(self):
        bench = Bench(max_num_batched_tokens=5)
        _, followers = self.group(bench)
        assert shares(bench.step()) == [("g", 0, 5)] and bench.scheduler.num_waiting == 2
        bench.step()
        bench.step()
        assert [f.num_cached_tokens for f in followers] == [6, 6]
        bench.run()
        assert all(f.finish_reason is FinishReason.LENGTH for f in followers)

    def test_without_caching_they_do_not_wait(self):
        bench = Bench(enable_prefix_caching=False)
        self.group(bench)
        assert len(bench.step().requests) == 3

    def test_a_prompt_without_a_whole_block_is_not_waited_for(self):
        bench = Bench()
        self.group(bench, prompt=2)
        assert len(bench.step().requests) == 3

    def test_the_leader_may_end_first(self):
        bench = Bench(max_num_batched_tokens=5)
        leader, followers = self.group(bench)
        plan = bench.scheduler.schedule()
        outcome = StepOutcome([0] * plan.num_logit_rows, errors={0: "bad luck"})
        (update,) = bench.scheduler.commit(plan, outcome)
        assert update.request is leader and leader.error == "bad luck"
        bench.run()
        assert all(f.finish_reason is FinishReason.LENGTH for f in followers)

    def test_abort_reaches_the_parked(self):
        bench = Bench()
        _, followers = self.group(bench)
        assert bench.scheduler.abort("g") == 3
        bench.scheduler.check_integrity()
        assert bench.scheduler.num_waiting == 0
        assert len(bench.scheduler.drain_finished()) == 3
        assert all(f.finish_reason is FinishReason.ABORT for f in followers)


class TestPromptLogprobs:
    def add(self, bench, name="p", prompt=10, max_tokens=6, **options):
        params = SamplingParams(
            max_tokens=max_tokens, prompt_logprobs=0, **({} if max_tokens else {"echo": True})
        )
        return bench.add(name, prompt, max_tokens=max_tokens, params=params, **options)

    def check(self, bench, request):
        emitted = [e for u in bench.of(request) for e in u.new_prompt_logprobs]
        assert [e.token_id for e in emitted] == list(request.prompt_token_ids[1:])
        assert request.prompt_logprobs == emitted

    def test_each_once_in_chunks_of_rows(self):
        bench = Bench(max_prompt_logprob_rows=4)
        request = self.add(bench)
        bench.add("q", [9, 9], max_tokens=3)
        plans = [bench.step() for _ in range(3)]
        assert [shares(p)[0] for p in plans] == [("p", 0, 4), ("p", 4, 4), ("p", 8, 2)]
        assert plans[0].requests[0].targets == (2, 3, 4, 5)
        assert plans[2].requests[0].targets == (10, SAMPLE)
        self.check(bench.run(), request)

    def test_rows_are_shared_among_requests(self):
        bench = Bench(max_prompt_logprob_rows=6)
        a, b = self.add(bench, "a"), self.add(bench, "b", prompt=[7] * 10)
        assert shares(bench.step()) == [("a", 0, 6)]
        assert shares(bench.step()) == [("a", 6, 4), ("b", 0, 3)]
        self.check(bench.run(), a)
        self.check(bench, b)

    def test_each_once_across_preemption(self):
        bench = Bench(max_num_seqs=1, max_prompt_logprob_rows=4)
        request = self.add(bench, priority=1)
        bench.step()
        bench.add("high", [9], max_tokens=1)
        bench.step()
        assert request.num_preemptions == 1 and len(request.prompt_logprobs) == 4
        plan = bench.step()  # positions 0..3 are hit: their logprobs are out
        assert shares(plan) == [("p", 4, 4)] and plan.requests[0].targets == (6, 7, 8, 9)
        self.check(bench.run(), request)

    def test_rows_already_out_are_recomputed_without_rows(self):
        bench = Bench(max_num_seqs=1, max_prompt_logprob_rows=4, enable_prefix_caching=False)
        request = self.add(bench, priority=1)
        bench.step()
        bench.add("high", [9], max_tokens=1)
        bench.step()
        plan = bench.step()
        assert shares(plan) == [("p", 0, 8)]
        assert plan.requests[0].logit_offsets == (4, 5, 6, 7)
        self.check(bench.run(), request)

    def test_no_hit_but_published(self):
        bench = Bench()
        bench.add("a", 10, max_tokens=1)
        bench.run()
        request = self.add(bench, cache_salt=b"")
        assert shares(bench.step()) == [("p", 0, 10)]
        self.check(bench.run(), request)
        bench2 = Bench()
        self.add(bench2)
        bench2.run()
        bench2.add("b", 10, max_tokens=1)
        assert shares(bench2.step()) == [("b", 8, 2)]

    def test_scoring_alone_generates_nothing(self):
        bench = Bench(max_prompt_logprob_rows=4)
        request = self.add(bench, max_tokens=0)
        bench.run()
        self.check(bench, request)
        assert request.finish_reason is FinishReason.LENGTH and request.output_token_ids == ()

    def test_only_the_leader_scores(self):
        bench = Bench()
        leader = self.add(bench)
        follower = self.add(bench, sample_index=1, leader=leader)
        bench.run()
        assert len(leader.prompt_logprobs) == 9 and follower.prompt_logprobs == []


class TestEnds:
    def end(self, tokens, max_tokens=6, bench=None, **options):
        bench = bench or Bench()
        params = SamplingParams(max_tokens=max_tokens, **options)
        text = TextStream(
            token_bytes,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            min_tokens=params.min_tokens,
        )
        request = bench.add("e", 3, max_tokens=max_tokens, params=params, text=text, tokens=tokens)
        bench.run()
        deltas = "".join(u.text_delta for u in bench.of(request))
        assert deltas == text.text
        assert [u.finished for u in bench.of(request)].count(True) == 1
        got = tuple(t for u in bench.of(request) for t in u.new_token_ids)
        assert got == request.output_token_ids
        return request

    def test_max_tokens_of_one(self):
        request = self.end([1], max_tokens=1)
        assert request.finish_reason is FinishReason.LENGTH and request.text.text == "a"

    def test_eos(self):
        request = self.end([1, EOS])
        assert request.finish_reason is FinishReason.STOP and request.stop_reason is None
        assert request.output_token_ids == (1, EOS)

    def test_ignore_eos(self):
        request = self.end([1, EOS, 1], max_tokens=3, ignore_eos=True)
        assert request.finish_reason is FinishReason.LENGTH

    def test_a_stop_token_does_not_show(self):
        request = self.end([1, 2], stop_token_ids=[2])
        assert request.stop_reason == 2 and request.text.text == "a"
        request = self.end([1, 2], stop_token_ids=[2], include_stop_str_in_output=True)
        assert request.text.text == "ab"

    def test_a_stop_string(self):
        request = self.end([5, 1, 13, 14, 1], stop=["xxy"])
        assert request.stop_reason == "xxy" and request.text.text == " a"
        assert request.output_token_ids == (5, 1, 13, 14)

    def test_a_stop_string_on_the_last_token(self):
        request = self.end([1, 2], max_tokens=2, stop=["ab"])
        assert request.finish_reason is FinishReason.STOP and request.text.text == ""

    def test_held_text_and_a_cut_character_come_out(self):
        request = self.end([1, 9], max_tokens=2, stop=["aaa"])
        assert request.text.text == "a\ufffd" and request.finish_reason is FinishReason.LENGTH

    def test_min_tokens(self):
        request = self.end([EOS, 1, 2, EOS], min_tokens=3, stop=["a"])
        assert request.output_token_ids == (EOS, 1, 2, EOS)

    def test_nothing_allowed(self):
        request = self.end([1, BANNED])
        assert request.finish_reason is FinishReason.ERROR and request.output_token_ids == (1,)
        assert "no token is allowed" in request.error

    def test_a_broken_detokeniser_ends_one_request(self):
        bench = Bench()
        good = bench.add("good", 3)

        def broken(token):
            raise KeyError(token)

        bad = bench.add("bad", [9, 9], text=TextStream(broken))
        bench.run()
        assert bad.finish_reason is FinishReason.ERROR and "KeyError" in bad.error
        assert good.finish_reason is FinishReason.LENGTH

    def test_an_error_of_the_step_ends_one_request(self):
        bench = Bench()
        good, bad = bench.add("good", 3), bench.add("bad", [9, 9])
        plan = bench.scheduler.schedule()
        tokens = bench.device.execute(plan).token_ids
        outcome = StepOutcome(tokens, errors={1: "processor raised"})
        updates = bench.scheduler.commit(plan, outcome)
        assert {u.request: u.finished for u in updates} == {good: False, bad: True}
        assert bad.error == "processor raised"
        bench.scheduler.check_integrity()

    def test_logprobs(self):
        bench = Bench()
        request = bench.add("l", 3, max_tokens=3, params=SamplingParams(max_tokens=3, logprobs=0))
        bench.run()
        assert [e.token_id for e in request.logprobs] == [1, 2, 3]
        assert [u.new_logprobs for u in bench.of(request)] == [(e,) for e in request.logprobs]

    def test_ending_frees_everything(self):
        bench = Bench()
        for i in range(20):
            bench.add(f"r{i}", [i % 3 + 1] * (i + 1), max_tokens=i % 4 + 1)
        bench.run()
        stats = bench.scheduler.stats()
        assert stats.owned_blocks == stats.num_running == stats.num_waiting == 0
        assert stats.free_blocks + stats.cached_blocks == 32
        assert stats.num_accepted == stats.num_finished == 20


class TestAbort:
    def test_unknown(self):
        assert Bench().scheduler.abort("nobody") == 0

    def test_waiting(self):
        bench = Bench()
        request = bench.add()
        assert bench.scheduler.abort("r") == 1 and bench.scheduler.abort("r") == 0
        bench.scheduler.check_integrity()
        (update,) = bench.scheduler.drain_finished()
        assert update.request is request and update.finished
        assert request.finish_reason is FinishReason.ABORT
        assert bench.scheduler.drain_finished() == [] and not bench.scheduler.has_work

    def test_running_frees_at_once(self):
        bench = Bench()
        bench.add()
        bench.step()
        bench.scheduler.abort("r")
        assert bench.scheduler.stats().owned_blocks == 0

    def test_in_flight_settles_at_commit(self):
        bench = Bench()
        request = bench.add()
        bench.step()
        plan = bench.scheduler.schedule()
        bench.scheduler.abort("r")
        bench.scheduler.check_integrity()
        assert bench.scheduler.stats().owned_blocks > 0
        assert request.output_token_ids == (1,)
        bench.commit(plan)
        assert [u.finished for u in bench.of(request)] == [False, True]
        assert request.output_token_ids == (1,)
        assert bench.scheduler.stats().owned_blocks == 0 and not bench.scheduler.has_work

    def test_after_the_end(self):
        bench = Bench()
        bench.add()
        bench.run()
        assert bench.scheduler.abort("r") == 0 and bench.scheduler.drain_finished() == []

    def test_preempted(self):
        bench = Bench(max_num_seqs=1)
        low = bench.add("low", priority=1)
        bench.step()
        bench.add("high")
        bench.step()
        assert bench.scheduler.abort("low") == 1
        bench.run()
        assert low.finish_reason is FinishReason.ABORT

    def test_text_held_back_stays_back(self):
        bench = Bench()
        text = TextStream(token_bytes, stop=("aaaa",))
        bench.add("t", 3, text=text, tokens=[1, 1, 1, 1])
        bench.step()
        bench.scheduler.abort("t")
        (update,) = bench.scheduler.drain_finished()
        assert update.text_delta == text.text == ""

    def test_the_id_is_free_again(self):
        bench = Bench()
        bench.add("a")
        plan = bench.scheduler.schedule()
        bench.scheduler.abort("a")
        again = bench.add("a")
        bench.commit(plan)
        bench.run()
        assert again.finish_reason is FinishReason.LENGTH

    def test_many_aborts_do_not_pile_up(self):
        bench = Bench(max_num_seqs=1)
        bench.add("long", 4, max_tokens=40)
        bench.step()
        for i in range(2000):
            bench.add(f"r{i}")
            bench.scheduler.abort(f"r{i}")
            bench.scheduler.drain_finished()
        assert bench.scheduler._waiting._num_entries < 200
        assert sum(map(len, bench.scheduler._waiting._heaps.values())) < 200

    def test_fail(self):
        bench = Bench()
        request = bench.add()
        bench.scheduler.fail("r", "the template broke")
        bench.scheduler.fail("nobody", "x")
        bench.run()
        assert request.finish_reason is FinishReason.ERROR
        assert request.error == "the template broke"


class TestRoster:
    def test_it_stays_while_the_same_requests_decode(self):
        bench = Bench()
        bench.add("a", 3, max_tokens=8)
        first = bench.step()
        second, third = bench.step(), bench.step()
        assert second.roster is third.roster is not first.roster
        assert (second.starts, third.starts) == ((3,), (4,))
        bench.add("b", 3)
        assert bench.step().roster is not third.roster
        assert bench.step().roster.log_entries == (("a", 0, 1, "decode"), ("b", 0, 1, "decode"))

    def test_a_request_that_comes_back_begins_a_new_one(self):
        """Even where it goes on at the place where it was: its table is another."""
        armed = []
        bench = Bench(fault=lambda _: bool(armed), block_size=1, num_blocks=8)
        request = bench.add("a", 3, max_tokens=5, priority=1)
        bench.step()
        before = bench.step()
        bench.add("b", 7, max_tokens=1)
        armed.append(True)
        assert bench.scheduler.schedule() is None and request.num_preemptions == 1
        armed.clear()
        bench.scheduler.abort("b")
        after = bench.step()
        assert after.roster.requests == before.roster.requests
        assert after.roster.shares == before.roster.shares and after.starts == (4,)
        assert after.roster is not before.roster
        assert after.roster.tables[0] is request.block_ids


class TestQuiet:
    """A request that nobody reads before its end."""

    def pair(self, **options):
        """The same request twice, read as it grows and quiet; both have ended."""
        bench, out = Bench(), []
        for name in ("read", "quiet"):
            text = TextStream(token_bytes, skip_ids=frozenset({5}))
            out.append(bench.add(name, [7, 7], text=text, final_only=name == "quiet", **options))
        bench.run()
        return bench, *out

    @pytest.mark.parametrize(
        ("tokens", "params"),
        [
            ([1, 6, 7, 5, 2, 11], SamplingParams(max_tokens=6)),
            ([1, 6, 9], SamplingParams(max_tokens=3)),  # ends within a character
            ([1, 2, EOS], SamplingParams(max_tokens=6)),
            ([1, 3, 2], SamplingParams(max_tokens=6, stop_token_ids=(3,))),
            (
                [3, 1, 3],
                SamplingParams(
                    max_tokens=6,
                    min_tokens=2,
                    stop_token_ids=(3,),
                    include_stop_str_in_output=True,
                ),
            ),
            ([1, 2, BANNED], SamplingParams(max_tokens=6)),
        ],
    )
    def test_it_ends_like_any_other(self, tokens, params):
        bench, read, quiet = self.pair(tokens=tokens, params=params, max_tokens=params.max_tokens)
        assert quiet.quiet and not read.quiet
        for name in ("output_token_ids", "finish_reason", "stop_reason", "error"):
            assert getattr(quiet, name) == getattr(read, name), name
        assert quiet.text.text == read.text.text
        (update,) = bench.of(quiet)
        assert update.finished and update.new_token_ids == quiet.output_token_ids
        assert update.text_delta == quiet.text.text
        assert bench.scheduler.num_generated_tokens == 2 * len(read.output_token_ids)

    def test_what_an_abort_cuts_short_keeps_its_text(self):
        bench = Bench()
        text = TextStream(token_bytes)
        bench.add("q", 3, text=text, tokens=[1, 2, 6, 1], final_only=True)
        for _ in range(3):
            bench.step()
        bench.scheduler.abort("q")
        (update,) = bench.scheduler.drain_finished()
        assert update.text_delta == text.text == "ab"  # and no part of a character

    def test_a_broken_detokeniser_ends_it_with_its_error(self):
        def broken(token):
            raise KeyError(token)

        bench = Bench()
        request = bench.add("q", 3, text=TextStream(broken), final_only=True)
        bench.run()
        assert request.finish_reason is FinishReason.ERROR and "KeyError" in request.error
        assert request.stop_reason is None

    def test_who_asks_for_more_than_tokens_and_text_is_not(self):
        bench = Bench()
        for name, params in enumerate(
            (
                SamplingParams(stop=("ab",)),
                SamplingParams(logprobs=0),
                SamplingParams(prompt_logprobs=0),
                SamplingParams(n=1, best_of=2),
            )
        ):
            assert not bench.request(str(name), params=params, final_only=True).quiet


class TestInFlight:
    def test_the_pending_token_is_counted_and_filled(self):
        bench = Bench()
        request = bench.add("a", 3)
        first = bench.scheduler.schedule()
        assert request.num_tokens == 4 and request.output_token_ids == ()
        second = bench.scheduler.schedule()
        assert list(second.requests[0].token_ids) == [PENDING]
        bench.scheduler.check_integrity()
        with pytest.raises(RuntimeError, match="in flight"):
            bench.scheduler.schedule()
        with pytest.raises(RuntimeError, match="oldest"):
            bench.scheduler.commit(second, StepOutcome([1]))
        bench.commit(first)
        assert request.output_token_ids == (1,) and request.num_pending == 1
        bench.commit(second)
        assert request.output_token_ids == (1, 2)

    def test_a_token_past_a_stop_is_dropped_and_blocks_wait_for_its_step(self):
        bench = Bench()
        request = bench.add("a", 4, tokens=[EOS, 1])
        first, second = bench.scheduler.schedule(), bench.scheduler.schedule()
        bench.commit(first)
        assert request.is_finished and bench.scheduler.stats().owned_blocks > 0
        bench.commit(second)
        assert request.output_token_ids == (EOS,)
        assert bench.scheduler.stats().owned_blocks == 0
        assert [u.finished for u in bench.of(request)] == [True]

    def test_nothing_is_planned_past_max_tokens(self):
        bench = Bench()
        bench.add("a", 4, max_tokens=1)
        assert bench.scheduler.schedule() is not None
        assert bench.scheduler.schedule() is None

    def test_a_request_whose_sampling_reads_its_history_is_planned_all_the_same(self):
        """Its forward pass needs the token in flight alone; see Runner.sample for the rest."""
        bench = Bench()
        bench.add("p", 3, params=SamplingParams(presence_penalty=1.0))
        bench.add("q", [9, 9])
        first, second = bench.scheduler.schedule(), bench.scheduler.schedule()
        assert [s[0] for s in shares(first)] == ["p", "q"]
        assert [s[0] for s in shares(second)] == ["p", "q"]

    def test_victims_in_flight_are_let_land(self):
        """The first in the order may not starve behind victims that are always in flight."""
        bench = Bench(num_blocks=8, block_size=8, max_num_batched_tokens=2)
        a = bench.add("a", 7, max_tokens=30)
        b = bench.add("b", 40, max_tokens=2)  # in flight in every step, one token at a time
        flight, steps = [], 0
        while not a.is_finished:
            steps += 1
            assert steps < 45
            plan = bench.scheduler.schedule()
            if plan is not None:
                flight.append(plan)
            if plan is None or len(flight) == 2:
                bench.commit(flight.pop(0))
        assert b.num_preemptions == 1

    def test_a_wrong_shape_changes_nothing(self):
        bench = Bench()
        request = bench.add("a", 3)
        plan = bench.scheduler.schedule()
        for tokens in ([], [1, 2]):
            with pytest.raises(ValueError, match="step 0"):
                bench.scheduler.commit(plan, StepOutcome(tokens))
        bench.scheduler.check_integrity()
        bench.commit(plan)
        assert request.output_token_ids == (1,)


class TestFaults:
    @pytest.mark.parametrize("nth", range(12))
    def test_the_nth_allocation_fails(self, nth):
        calls = []

        def fault(point):
            calls.append(point)
            return len(calls) - 1 == nth

        bench = Bench(fault=fault, num_blocks=8, max_model_len=16)
        requests = [bench.add(f"r{i}", 4, max_tokens=6, priority=-i) for i in range(3)]
        bench.run()
        assert all(r.output_token_ids == (1, 2, 3, 4, 5, 1) for r in requests)
        assert len(calls) > nth

    def test_while_refused_nothing_runs_and_nothing_is_lost(self):
        refuse = True
        bench = Bench(fault=lambda point: refuse)
        request = bench.add()
        for _ in range(5):
            assert bench.scheduler.schedule() is None
            bench.scheduler.check_integrity()
        refuse = False
        bench.run()
        assert request.finish_reason is FinishReason.LENGTH


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
