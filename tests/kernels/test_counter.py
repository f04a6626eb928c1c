"""Random numbers: Philox's published answers, native equal to numpy, and streams that differ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineroom.kernels import sampling
from engineroom.kernels import sampling_vectors as vectors
from engineroom.kernels.cpu import _native
from tests.counts import count

U32 = st.integers(0, 2**32 - 1)


def native(seed: int, sample_index: int, position: int, stream: int, size: int) -> np.ndarray:
    out = np.full(size, np.nan, dtype=np.float32)
    _native.philox_uniform(seed, sample_index, position, stream, out)
    return out


def test_philox_gives_the_published_answers() -> None:
    for counter, key, expected in vectors.PHILOX:
        got = sampling.philox4x32(np.array(counter, dtype=np.uint32), key)
        assert got.tolist() == list(expected)


def test_native_philox_gives_the_published_answers() -> None:
    # The native face chooses the counter's first word itself: a block's index.
    (counter, key, expected) = vectors.PHILOX[0]
    got = native(key[1] << 32 | key[0], counter[1], counter[2], counter[3], 4)
    assert got.tolist() == sampling.uniform_of_word(np.array(expected, np.uint32)).tolist()


@pytest.mark.parametrize("draw", [native, sampling.uniforms])
def test_counter_layout_vectors(draw) -> None:  # type: ignore[no-untyped-def]
    for seed, sample_index, position, stream, token, bits in vectors.UNIFORM:
        got = draw(seed, sample_index, position, stream, token + 1)[token]
        assert got.view(np.uint32) == bits, (seed, sample_index, position, stream, token)


@given(st.integers(0, 2**64 - 1), U32, U32, U32, st.integers(0, 300))
@settings(max_examples=count(reduced=150, full=3000), deadline=None)
def test_native_equals_numpy(seed: int, sample: int, position: int, stream: int, size: int) -> None:
    expected = sampling.uniforms(seed, sample, position, stream, size)
    assert native(seed, sample, position, stream, size).tobytes() == expected.tobytes()


def test_native_equals_numpy_on_a_whole_vocabulary() -> None:
    expected = sampling.uniforms(2**64 - 3, 127, 131071, 0, 262144)
    assert native(2**64 - 3, 127, 131071, 0, 262144).tobytes() == expected.tobytes()
    assert expected.min() > 0 and expected.max() < 1


def test_every_key_and_counter_word_gives_another_stream() -> None:
    draws = {
        (seed, sample, position, stream): native(seed, sample, position, stream, 8).tobytes()
        for seed, sample, position, stream in itertools.product(
            (0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1), (0, 1, 127), (0, 1, 4096), (0, 1)
        )
    }
    assert len(set(draws.values())) == len(draws)
    # Words are not merely permuted among neighbours either.
    words = np.frombuffer(b"".join(draws.values()), dtype=np.float32)
    assert len(np.unique(words)) > 0.999 * len(words)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    rows = np.stack([native(7, 0, position, 0, 4096) for position in range(64)]).astype(np.float64)
    cells = np.histogram(rows, bins=64, range=(0, 1))[0]
    expected = rows.size / 64
    assert ((cells - expected) ** 2 / expected).sum() < 63 + 5 * (2 * 63) ** 0.5
    centred = (rows - 0.5) * 12**0.5
    by_position = centred @ centred.T / rows.shape[1]
    assert np.abs(by_position - np.eye(64)).max() < 5 / rows.shape[1] ** 0.5 * 1.5
    for lag in (1, 2, 3, 4):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 5 / rows.size**0.5


def test_small_uniforms_are_resolved_finely() -> None:
    # Among 2^18 tokens the winner's u is near 2^-18, where a plain 23-bit draw has 32 values.
    u = native(11, 0, 0, 0, 1 << 20)
    small = u[u < 2.0**-12]
    assert len(np.unique(small)) == len(small) > 150


def test_bad_arguments_are_refused() -> None:
    out = np.zeros(4, dtype=np.float32)
    for args in ((-1, 0, 0, 0), (2**64, 0, 0, 0), (0, 2**32, 0, 0), (0, 0, -1, 0), (0, 0, 0, 0.5)):
        with pytest.raises(TypeError):
            _native.philox_uniform(*args, out)
    for array in (np.zeros(4), np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2]):
        with pytest.raises(TypeError):
            _native.philox_uniform(0, 0, 0, 0, array)
    frozen = np.zeros(4, dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        _native.philox_uniform(0, 0, 0, 0, frozen)
