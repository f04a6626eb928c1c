"""What requests cost: shares and idle are all that the meter counts, to the last nanojoule."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from engineroom import LLM, SamplingParams
from engineroom.engine.account.ledger import Ledger, Prices
from engineroom.engine.config import ConfigError
from engineroom.engine.core.outputs import OutputGroup
from engineroom.engine.core.plan import DECODE, Roster, Share, StepPlan
from engineroom.engine.core.request import Request
from tests.counts import count
from tests.engine.late import late_backends
from tests.engine.test_overlap import FORMS, ROOMY, TIGHT, draw

STEPS = 70  # with a new fit of the rates among them
GREEDY = SamplingParams(temperature=0, seed=0, max_tokens=12, ignore_eos=True)


class Jumpy:
    """A meter whose counter jumps by anything between two readings, nothing included."""

    name, estimated = "jumpy", False

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.now = 10**12

    def read(self) -> int:
        self.now += self._rng.choice((0, 1, 7, 1000, self._rng.randrange(10**9)))
        return self.now

    def close(self) -> None:
        pass


def nanojoules(joules: float) -> int:
    return round(joules * 1e9)


@pytest.mark.parametrize("form", ["plain", *FORMS])
@pytest.mark.parametrize("options", [TIGHT, ROOMY], ids=["tight", "roomy"])
def test_shares_and_idle_are_all_the_meter_counts(
    form: str, options: dict, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With preemptions, aborts, prefix hits, samples of one prompt, idle turns, reused ids."""
    if form == "plain":
        llm = LLM(str(golden_model), device="cpu", **options)
    else:
        with late_backends(monkeypatch, **FORMS[form]):
            llm = LLM(str(golden_model), device="cpu", **options)
    engine, idle = llm.engine, 0
    for seed in range(count(reduced=6, full=200)):
        rng = random.Random(seed)
        meter = Jumpy(seed)
        start = meter.now
        engine.ledger = ledger = Ledger(meter)
        start = ledger._start
        asked = draw(rng)
        told: dict[str, int] = {}
        answered = 0
        turn = 0
        while turn <= 12 or engine.has_work:
            for a in asked:
                if a.comes == turn:
                    engine.add_request(a.request_id, a.prompt, a.params, priority=a.priority)
                    told[a.request_id] = 0
                if a.aborted == turn:
                    engine.abort(a.request_id)
            for output in engine.step():
                share = nanojoules(output.cost.joules)
                assert share >= told[output.request_id], "a cost went down"
                told[output.request_id] = share
                if output.finished and rng.random() < 0.2:  # the id is another's from now on
                    answered += told.pop(output.request_id)
                    again = SamplingParams(max_tokens=2, seed=1)
                    engine.add_request(output.request_id, [1, 2, 3], again)
                    told[output.request_id] = 0
            turn += 1
        shared = answered + sum(told.values())
        assert shared + ledger.idle == ledger.total, f"seed {seed}"
        assert ledger.total == meter.now - start, f"seed {seed}"
        assert shared > 0
        idle += ledger.idle
    assert idle > 0
    llm.close()


def test_when_costs_are_asked_for_changes_them_by_roundings_alone() -> None:
    """After every step, or at the end of many: by a nanojoule for each time that was asked."""
    for seed in range(count(reduced=20, full=500)):
        rng = random.Random(seed)
        params = SamplingParams(max_tokens=5)
        requests = [
            Request(request_id=str(i), prompt_token_ids=[1], params=params, max_tokens=5, seed=0)
            for i in range(rng.randrange(1, 6))
        ]
        shares = [rng.choice((DECODE, Share(7, (), ()))) for _ in requests]
        roster = Roster(tuple(requests), tuple(shares), tuple([] for _ in requests))
        starts = [rng.randrange(9000) for _ in requests]
        often, late = (Ledger(Jumpy(seed), clock_ns=Jumpy(seed + 1).read) for _ in range(2))
        told = []
        for ledger in (often, late):
            groups = {
                r.request_id: OutputGroup(
                    r.request_id,
                    prompt=None,
                    echo_text="",
                    params=params,
                    samples=[r],
                    decode_token=str,
                )
                for r in requests
            }
            ledger.begin()
            begun = ledger.total
            for step in range(STEPS):
                now = [s + step * share.num_tokens for s, share in zip(starts, shares, strict=True)]
                plan = StepPlan(step, roster, now, [1] * roster.num_tokens)
                ledger.charge(plan, groups, 0.001 * len(requests))
                if ledger is often:
                    ledger.cost(groups["0"])
            ledger.cost(groups["0"])
            told.append([(g.nanojoules, g.nanoseconds) for g in groups.values()])
            assert sum(joules for joules, _ in told[-1]) == ledger.total - begun
        assert sum(spent for _, spent in told[0]) == sum(spent for _, spent in told[1])
        for one, other in zip(*told, strict=True):
            assert abs(one[0] - other[0]) <= STEPS and abs(one[1] - other[1]) <= STEPS


