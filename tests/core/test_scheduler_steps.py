"""What steps keep from one to the next: rosters, quiet requests, a step in flight."""

import pytest

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.detokenize import TextStream
from engineroom.engine.core.plan import StepOutcome
from engineroom.engine.core.request import PENDING
from engineroom.engine.core.sampling_params import SamplingParams
from tests.core.bench import BANNED, Bench, shares
from tests.core.fakes import EOS, token_bytes


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
