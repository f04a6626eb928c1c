"""Cores and memory nodes as made-up /sys folders tell them, and which thread belongs where."""

from __future__ import annotations

import os
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engineroom.kernels.cpu import _native
from engineroom.kernels.cpu.backend import CpuBackend, _placed
from tests.counts import count

pytestmark = pytest.mark.cores

Cores = list[tuple[int, list[int]]]


def tree(root: Path, nodes: dict[int, str], siblings: list[str]) -> str:
    """A /sys of the nodes' CPU lists and each CPU's siblings."""
    system = root / "devices/system"
    if nodes:
        (system / "node").mkdir(parents=True)
        (system / "node/online").write_text(",".join(map(str, nodes)) + "\n")
    for node, cpus in nodes.items():
        (system / f"node/node{node}").mkdir()
        (system / f"node/node{node}/cpulist").write_text(cpus + "\n")
    for cpu, listed in enumerate(siblings):
        folder = system / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(listed + "\n")
    return str(root)


PAIRS = ["0,4", "1,5", "2,6", "3,7"] * 2  # four cores of two hardware threads
NEIGHBOURS = ["0-1", "0-1", "2-3", "2-3"]

FOUND: dict[str, tuple[dict[int, str], list[str], list[int], Cores]] = {
    "one node": ({0: "0-3"}, ["0", "1", "2", "3"], [0, 1, 2, 3], [(0, [i]) for i in range(4)]),
    "two nodes": (
        {0: "0-1,4-5", 1: "2-3,6-7"},
        PAIRS,
        list(range(8)),
        [(0, [0, 4]), (0, [1, 5]), (1, [2, 6]), (1, [3, 7])],
    ),
    "nodes that take turns": (
        {0: "0,2,4,6", 1: "1,3,5,7"},
        PAIRS,
        list(range(8)),
        [(0, [0, 4]), (0, [2, 6]), (1, [1, 5]), (1, [3, 7])],
    ),
    "a node of memory alone": (
        {0: "0-3", 2: ""},
        NEIGHBOURS,
        [0, 1, 2, 3],
        [(0, [0, 1]), (0, [2, 3])],
    ),
    "CPUs offline": ({0: "0-1", 1: "2"}, ["0-1", "0-1", "2"], [0, 1, 2], [(0, [0, 1]), (1, [2])]),
    "a cpuset": ({0: "0-1,4-5", 1: "2-3,6-7"}, PAIRS, [1, 5, 7], [(0, [1, 5]), (1, [7])]),
    "a cpuset of one node": ({0: "0-1,4-5", 1: "2-3,6-7"}, PAIRS, [3, 6], [(1, [3]), (1, [6])]),
    "no nodes": ({}, NEIGHBOURS, [0, 1, 2], [(0, [0, 1]), (0, [2])]),
    "no /sys": ({}, [], [0, 3, 9], [(0, [0]), (0, [3]), (0, [9])]),
    "no CPUs": ({0: "0-3"}, NEIGHBOURS, [], []),
    "damaged": ({0: "x", 1: "0-,"}, ["", ""], [0, 1], [(1, [0]), (0, [1])]),
}


@pytest.mark.parametrize("case", FOUND)
def test_cores(case: str, tmp_path: Path) -> None:
    nodes, siblings, allowed, want = FOUND[case]
    found = _native.find_cores(tree(tmp_path, nodes, siblings), allowed)
    assert found == sorted(want)


def test_long_lists(tmp_path: Path) -> None:
    """CPU numbers that take turns over nodes make a long line."""
    nodes = {n: ",".join(map(str, range(n, 1024, 4))) for n in range(4)}
    found = _native.find_cores(tree(tmp_path, nodes, []), list(range(1024)))
    assert found == [(n, [cpu]) for n in range(4) for cpu in range(n, 1024, 4)]


def test_threads_are_spread_over_cores_and_nodes() -> None:
    rng = np.random.default_rng(1)
    for _ in range(count(reduced=300, full=5000)):
        sizes = rng.integers(1, 40, rng.integers(2, 9))
        nodes = [n for n, size in enumerate(sizes) for _ in range(size)]
        cores = [(node, [2 * i, 2 * i + 1]) for i, node in enumerate(nodes)]
        threads = int(rng.integers(2, 3 * len(cores)))
        places = _native.place_threads(cores, threads)
        assert len(places) == threads
        assert [node for node, _ in places] == sorted(node for node, _ in places)
        used = [places.count(core) for core in cores]
        assert sum(used) == threads  # none but those cores
        assert max(used) - min(used) <= 1  # no core has two threads while another has none
        for node, size in enumerate(sizes):
            share = threads * size / len(cores)
            assert abs(sum(n == node for n, _ in places) - share) < 1


