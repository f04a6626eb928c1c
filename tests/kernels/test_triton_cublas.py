"""When a library's product stands for our kernel's: libraries that keep law 2, and that do not."""

from __future__ import annotations

import numpy as np

from engineroom.kernels import ops
from engineroom.kernels.program import Program
from engineroom.kernels.weights import F16
from tests.kernels.packed_steps import plain_step, raw
from tests.kernels.triton_device import TritonBackend, torch

from engineroom.kernels.triton import cublas, linear, tuned  # isort: skip
from engineroom.kernels.triton.executor import TritonExecutable  # isort: skip
from engineroom.kernels.triton.quantised import FloatMatrix  # isort: skip

COUNTS = (32, 16)
TRIED = [32, 16, 32, 16]  # of two shapes


class Library:
    """Our kernel in the library's place; products of `wrong` tokens come out with another bit."""

    def __init__(self, wrong: int = 0) -> None:
        self.calls: list[int] = []
        self._wrong = wrong

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        self.calls.append(len(x))
        linear.launch(x, FloatMatrix(weight), out, round_to=out.dtype)
        if len(x) == self._wrong:
            out.view(torch.int16)[-1, 0] ^= 1


def program() -> Program:
    """A norm, a layer, and one with an addition, of every row of a step."""
    p = Program()
    step = ops.StepHandles.of(p)
    x = ops.embedding(p.weight("x", (64, 64)), step.token_ids)
    h = ops.rms_norm(x, p.weight("norm", (64,)), eps=1e-5)
    y = ops.add(x, ops.linear(ops.linear(h, p.weight("a", (48, 64))), p.weight("b", (64, 48))))
    return p.finish(ops.select_rows(ops.add(y, y), step.logit_rows))


def run(
    products: cublas.Products | None, num_tokens: int, known: tuned.Tuned = tuned.UNTUNED
) -> bytes:
    rng = np.random.default_rng(3)
    shapes = {"x": (64, 64), "norm": (64,), "a": (48, 64), "b": (64, 48)}
    backend = TritonBackend(activation_dtype="float16", threads=1)
    packed = {
        name: backend.pack(raw(rng.standard_normal(shape).astype(np.float32) / 8, F16))
        for name, shape in shapes.items()
    }
    device = torch.device("cpu")
    made = TritonExecutable(
        program(), packed, None, torch.float16, device, tuned=known, products=products
    )
    return made.run(plain_step(num_tokens)).numpy().tobytes()


def test_a_library_with_our_bits_multiplies_the_tokens_that_were_tried() -> None:
    library = Library()
    products = cublas.Products(library, COUNTS)
    want = run(None, 57)
    assert run(products, 57) == want
    # 57 = 32 + 16 and 9 of ours, in each of two layers; shapes are tried once.
    assert library.calls == [*TRIED, 32, 16, 32, 16]
    assert run(products, 15) == run(None, 15)
    assert len(library.calls) == 8


def test_a_library_that_sums_otherwise_for_one_number_of_tokens_is_not_called() -> None:
    library = Library(wrong=16)
    want = run(None, 57)
    assert run(cublas.Products(library, COUNTS), 57) == want
    assert library.calls == TRIED


def test_a_library_is_neither_tried_nor_called_for_what_a_table_says_is_ours() -> None:
    library, known = Library(), tuned.Tuned({}, "t", frozenset({("float16", 48, 64)}))
    assert run(cublas.Products(library, COUNTS), 57, known) == run(None, 57)
    assert library.calls == [32, 16, 32, 16]  # of the other layer: tried, then called


def test_shapes_that_are_not_for_a_library() -> None:
    """fp32, an input of another dtype, and a gate beside its layer."""
    library = Library()
    products = cublas.Products(library, COUNTS)
    half = torch.zeros(16, 64, dtype=torch.float16)
    assert not products.has_our_bits(FloatMatrix(half.float()), torch.float32)
    assert not products.has_our_bits(FloatMatrix(half), torch.float32)
    assert not products.has_our_bits(FloatMatrix(half, paired=True), torch.float16)
    assert not library.calls
    assert products.has_our_bits(FloatMatrix(half), torch.float16)
