"""Program: recording, last use, printing; and the reference's workspace bound."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest

from engineroom.kernels import ops
from engineroom.kernels.backend import KVSpec
from engineroom.kernels.program import Program
from tests.kernels.packed_steps import Paged, raw
from tests.kernels.programs import two_layers


def test_inputs_and_weights_are_made_once() -> None:
    p = Program()
    assert p.input("token_ids", ("T",)) is p.input("token_ids", ("T",))
    assert p.weight("w", (2, 3)) is p.weight("w", (2, 3))
    with pytest.raises(ValueError, match=r"'w' was \(2, 3\) before and is \(3, 2\) now"):
        p.weight("w", (3, 2))


def test_a_finished_program_is_closed() -> None:
    p = two_layers()
    assert p.result is not None
    with pytest.raises(ValueError, match="finished; add cannot be added"):
        ops.add(p.result, p.result)


def test_operands_of_another_program_are_refused() -> None:
    a, b = Program(), Program()
    x, y = a.weight("x", (3,)), b.weight("y", (3,))
    with pytest.raises(ValueError, match="belongs to another program"):
        ops.add(x, y)


def test_attributes_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        two_layers().ops[0].attrs["factor"] = 3  # type: ignore[index]


def test_last_use_names_the_last_reader() -> None:
    p = two_layers()
    last = p.last_use()
    for index, op in enumerate(p.ops):
        for operand in op.inputs:
            if operand is not None:
                assert last[operand] >= index
    for value, index in last.items():
        if index < len(p.ops):
            assert value in p.ops[index].inputs
    assert p.result is not None and last[p.result.id] == len(p.ops)


def test_every_op_prints_on_one_line() -> None:
    p = two_layers()
    lines = str(p).splitlines()
    assert len(lines) == len(p.ops)
    assert lines[0] == "%4 ['T', 32] = embedding(embed, token_ids)"
    assert "linear(%7, 0.k, -)" in str(p)


def _shape_errors():  # type: ignore[no-untyped-def]
    p = Program()
    t, x, w = p.input("token_ids", ("T",)), p.weight("x", (5, 6)), p.weight("w", (4, 6))
    norm, four = p.weight("norm", (4,)), p.weight("four", (5, 4))
    kv = {"layer": 0, "num_kv_heads": 2}
    rope = {"inv_freq": (1.0, 0.5)}
    return {
        "embedding of a vector": (lambda: ops.embedding(norm, t), "table is norm"),
        "embedding by a matrix": (lambda: ops.embedding(x, w), "token_ids is w"),
        "linear, K": (lambda: ops.linear(four, w), r"x is four \[5, 4\], weight is w \[4, 6\]"),
        "linear, bias": (lambda: ops.linear(x, w, p.weight("b", (3,))), r"bias is b \[3\]"),
        "linear by a vector": (lambda: ops.linear(x, norm), "expected 2 dimensions"),
        "rms_norm groups": (lambda: ops.rms_norm(x, norm, eps=1e-5), "rows of 6 are not whole"),
        "rms_norm by a matrix": (lambda: ops.rms_norm(x, w, eps=1e-5), "expected 1 dim"),
        "add": (lambda: ops.add(x, w), r"add: shapes differ, x \[5, 6\] and w \[4, 6\]"),
        "silu_mul": (lambda: ops.silu_mul(x, w), "silu_mul: shapes differ"),
        "gelu_tanh_mul": (lambda: ops.gelu_tanh_mul(x, w), "gelu_tanh_mul: shapes differ"),
        "clamped_silu_mul": (lambda: ops.clamped_silu_mul(x, w), "clamped_silu_mul: shapes differ"),
        "softcap of 0": (lambda: ops.softcap(x, 0.0), "above 0, not 0.0"),
        "rope heads": (lambda: ops.rope(x, t, head_dim=4, **rope), "not whole heads of 4"),
        "rope frequencies": (lambda: ops.rope(x, t, head_dim=2, **rope), "rotate more than"),
        "kv_write": (lambda: ops.kv_write(x, x, head_dim=4, **kv), "expected 2 heads of 4"),
        "kv_write, k and v": (lambda: ops.kv_write(x, w, head_dim=3, **kv), "shapes differ"),
        "attention heads": (
            lambda: ops.attention(x, x, num_heads=3, head_dim=2, scale=1.0, **kv),
            "3 query heads do not share 2 kv heads",
        ),
        "attention rows": (
            lambda: ops.attention(x, x, num_heads=4, head_dim=2, scale=1.0, **kv),
            "expected 4 heads of 2",
        ),
        "select_rows": (lambda: ops.select_rows(norm, t), "x is norm"),
    }


@pytest.mark.parametrize("name", _shape_errors())
def test_operands_that_do_not_fit_are_named(name: str) -> None:
    build, message = _shape_errors()[name]
    with pytest.raises(ValueError, match=message):
        build()


def weights_of(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: (rng.standard_normal(handle.shape) * 0.2).astype(np.float32)
        for name, handle in program.weights.items()
    }


def many_at_once() -> Program:
    """Twenty values that live until a last sum."""
    p = Program()
    step = ops.StepHandles.of(p)
    values = [ops.embedding(p.weight("e", (50, 64)), step.token_ids) for _ in range(20)]
    total = values[0]
    for value in values[1:]:
        total = ops.add(total, value)
    return p.finish(total)


@pytest.mark.parametrize(
    "build", [lambda: two_layers(hidden=64), many_at_once], ids=["model", "many"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [1, 7, 64, 300])
def test_workspace_is_an_upper_bound_and_not_a_wild_one(
    num_tokens: int, dtype: str, build: Callable[[], Program]
) -> None:
    torch = pytest.importorskip("torch", reason="the reference backend needs torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    from engineroom.kernels.reference import ReferenceBackend

    class Peak(TorchDispatchMode):
        """Bytes of the storages that are alive, at their most."""

        live = peak = 0
        known: set[int]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(t, torch.Tensor):
                    self.count(t.untyped_storage())
            return out

        def count(self, storage) -> None:  # type: ignore[no-untyped-def]
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self.known or not size:
                return
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key, size)

        def forget(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.live -= size

    program = build()
    backend = ReferenceBackend(activation_dtype=dtype, threads=1)
    packed = {name: backend.pack(raw(w)) for name, w in weights_of(program).items()}
    cache = backend.allocate_kv(KVSpec(2, 2, 16, 16, dtype), 64)
    executable = backend.lower(program, packed, cache)
    step = Paged(16, 64, np.random.default_rng(0), [[]], [0]).step({0: [1] * num_tokens})
    peak = Peak()
    peak.known = {h.data.untyped_storage().data_ptr() for h in (cache.keys, cache.values)}
    peak.known |= {w.untyped_storage().data_ptr() for w in packed.values() if hasattr(w, "dtype")}
    with peak:
        executable.run(step)
    bound = backend.workspace_bytes(program, num_tokens, num_tokens, num_tokens)
    assert peak.peak <= bound
    assert bound <= 8 * peak.peak + 2**20
