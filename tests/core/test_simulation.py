"""The simulation over many seeds, and that it catches what it is there to catch."""

import pytest

from engineroom.engine.core import planner
from engineroom.engine.core.blocks import BlockManager
from engineroom.engine.core.scheduler import Scheduler
from tests.core.simulate import SimulationError, World
from tests.counts import count


@pytest.mark.parametrize("part", range(10))
def test_worlds(part):
    num_seeds = count(reduced=100, full=1000)
    for seed in range(part * 1000, part * 1000 + num_seeds):
        World(seed).run()


def test_the_worlds_are_hard_enough():
    """What the seeds must contain for their passing to mean anything."""
    seen = dict.fromkeys(
        ("preempted", "hit", "follower", "scored", "refused", "faults", "cut", "quiet"), 0
    )
    flights = set()
    for seed in range(150):
        world = World(seed).run()
        flights.add(world.depth)
        seen["refused"] += world.num_refused
        seen["faults"] += world.num_faults
        for w in world.watched.values():
            seen["preempted"] += w.request.num_preemptions > 0
            seen["hit"] += w.request.num_cached_tokens > 0
            seen["follower"] += w.request.leader is not None and w.request.num_cached_tokens > 0
            seen["scored"] += w.request.max_prompt_rows > 0 and w.request.num_preemptions > 0
            seen["cut"] += w.cut_short is not None
            seen["quiet"] += w.request.quiet
    assert flights == {0, 1}
    assert min(seen.values()) >= 5, seen


def test_a_seed_replays():
    def trace(seed):
        world = World(seed).run()
        return world.turn, world.now, [(w.tokens, w.text) for w in world.watched.values()]

    assert trace(7) == trace(7) != trace(8)


def _lose_a_block(patch):
    whole = BlockManager.release
    patch.setattr(BlockManager, "release", lambda self, table: whole(self, table[:-1]))


def _keep_stale_keys(patch):
    def match(self, keys):
        return [b for b, k in enumerate(self._key_of) if k is not None][: len(keys)]

    patch.setattr(BlockManager, "match", match)


def _release_in_flight(patch):
    whole = Scheduler._end

    def end(self, request, *args, **kwargs):
        flights, request.in_flight = request.in_flight, 0
        update = whole(self, request, *args, **kwargs)
        request.in_flight = flights
        return update

    patch.setattr(Scheduler, "_end", end)


def _starve_the_last(patch):
    whole = planner._share

    def share(request, draft, start):
        return None if request.order[2] == 1 else whole(request, draft, start)

    patch.setattr(planner, "_share", share)


@pytest.mark.parametrize(
    "bug",
    [_lose_a_block, _keep_stale_keys, _release_in_flight, _starve_the_last],
    ids=lambda bug: bug.__name__.strip("_"),
)
def test_a_planted_bug_is_found_and_its_seed_told(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(SimulationError, match=r"python -m tests.core.simulate \d+"):
        for seed in range(60):
            World(seed).run()
