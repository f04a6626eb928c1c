"""The checks that `engineroom doctor` runs: seconds, no model, no network."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ...kernels.backend import Backend, KVSpec, StepInputs
from ...kernels.cpu import _native
from ...kernels.cpu.backend import CpuBackend
from ...kernels.sampling import philox4x32
from ...kernels.sampling_vectors import PHILOX, UNIFORM
from ...kernels.weights import F32, FORMATS, RawWeight
from ...quant.values import dequantise
from .. import models
from ..config import ModelConfig, RopeConfig

_TOKENS = (3, 17, 42, 9, 25, 60, 1)


def run_checks(backend: Backend | None) -> list[dict[str, Any]]:
    """Each check's name, whether it passed, what it found, and its seconds. `backend` None: the
    checks that need one are left out."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("native dequantisation equals its specification", native_equals_specification),
        ("random numbers equal their published vectors", random_numbers),
    ]
    if backend is not None:
        made = backend
        tiny = "a tiny model: whole prompt = token by token = beside neighbours"
        checks.append((tiny, lambda: pure(made)))
        if made.name == "cpu":
            tables = _native.kernel_tables()
            checks += [(f"the same on {isa} kernels", partial(_pure_on, isa)) for isa in tables]
    results = []
    for name, check in checks:
        started = time.perf_counter()
        try:
            found, passed = check(), True
        except Exception as error:  # a check that breaks is a check that failed
            found, passed = f"{type(error).__name__}: {error}", False
        results.append(
            {
                "check": name,
                "passed": passed,
                "found": found,
                "seconds": time.perf_counter() - started,
            }
        )
    return results


def _pure_on(isa: str) -> str:
    return pure(CpuBackend(isa=isa))


def native_equals_specification() -> str:
    """Every format, on random bytes: the compiled code gives the numpy code's bits."""
    rng = np.random.default_rng(20)
    for name, fmt in FORMATS.items():
        shape = (64 * fmt.block_elements,)
        data = rng.integers(0, 256, fmt.row_bytes(*shape), dtype=np.uint8)
        expected = dequantise(RawWeight(name, fmt, shape, {"data": data}))
        got = np.empty(shape, np.float32)
        _native.dequantise(name, data, got)
        same = (got.view(np.uint32) == expected.view(np.uint32)) | (
            np.isnan(got) & np.isnan(expected)
        )
        if not same.all():
            raise ValueError(f"{name}: {int((~same).sum())} of {same.size} values differ")
    return f"{len(FORMATS)} formats"


def random_numbers() -> str:
    """Philox4x32-10 against its published answers, and the native generator against ours."""
    for counter, key, expected in PHILOX:
        block = philox4x32(np.array([counter], dtype=np.uint32), key)
        if tuple(block.reshape(-1).tolist()) != expected:
            raise ValueError(f"philox4x32 of {counter} is {block.tolist()}")
    for seed, sample, position, stream, token, bits in UNIFORM:
        out = np.empty(token + 1, np.float32)
        _native.philox_uniform(seed, sample, position, stream, out)
        if int(out.view(np.uint32)[token]) != bits:
            raise ValueError(f"native uniform of seed {seed}, token {token} is {out[token]!r}")
    return f"{len(PHILOX) + len(UNIFORM)} vectors"


def pure(backend: Backend) -> str:
    """The logits of a random two-layer model do not depend on how its prompt was cut, nor on who
    else is in the step, bit for bit."""
    whole = _Tiny(backend).logits([[_TOKENS]])[0][-1]
    single = _Tiny(backend).logits([[(token,)] for token in _TOKENS])[-1][-1]
    among = _Tiny(backend).logits([[_TOKENS[::-1], _TOKENS, (5, 5)]])[0][1]
    if not np.isfinite(whole).all():
        raise ValueError("logits are not finite")
    for name, other in (("token by token", single), ("beside neighbours", among)):
        if not np.array_equal(whole.view(np.uint32), other.view(np.uint32)):
            raise ValueError(f"{name}: logits differ by {np.abs(whole - other).max():.3g}")
    return f"{whole.size} logits equal bit for bit"


class _Tiny:
    """A random llama of two layers with its own cache; each sequence owns one block."""

    BLOCK = 16

    def __init__(self, backend: Backend) -> None:
        config = ModelConfig(
            family="llama",
            vocab_size=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            norm_eps=1e-5,
            max_position=self.BLOCK,
            rope=RopeConfig(theta=10_000.0, rotary_dim=8),
            tie_embeddings=True,
        )
        module = models.find_by_hf("LlamaForCausalLM")
        rng = np.random.default_rng(7)
        packed = {}
        for spec in module.weights(config):
            values = rng.standard_normal(spec.shape, dtype=np.float32) / 4
            data = values.reshape(-1).view(np.uint8)
            packed[spec.name] = backend.pack(RawWeight(spec.name, F32, spec.shape, {"data": data}))
        kv = KVSpec(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=self.BLOCK,
            dtype="float32",
        )
        cache = backend.allocate_kv(kv, 4)
        self._executable = backend.lower(models.record(module, config), packed, cache)
        self._length = [0] * 4

    def logits(self, steps: list[list[tuple[int, ...]]]) -> list[np.ndarray]:
        """Per step: the last-token logits [S, V] of each of its sequences."""
        return [self._step(sequences) for sequences in steps]

    def _step(self, sequences: list[tuple[int, ...]]) -> np.ndarray:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for s, tokens in enumerate(sequences):
            here = range(self._length[s], self._length[s] + len(tokens))
            ids += tokens
            positions += here
            slots += [s * self.BLOCK + p for p in here]
            starts.append(len(ids))
            self._length[s] += len(tokens)
        count = len(sequences)
        step = StepInputs(
            token_ids=_i32(ids),
            positions=_i32(positions),
            query_start=_i32(starts),
            seq_len=_i32(self._length[:count]),
            block_table=_i32([[s] for s in range(count)]),
            slot=_i32(slots),
            logit_rows=_i32([end - 1 for end in starts[1:]]),
        )
        return self._executable.run(step).numpy()


def _i32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.int32)


__all__ = ["native_equals_specification", "pure", "run_checks"]
