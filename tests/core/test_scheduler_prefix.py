"""What requests share of the KV cache, and what a prompt's logprobs take no share of."""

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.plan import SAMPLE, StepOutcome
from engineroom.engine.core.sampling_params import SamplingParams
from tests.core.bench import Bench, shares


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
