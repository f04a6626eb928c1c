"""How requests end: by what they say, by an abort, by a fault."""

import pytest

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.detokenize import TextStream
from engineroom.engine.core.plan import StepOutcome
from engineroom.engine.core.sampling_params import SamplingParams
from tests.core.bench import BANNED, Bench
from tests.core.fakes import EOS, token_bytes


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
