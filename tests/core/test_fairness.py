"""Fairness between tenants: bounds on served tokens, no starvation, no seat left empty."""

from __future__ import annotations

import random
from typing import Any

import pytest

from engineroom.engine.core.answers import FinishReason
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from tests.core.bench import Bench
from tests.counts import count

SEATS, LONGEST = 4, 24  # of a request: prompt and output
ROOM = {"max_num_seqs": SEATS, "max_num_batched_tokens": 32, "num_blocks": 512}
# Two tenants that both wait are apart by what can run at once, which is charged as it is served:
# one step's choices are made before any of its tokens is on an account.
BOUND = 2 * SEATS * LONGEST


def add(bench: Bench, rng: random.Random, tenant: str, number: int, **options: Any) -> Any:
    prompt = rng.randrange(1, 13)
    tokens = [1000 + rng.randrange(1 << 20) for _ in range(prompt)]  # no prefix is shared
    return bench.add(
        f"{tenant}{number}", tokens, max_tokens=rng.randrange(1, 13), tenant=tenant, **options
    )


def served(requests: list[Any]) -> int:
    return sum(r.num_computed for r in requests)


@pytest.mark.parametrize("seed", range(count(reduced=3, full=200)))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.5, 1.0, 2.0)])
def test_backlogged_tenants_are_served_by_their_weights(
    seed: int, weights: tuple[float, ...]
) -> None:
    """However much sooner and more one of them asks."""
    rng, bench = random.Random(seed), Bench(max_waiting=10_000, **ROOM)
    mine: dict[str, list[Any]] = {name: [] for name in "abc"[: len(weights)]}
    for name, weight in zip(mine, weights, strict=True):
        for i in range(300):  # all of the first's before any of the next
            mine[name].append(add(bench, rng, name, i, weight=weight))
    for _ in range(200):
        bench.step()
        assert all(any(r.state.value == "waiting" for r in rs) for rs in mine.values())
        shares = [served(rs) / w for rs, w in zip(mine.values(), weights, strict=True)]
        assert max(shares) - min(shares) <= BOUND / min(weights), shares


@pytest.mark.parametrize("seed", range(count(reduced=3, full=200)))
def test_no_seat_is_left_empty_and_everybody_ends(seed: int) -> None:
    """Work-conserving: while one waits, seats, tokens or blocks are at their limit."""
    rng = random.Random(seed)
    bench = Bench(max_waiting=10_000, **ROOM)
    requests: list[Any] = []
    for turn in range(400):
        if turn < 200:
            for _ in range(rng.randrange(3)):
                name = rng.choice("aaaaaabc")
                requests.append(add(bench, rng, name, len(requests), weight=rng.choice([0.1, 10])))
        plan = bench.scheduler.schedule()
        if bench.scheduler.num_waiting:
            full = bench.scheduler.num_running == SEATS
            assert full or plan.num_tokens == ROOM["max_num_batched_tokens"]
        if plan is not None:
            bench.commit(plan)
    bench.run(5000)
    assert {r.finish_reason for r in requests} == {FinishReason.LENGTH}


def test_a_tenant_that_comes_late_is_next_and_has_saved_nothing_up() -> None:
    rng, bench = random.Random(1), Bench(max_waiting=10_000, **ROOM)
    crowd = [add(bench, rng, "crowd", i) for i in range(200)]
    for _ in range(100):
        bench.step()
    late = [add(bench, rng, "late", i) for i in range(200)]
    before = served(crowd)
    for _ in range(8):  # as long as the longest that runs
        bench.step()
    assert any(r.num_computed for r in late)
    for _ in range(100):
        bench.step()
    assert abs((served(crowd) - before) - served(late)) <= BOUND


def test_priority_comes_before_fairness() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("first", tenant="a")
    bench.step()
    fair = bench.add("fair", tenant="b")  # of a tenant that had nothing yet
    urgent = bench.add("urgent", tenant="a", priority=-1)
    bench.run()
    assert urgent.timeline.total_ns < fair.timeline.total_ns