def test_nothing_is_pinned_where_nothing_is_gained() -> None:
    assert _native.place_threads([(1, [0]), (1, [1]), (1, [2])], 3) == []
    assert _native.place_threads([(0, [0]), (1, [1])], 1) == []
    assert _native.place_threads([], 4) == []


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_a_pool_runs_where_it_is_placed_and_its_caller_is_free_again() -> None:
    own = sorted(os.sched_getaffinity(0))
    first, last = [own[0]], [own[-1]]
    pool = _native.Pool(3, [(0, first), (0, first), (1, last)])
    assert pool.cpus() == [first, first, last]
    assert sorted(os.sched_getaffinity(0)) == own
    found: list[set[int]] = []
    other = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
    other.start()
    other.join()
    assert found == [set(own)]
    with pytest.raises(ValueError, match="1 places for 2 threads"):
        _native.Pool(2, [(0, first)])
    assert _placed(pool) == "3, each pinned to a core: 2 (from 0) on node 0, 1 (from 2) on node 1"


def test_a_place_that_is_refused_changes_nothing() -> None:
    pool = _native.Pool(2, [(0, [100000]), (1, [100000])])
    assert pool.cpus()[0] == pool.cpus()[1]


def test_one_node_is_told() -> None:
    backend = CpuBackend(threads=2)
    if not backend._pool.places:
        assert backend.describe()["threads"] == "2, not pinned (one memory node)"


# --------------------------------------------------------------------------------------- shares

FORMATS = {"F32": 4, "BF16": 2, "INT8": 1}


def matrices(rng: np.random.Generator, paired: bool) -> list[tuple[str, np.ndarray, int, int]]:
    made = []
    for _ in range(int(rng.integers(1, 5))):
        rows = int(rng.integers(1, 700))
        for _ in range(1 + paired):
            name = str(rng.choice(list(FORMATS)))
            num_bytes = rows * (FORMATS[name] * 64 + 4 * (name == "INT8"))
            if name == "BF16":  # half of them take 12 bits
                wide = rng.standard_normal(rows * 64).astype(np.float32).view(np.uint32) >> 16
                data = wide.astype(np.uint16).view(np.uint8)
                data[1::2] &= int(rng.choice([0xFF, 0x3F]))
            else:
                data = rng.integers(0, 256, num_bytes, np.uint8)
            made.append((name, data, rows, 64))
    return made


@pytest.mark.parametrize("paired", [False, True])
def test_a_layer_is_packed_and_shared_out_whole(paired: bool) -> None:
    """Each tile is one thread's, threads have neighbouring tiles, of equal bytes but for a tile.

    Packing takes each_share's answer for what it writes, as a step does for what it reads: a tile
    that is nobody's would stay zeros.
    """
    rng = np.random.default_rng(3)
    for _ in range(count(reduced=40, full=1000)):
        layer, threads = matrices(rng, paired), int(rng.integers(1, 20))
        node = {"places": [(0, [0])] * threads} if rng.random() < 0.5 else {}
        packed = _native.pack_layer(_native.Pool(threads, **node), layer, paired)
        for matrix, raw in zip(packed, layer, strict=True):
            alone = _native.pack(*raw, 1)
            assert bytes(_native.tiles_of(matrix)) == bytes(_native.tiles_of(alone))
        shares = [_native.layer_share(packed, paired, i, threads) for i in range(threads)]
        step = 1 + paired
        tile_bytes, tiles = [], []
        for part in range(0, len(layer), step):
            tiles.append(-(-layer[part][2] // 48))
            tile_bytes.append(sum(m.nbytes for m in packed[part : part + step]) // tiles[-1])
        for part, num_tiles in enumerate(tiles):
            ends = [share[part] for share in shares]
            assert {end[0] for end in ends} == {part * step}
            assert (ends[0][1], ends[-1][2]) == (0, num_tiles)
            assert all(a[2] == b[1] for a, b in pairwise(ends))
        given = [
            sum((end - begin) * size for (_, begin, end), size in zip(s, tile_bytes, strict=True))
            for s in shares
        ]
        assert max(given) - sum(given) / threads <= max(tile_bytes)


def test_pairs_that_are_none() -> None:
    pool = _native.Pool(1)
    one, two = (("F32", np.zeros(256 * n, np.uint8), n, 64) for n in (1, 2))
    with pytest.raises(ValueError, match="1 matrices are no pairs"):
        _native.pack_layer(pool, [one], True)
    with pytest.raises(ValueError, match="a pair of 1 and 2 rows"):
        _native.pack_layer(pool, [one, two], True)
    assert [m.shape for m in _native.pack_layer(pool, [one, two], False)] == [(1, 64), (2, 64)]
