"""The block pool: conservation under any sequence of calls, keys, order of reuse, faults."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engineroom.engine.core.blocks import BlockManager, IntegrityError, KeyChain
from tests.counts import count


def chain(tokens, size=2, *, adapter=0, salt=b""):
    return list(KeyChain(size, adapter=adapter, salt=salt).extend(tokens, len(tokens) // size))


class TestKeys:
    def test_incremental_equals_whole(self):
        grown = KeyChain(2, adapter=0, salt=b"")
        grown.extend([1, 2, 3, 4], 1)
        assert grown.extend([1, 2, 3, 4, 5, 6], 3) == chain([1, 2, 3, 4, 5, 6])

    def test_a_key_tells_everything_before_it(self):
        base = chain([1, 2, 3, 4])
        assert chain([1, 2, 3, 5])[0] == base[0]
        assert chain([1, 2, 3, 5])[1] != base[1]
        assert chain([9, 2, 3, 4])[1] != base[1]

    def test_salt_and_adapter_separate(self):
        variants = [
            {},
            {"salt": b"a"},
            {"salt": b"b"},
            {"adapter": 1},
            {"salt": b"\x01\0\0\0"},
            {"salt": b"\0" * 8},
        ]
        assert len({chain([1, 2], **v)[0] for v in variants}) == len(variants)

    def test_pinned(self):
        """A change of the layout needs a new version string."""
        assert chain([1, 2])[0].hex() == PINNED


PINNED = "d64e7028a48b2582f5dbeec2691d910ff2a8da055447fc5199cbcf00c881e2a8"


class TestPool:
    def test_takes_and_returns(self):
        pool = BlockManager(4, 2)
        assert pool.acquire((), 5) is None
        table = pool.acquire((), 3)
        assert table == [0, 1, 2] and pool.num_free == 1 and pool.num_owned == 3
        pool.check_integrity([table])
        pool.release(table)
        assert pool.num_free == 4
        pool.check_integrity([])

    def test_hits_survive_release_until_reuse_tails_first(self):
        pool = BlockManager(4, 2)
        keys = chain([1, 2, 3, 4, 5, 6])
        table = pool.acquire((), 3)
        for block, key in zip(table, keys, strict=True):
            pool.publish(block, key)
        pool.release(table)
        assert pool.num_cached == 3 and pool.num_free == 4
        assert pool.match(keys) == table
        assert pool.match(chain([1, 2, 9, 9, 5, 6])) == table[:1]
        taken = pool.acquire((), 2)  # the blank one, then the tail of the cached prefix
        assert taken == [3, 2]
        assert pool.match(keys) == table[:2]
        shared = pool.acquire(pool.match(keys), 0)
        again = pool.acquire(shared, 0)
        pool.check_integrity([taken, shared, again])
        assert pool.shortage((), 1) == 1 and pool.acquire((), 1) is None
        pool.release(shared)
        pool.check_integrity([taken, again])
        assert pool.num_cached == 0

    def test_least_recently_released_goes_first(self):
        pool = BlockManager(2, 1)
        a, b = pool.acquire((), 1), pool.acquire((), 1)
        pool.publish(a[0], b"a")
        pool.publish(b[0], b"b")
        pool.release(b)
        pool.release(a)
        assert pool.acquire((), 1) == b
        assert pool.match([b"a"]) == a and pool.match([b"b"]) == []

    def test_an_idle_hit_is_not_free_twice(self):
        pool = BlockManager(2, 1)
        table = pool.acquire((), 1)
        pool.publish(table[0], b"k")
        pool.release(table)
        assert pool.shortage(table, 2) == 1
        assert pool.acquire(table, 2) is None
        assert pool.acquire(table, 1) == [table[0], 1]

    def test_the_first_of_equals_keeps_the_key(self):
        pool = BlockManager(2, 1)
        a, b = pool.acquire((), 1), pool.acquire((), 1)
        pool.publish(a[0], b"k")
        pool.publish(b[0], b"k")
        assert pool.match([b"k"]) == a
        pool.check_integrity([a, b])
        pool.release(b)
        assert pool.num_cached == 0

    def test_would_free(self):
        pool = BlockManager(3, 1)
        a = pool.acquire((), 2)
        b = pool.acquire(a[:1], 1)
        given_up = {}
        assert pool.would_free(b, given_up) == 1
        assert pool.would_free(a, given_up) == 2
        assert pool.would_free(a, dict.fromkeys(a[:1], -1)) == 1

    def test_faults_refuse_and_lose_nothing(self):
        asked = []
        pool = BlockManager(2, 1, fault=lambda point: asked.append(point) or len(asked) == 1)
        assert pool.acquire((), 1) is None
        pool.check_integrity([])
        assert pool.acquire((), 1) == [0]
        assert asked == ["acquire", "acquire"]

    def test_misuse_is_an_integrity_error(self):
        pool = BlockManager(2, 1)
        with pytest.raises(IntegrityError, match="block 1 is released"):
            pool.release([1])
        with pytest.raises(IntegrityError, match="block 1 is published"):
            pool.publish(1, b"k")
        table = pool.acquire((), 1)
        with pytest.raises(IntegrityError):
            pool.check_integrity([])
        with pytest.raises(IntegrityError):
            pool.check_integrity([table, table])
        with pytest.raises(IntegrityError, match="twice"):
            pool.check_integrity([table + table])
        with pytest.raises(ValueError, match="num_blocks=0"):
            BlockManager(0, 1)

    @pytest.mark.parametrize("break_it", ["blank", "ring", "count", "index", "key"])
    def test_broken_books_are_seen(self, break_it):
        pool = BlockManager(3, 1)
        table = pool.acquire((), 1)
        pool.publish(table[0], b"k")
        pool.release(table)
        pool.check_integrity([])
        if break_it == "blank":
            pool._blank.pop()
        elif break_it == "ring":
            pool._next[3] = 3
        elif break_it == "count":
            pool._num_cached += 1
        elif break_it == "index":
            pool._by_key[b"other"] = 2
        else:
            pool._key_of[2] = b"other"
        with pytest.raises(IntegrityError):
            pool.check_integrity([])


class Pool(RuleBasedStateMachine):
    """Any calls in any order, against a model that remembers what each key's block must hold."""

    def __init__(self):
        super().__init__()
        self.refuse = False
        self.pool = BlockManager(6, 1, fault=lambda point: self.refuse)
        self.tables = []
        self.content = {}  # block -> key that it was published under, while unwritten since

    @rule(
        keys=st.lists(st.sampled_from("abcdef"), max_size=4, unique=True), num_new=st.integers(0, 4)
    )
    def acquire(self, keys, num_new):
        hits = self.pool.match([k.encode() for k in keys])
        for key, block in zip(keys, hits, strict=False):
            assert self.content[block] == key.encode()
        free, fits = self.pool.num_free, self.pool.shortage(hits, num_new) <= 0
        table = self.pool.acquire(hits, num_new)
        assert (table is not None) == (fits and not self.refuse)
        if table is None:
            assert self.pool.num_free == free
            return
        assert table[: len(hits)] == hits and len(table) == len(hits) + num_new
        for block in table[len(hits) :]:
            self.content.pop(block, None)
        self.tables.append(table)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), key=st.sampled_from("abcdef"))
    def publish(self, data, key):
        table = data.draw(st.sampled_from([t for t in self.tables if t]))
        block = data.draw(st.sampled_from(table))
        self.pool.publish(block, key.encode())
        if self.pool.match([key.encode()]) == [block]:
            self.content[block] = key.encode()

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)

    @rule(refuse=st.booleans())
    def set_fault(self, refuse):
        self.refuse = refuse

    @invariant()
    def conserved(self):
        self.pool.check_integrity(self.tables)


Pool.TestCase.settings = settings(
    max_examples=count(reduced=60, full=500), stateful_step_count=40, deadline=None
)
TestAnyCalls = Pool.TestCase