def test_a_share_is_as_large_as_the_work() -> None:
    """Of two that decode, against the model's own words, over steps in which the past grows."""
    params = SamplingParams(max_tokens=5)
    near, far = (
        Request(request_id=i, prompt_token_ids=[1], params=params, max_tokens=5, seed=0)
        for i in "nf"
    )
    ledger = Ledger(Steady(0))
    step, token, position = ledger._rates.rates
    roster = Roster((near, far), (DECODE, DECODE), ([], []))
    groups = {
        r.request_id: OutputGroup(
            r.request_id, prompt=None, echo_text="", params=params, samples=[r], decode_token=str
        )
        for r in (near, far)
    }
    ledger.begin()
    before, expected = ledger.total, 0.0
    for n in range(40):
        ledger.charge(StepPlan(n, roster, [n, 5000 + n], [1, 1]), groups, 0.01)
        works = [step // 2 + token + position * (start + 1) for start in (n, 5000 + n)]
        expected += (ledger.total - before) * works[1] / sum(works)
        before = ledger.total
    ledger.cost(groups["f"])
    assert groups["f"].nanojoules == pytest.approx(expected, rel=1e-9)


def test_what_an_ended_request_still_had_in_flight_is_nobodys(
    golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even of a request that took its id."""
    with late_backends(monkeypatch, **FORMS["on demand"]):
        llm = LLM(str(golden_model), device="cpu")
    engine = llm.engine
    engine.ledger = ledger = Ledger(Steady(0))
    engine.add_request("a", [1, 2, 3], GREEDY.replace(stop_token_ids=tuple(range(250))))
    while not (outputs := engine.step()):
        pass
    assert outputs[0].finished and engine._in_flight
    before, spent = ledger.idle, outputs[0].cost.joules
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.abort("a")
    (other,) = engine.step()
    assert other.cost.joules == 0 and ledger.idle > before
    assert nanojoules(spent) + ledger.idle == ledger.total
    llm.close()


@pytest.fixture
def llm(make_llm: Any) -> LLM:
    return make_llm(device="cpu", max_num_seqs=32, price_per_kwh=0.36, grams_per_kwh=360)


class Steady(Jumpy):
    """A joule a reading."""

    def read(self) -> int:
        self.now += 10**9
        return self.now


@pytest.mark.parametrize(("pause_ns", "idle"), [(999_999, 2), (1_000_000, 5)])
def test_what_passes_in_a_long_pause_between_turns_is_nobodys(
    llm: LLM, pause_ns: int, idle: int
) -> None:
    engine = llm.engine
    now = itertools.count(0, pause_ns)
    engine.ledger = ledger = Ledger(Steady(0), clock_ns=lambda: next(now))
    engine.add_request("a", [1, 2, 3], GREEDY.replace(max_tokens=4))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    # Every turn reads once, for the request; before the first, behind the last and in each long
    # pause the meter is read for nobody.
    assert [o.cost.joules for o in outputs] == [1, 2, 3, 4]
    assert ledger.idle == idle * 10**9


def test_a_request_pays_for_what_it_computes(llm: LLM) -> None:
    """A longer prompt more than a short one, a prefix found in the cache next to nothing."""
    llm.engine.ledger = Ledger(Steady(0))
    params = GREEDY.replace(max_tokens=1)
    long, short = llm.generate([[5] * 200, [6] * 10], params, use_tqdm=False)
    assert long.cost.joules > 5 * short.cost.joules > 0
    (again, other) = llm.generate([[5] * 200, [7] * 150], params, use_tqdm=False)
    assert again.usage.cached_tokens > 150
    assert other.cost.joules > 4 * again.cost.joules


def test_money_and_grams_follow_from_the_prices(llm: LLM) -> None:
    (out,) = llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    cost = out.cost
    assert cost.joules > 0 and cost.estimated
    assert cost.money == pytest.approx(cost.joules * 0.36 / 3.6e6)
    assert cost.grams == pytest.approx(cost.joules * 360 / 3.6e6)
    llm.engine.ledger = Ledger(Steady(0), Prices(price_per_hour=3.6), clock_ns=Steady(0).read)
    (out,) = llm.generate([[1, 2]], GREEDY.replace(max_tokens=1), use_tqdm=False)
    assert out.cost.money == pytest.approx(0.001) and out.cost.grams is None
    llm.engine.ledger = Ledger(Steady(0))
    (out,) = llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    assert out.cost.money is None and out.cost.grams is None


def test_a_meter_that_fails_ends_the_counting_and_not_the_request(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    class Dying(Steady):
        def read(self) -> int:
            if self.now > 10**12 + 9 * 10**9:
                raise OSError("gone")
            return super().read()

    llm.engine.ledger = Ledger(Dying(0))
    (out,) = llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    assert len(out.outputs[0].token_ids) == 12 and out.cost is None
    assert [r.getMessage() for r in caplog.records] == ["jumpy: gone; costs are no longer told"]


def test_the_meter_that_is_asked_for_is_the_one_or_none(golden_model: Any) -> None:
    with pytest.raises(ConfigError, match="energy_meter must be one of"):
        LLM(str(golden_model), energy_meter="ammeter")
    with pytest.raises(ConfigError, match=r"energy_meter='nvml' cannot be had here: NVML"):
        LLM(str(golden_model), device="cpu", energy_meter="nvml")
    for value in (-1.0, float("nan"), True, "3"):
        with pytest.raises(ConfigError, match="price_per_kwh must be a number"):
            LLM(str(golden_model), price_per_kwh=value)


def test_stats_name_the_meter(llm: LLM) -> None:
    llm.generate([[1, 2]], GREEDY, use_tqdm=False)
    energy = llm.stats().energy
    assert energy.joules >= energy.idle_joules > 0
    assert energy.meter and energy.estimated in (True, False)