def test_the_order_within_a_tenant_is_of_arrival() -> None:
    bench = Bench(max_num_seqs=1)
    requests = [bench.add(f"r{i}", [100 + i] * 4, tenant=t) for i, t in enumerate("aaabbb")]
    bench.run()
    ended = [u.request.request_id for u in bench.updates if u.finished]
    assert ended == ["r0", "r3", "r1", "r4", "r2", "r5"]
    assert all(r.output_token_ids == requests[0].output_token_ids for r in requests)


def test_what_the_cache_had_and_what_is_computed_again_is_not_charged() -> None:
    bench = Bench(max_num_seqs=2, num_blocks=64, max_num_batched_tokens=64)
    first = bench.add("first", 12, max_tokens=1, tenant="a")
    bench.run()
    again = bench.add("again", 12, max_tokens=1, tenant="b")
    bench.run()
    assert first.num_charged == again.num_charged == 12
    assert first.account.counter == 12 and again.account.counter == 12 - again.num_cached_tokens


@pytest.mark.parametrize("weight", [0, -1, 1e9, float("nan"), "2"])
def test_a_weight_that_is_none(weight: Any) -> None:
    with pytest.raises(ParameterError, match="weight must be"):
        Bench().request(weight=weight)


def waiting(bench: Bench) -> dict[str, int]:
    shares = bench.scheduler._shares
    return {account.tenant: account.num_waiting for account in shares if account.num_waiting}


def test_a_full_queue_refuses_the_one_who_filled_it() -> None:
    bench = Bench(max_waiting=6)
    for i in range(6):
        bench.add(f"flood{i}", tenant="flood")
    for i in range(3):  # up to an equal share, the newest of the others first
        calm = bench.request(f"calm{i}", tenant="calm")
        assert bench.scheduler.add(calm) == [f"flood{5 - i}"]
        bench.scheduler.check_integrity()
    assert waiting(bench) == {"flood": 3, "calm": 3}
    for tenant in ("flood", "calm"):
        with pytest.raises(AdmissionError, match="max_waiting=6"):
            bench.add("more", tenant=tenant)
    ended = [update.request.request_id for update in bench.scheduler.drain_finished()]
    assert ended == ["flood5", "flood4", "flood3"]


def test_what_has_run_keeps_its_place_in_a_full_queue() -> None:
    """Its caller has seen a part of the answer."""
    bench = Bench(max_waiting=2, max_num_seqs=3, num_blocks=9)
    for name in ("old", "new", "newest"):
        bench.add(name, 4, tenant="flood", max_tokens=12)
        bench.step()
    while bench.scheduler.num_waiting < 2:
        bench.step()
    assert waiting(bench) == {"flood": 2}
    with pytest.raises(AdmissionError, match="max_waiting=2"):
        bench.add("calm", 4, tenant="calm")


@pytest.mark.parametrize("seed", range(count(reduced=10, full=500)))
def test_a_full_queue_is_shared_by_weight(seed: int) -> None:
    """Whoever asks how often, with requests of several samples: nobody who is displaced is left
    with less than his share by the one who comes, and the books stay right."""
    rng = random.Random(seed)
    bench = Bench(max_waiting=24, **ROOM)
    weights = {"a": 1.0, "b": 1.0, "c": 2.0}
    for turn in range(400):
        tenant = rng.choices("abc", [20, 2, 2])[0]
        group = [
            bench.request(
                f"{tenant}{turn}", 4, sample_index=i, tenant=tenant, weight=weights[tenant]
            )
            for i in range(rng.choice([1, 1, 3]))
        ]
        try:
            displaced = bench.scheduler.add(*group)
        except AdmissionError as error:
            assert error.code == "queue_full"
            now = waiting(bench)
            share = (now.get(tenant, 0) + len(group)) / weights[tenant]
            assert share > max(n / weights[t] for t, n in now.items()) - 5  # by whole requests
        else:
            now = waiting(bench)
            for other in {name[0] for name in displaced}:
                assert now[other] / weights[other] >= now[tenant] / weights[tenant]
        if rng.random() < 0.2:
            bench.step()
        bench.scheduler.drain_finished()
        bench.scheduler.check_integrity()
        assert bench.scheduler.num_waiting <= 24
