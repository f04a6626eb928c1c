"""The pool of KV blocks: who owns which, prefix keys, and the law that none is lost.

A block is in exactly one of three states:
  owned    reference count > 0 = the number of tables (running requests) that name it
  cached   count 0, but its content is known by a key and may be hit until the block is reused
  blank    count 0, content unknown
and owned + cached + blank = total. "Free" means cached or blank: what acquire() may hand out,
blank blocks first, then cached ones from the least recently released.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence

__all__ = ["BlockManager", "IntegrityError", "KeyChain"]

# What a key means is fixed by this string: change either, change both.
_ROOT = hashlib.sha256(b"engineroom prefix key 1").digest()


class IntegrityError(AssertionError):
    """The pool's books do not balance: a bug of ours, never a user's."""


class KeyChain:
    """The keys of one sequence's full blocks, grown as blocks fill.

    key[i] = SHA-256(key[i - 1], adapter u64, salt length u32, salt, block i's token ids u32), all
    little-endian, key[-1] = a constant: so equal keys mean equal prefixes under one salt and
    adapter. SHA-256 because a collision would hand one user another's KV.
    """

    __slots__ = ("_format", "_scope", "_size", "keys")

    def __init__(self, block_size: int, *, adapter: int, salt: bytes) -> None:
        self._size = block_size
        self._format = struct.Struct(f"<{block_size}I")
        self._scope = struct.pack("<QI", adapter, len(salt)) + salt
        self.keys: list[bytes] = []

    def extend(self, token_ids: Sequence[int], num_blocks: int) -> list[bytes]:
        """The keys, grown to at least `num_blocks`; token_ids must hold those blocks' tokens."""
        keys, size = self.keys, self._size
        while len(keys) < num_blocks:
            start = len(keys) * size
            parent = keys[-1] if keys else _ROOT
            tokens = self._format.pack(*token_ids[start : start + size])
            keys.append(hashlib.sha256(parent + self._scope + tokens).digest())
        return keys


class BlockManager:
    """Hands out block ids 0..num_blocks - 1 and takes them back; every operation O(1) per block.

    `fault(point)` is asked before an acquisition; True refuses it, as if the pool were empty
    (tests inject failures there).
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        fault: Callable[[str], bool] | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(
                f"num_blocks={num_blocks} and block_size={block_size} must be at least 1"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._fault = fault
        self._refs = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is handed out first
        # Cached blocks, least recently released first: a ring through the sentinel `num_blocks`.
        self._next = [num_blocks] * (num_blocks + 1)
        self._prev = [num_blocks] * (num_blocks + 1)
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        """Blocks that acquire() may hand out: blank and cached."""
        return len(self._blank) + self._num_cached

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def num_owned(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known prefix of `keys`. Takes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def shortage(self, hits: Sequence[int], num_new: int) -> int:
        """How many more free blocks acquire(hits, num_new) would need; <= 0 where it can run."""
        refs = self._refs
        idle_hits = sum(1 for block in hits if refs[block] == 0)
        return idle_hits + num_new - self.num_free

    def would_free(self, table: Sequence[int], given_up: dict[int, int]) -> int:
        """How many blocks releasing `table` would make free, after the releases in `given_up`
        (block -> how often), to which this one is added. Changes nothing else.
        """
        freed = 0
        for block in table:
            times = given_up[block] = given_up.get(block, 0) + 1
            freed += times == self._refs[block]
        return freed

    def acquire(self, hits: Sequence[int], num_new: int) -> list[int] | None:
        """A table of `hits` (from match(), now shared) and `num_new` blank blocks, or None.

        All or nothing. None means that the pool is short or that a fault was injected.
        """
        if self.shortage(hits, num_new) > 0 or (self._fault is not None and self._fault("acquire")):
            return None
        refs = self._refs
        for block in hits:
            if refs[block] == 0:
                self._unlink(block)
            refs[block] += 1
        table = list(hits)
        for _ in range(num_new):
            block = self._take_one()
            refs[block] = 1
            table.append(block)
        return table

    def publish(self, block: int, key: bytes) -> None:
        """Make an owned, computed block's content known; the first of equals keeps the key."""
        if self._refs[block] < 1:
            raise IntegrityError(f"block {block} is published but nobody owns it")
        if self._key_of[block] is None and key not in self._by_key:
            self._by_key[key] = block
            self._key_of[block] = key

    def release(self, table: Sequence[int]) -> None:
        """Give up one reference to each block, tail first: a prefix outlives its continuation."""
        refs = self._refs
        for block in reversed(table):
            if refs[block] < 1:
                raise IntegrityError(f"block {block} is released but nobody owns it")
            refs[block] -= 1
            if refs[block] == 0:
                if self._key_of[block] is None:
                    self._blank.append(block)
                else:
                    self._link_last(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """The law of the head of this file, against every table alive. Errors: IntegrityError."""
        named = [0] * self.num_blocks
        for table in tables:
            for block in table:
                named[block] += 1
            if len(set(table)) != len(table):
                raise IntegrityError(f"a table names a block twice: {list(table)}")
        if named != self._refs:
            wrong = [
                (b, r, n) for b, (r, n) in enumerate(zip(self._refs, named, strict=True)) if r != n
            ]
            raise IntegrityError(f"(block, count, tables naming it) differ: {wrong[:8]}")
        cached = self._cached_blocks()
        idle = sorted(cached + self._blank)
        if idle != [b for b, n in enumerate(named) if n == 0]:
            raise IntegrityError(
                f"{len(self._blank)} blank + {len(cached)} cached + "
                f"{sum(1 for n in named if n)} owned blocks are not the pool of {self.num_blocks}"
            )
        if len(cached) != self._num_cached:
            raise IntegrityError(f"{len(cached)} cached blocks counted as {self._num_cached}")
        for block in self._blank:
            if self._key_of[block] is not None:
                raise IntegrityError(f"blank block {block} has a key")
        for block in cached:
            if self._key_of[block] is None:
                raise IntegrityError(f"cached block {block} has no key")
        known = {key: block for block, key in enumerate(self._key_of) if key is not None}
        if known != self._by_key:
            raise IntegrityError("the key index and the blocks' keys differ")

    def _cached_blocks(self) -> list[int]:
        found: list[int] = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks and len(found) <= self.num_blocks:
            found.append(block)
            block = self._next[block]
        return found

    def _take_one(self) -> int:
        if self._blank:
            return self._blank.pop()
        block = self._next[self.num_blocks]
        self._unlink(block)
        key = self._key_of[block]
        if key is not None:
            del self._by_key[key]
            self._key_of[block] = None
        return block

    def _link_last(self, block: int) -> None:
        end = self.num_blocks
        last = self._prev[end]
        self._next[last] = self._prev[end] = block
        self._prev[block], self._next[block] = last, end
        self._num_cached += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self._num_cached -= 1
