"""`engineroom bench kernels --tune`: launch options of linear layers, measured on this card.

For each format, shape and width of a tile every configuration is launched on the same operands. One
whose bits are not the default's is left out; of the others the fastest is taken, where it is faster
than the default by more than noise. 16-bit weights go through cuBLAS too, to record whether it
would keep law 2, and from how many tokens it is ahead.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.errors import TritonError

from ....kernels.backend import BackendUnavailable
from ....kernels.triton import device as dev
from ....kernels.triton import linear
from ....kernels.triton.cublas import Products
from ....kernels.triton.quantised import FLOATS, FloatMatrix, Matrix
from ....kernels.triton.tuned import UNTUNED, WARPS, Key, Options, Tuned, file_name, render
from ....kernels.weights import Format
from ..timing import Budget
from . import launches
from .card import Card, Launch
from .checks import eight_bits
from .interpreter import mend
from .law2 import same_bits
from .sizes import FULL, TINY, Sizes

CANDIDATES = tuple(Options(warps, stages) for warps in WARPS for stages in (2, 3, 4, 5))
FORMATS = ("BF16", "Q4_0", "Q4_K", "Q8_0", "INT8", "INT4", "FP8", "NF4")
_REHEARSED = ("F16", "NF4")  # the interpreter's bf16 arithmetic is wrong
_WORTH = 0.97  # of the default's time, at most, for a row to be written
_TILES = 4  # of the widest, which serves prompts too; the others are timed alone
# That cuBLAS is given; it is called for the last two (cublas.COUNTS).
_TOKENS = (1, 2, 3, 8, 16, 17, 64, 128, 256, 512, 1024, 2048)
_REHEARSED_TOKENS = (1, 3, 17)


@dataclass(frozen=True)
class Work:
    """One weight: its format, [N, K], and what multiplies it ("" for the layer's input itself)."""

    format: Format
    rows: int
    columns: int
    activations: str

    @property
    def label(self) -> str:
        by = f" by {self.activations}" if self.activations else ""
        return f"{self.format.name}{by} {self.columns} x {self.rows}"

    def input_dtype(self, sizes: Sizes) -> torch.dtype:
        """A float weight's own, so that both meet in the tensor cores."""
        return FLOATS.get(self.format, sizes.dtype)


def run(
    *,
    minutes: float,
    output: str | None,
    shapes: Sequence[tuple[int, int]] | None,
    formats: Sequence[str] | None,
    rehearsal: bool,
) -> int:
    """Tune, and write the table to `output`, by default a file of the card's name here; 0.

    shapes: (K, N); formats: names. Errors: BackendUnavailable for a format that has no kernel, or
    that does not divide a K.
    """
    if rehearsal:
        mend()
        _say("A rehearsal on Triton's interpreter: no time is measured, no choice means anything")
    card, sizes = Card(), TINY if rehearsal else FULL
    torch.manual_seed(0)
    given = shapes or [(columns, rows) for rows, columns in sizes.layers.values()]
    works = _works(formats or (_REHEARSED if rehearsal else FORMATS), given)
    budget = Budget(60 * minutes)
    rows: dict[Key, Options] = {}
    cublas: list[dict[str, Any]] = []
    for done, work in enumerate(works):
        raw = launches.random_weight(work.format, work.rows, work.columns, np.random.default_rng(0))
        matrices = launches.pack(raw, card.device, card.copies(raw.nbytes), work.activations)
        dtype = work.input_dtype(sizes)
        widths = sorted({linear.tokens_of(tokens, matrices[0]) for tokens in linear.TOKENS})
        launched = len(widths) * (len(CANDIDATES) + 1)
        allowance = budget.share((len(works) - done) * launched)
        for tokens in widths:
            count = tokens * (_TILES if tokens == widths[-1] else 1)
            x = torch.randn(count, work.columns, device=card.device).to(dtype)
            best = _best(card, x, tokens, matrices, allowance)
            if best is not None:
                rows[Key.of(matrices[0], dtype, tokens)] = best
            chosen = (
                "default" if best is None else f"{best.num_warps} warps, {best.num_stages} stages"
            )
            _say(f"{work.label}, tiles of {tokens}: {chosen}")
        if isinstance(matrices[0], FloatMatrix) and dtype.itemsize == 2:
            counts = _REHEARSED_TOKENS if rehearsal else _TOKENS
            cublas.append(_cublas(card, matrices, counts, allowance))
        del matrices
        card.free()
    path = Path(output or file_name(dev.card()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(dev.card(), rows, cublas), "utf-8")
    print(f"{path}: {len(rows)} rows")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _works(formats: Sequence[str], shapes: Sequence[tuple[int, int]]) -> list[Work]:
    known = {fmt.name: fmt for fmt in launches.WEIGHTS}
    works = []
    for name in formats:
        if name not in known:
            raise BackendUnavailable(
                f"--format {name} has no kernel on the GPU; known: {', '.join(known)}"
            )
        fmt = known[name]
        for columns, rows in shapes:
            if columns % fmt.block_elements:
                raise BackendUnavailable(
                    f"--shape {columns}x{rows}: {name} has blocks of {fmt.block_elements} "
                    f"elements, which do not divide {columns}"
                )
            takes = ["", *(kind for other, kind in eight_bits() if other is fmt)]
            works += [Work(fmt, rows, columns, kind) for kind in takes]
    return works


def _best(
    card: Card,
    x: torch.Tensor,
    tokens: int,
    matrices: Sequence[Matrix],
    allowance: float,
) -> Options | None:
    """The fastest configuration for x in tiles of `tokens`; None where the default serves as well.

    In a rehearsal, where there are no times, the first that is allowed.
    """
    key = Key.of(matrices[0], x.dtype, tokens)
    out = torch.empty(len(x), matrices[0].shape[0], device=x.device, dtype=x.dtype)

    def measured(tuned: Tuned) -> tuple[torch.Tensor, float | None]:
        turns: list[Launch] = [launches.multiply(x, m, out, tuned=tuned) for m in matrices]
        out.fill_(float("nan"))
        turns[0]()
        bits = out.clone()
        times = card.time(turns, allowance)
        return bits, None if times is None else times.median

    want, default = measured(UNTUNED)
    best, least = None, None if default is None else _WORTH * default
    for options in CANDIDATES:
        try:
            bits, seconds = measured(Tuned({key: options}, "a candidate"))
        except TritonError as error:  # more shared memory, or registers, than there are
            _say(f"  {options}: {type(error).__name__}")
            continue
        if not same_bits(bits, want):
            _say(f"  {options}: other bits than the default; left out")
        elif seconds is None or least is None:
            return options
        elif seconds < least:
            best, least = options, seconds
    return best


def _cublas(
    card: Card, matrices: Sequence[Matrix], counts: Sequence[int], allowance: float
) -> dict[str, Any]:
    """What tuned.render is told of torch's product, of `counts` rows with such a weight."""
    weights = [m.data for m in matrices if isinstance(m, FloatMatrix)]
    (rows, columns), dtype = weights[0].shape, weights[0].dtype
    x = torch.randn(counts[-1], columns, device=card.device).to(dtype)
    out = torch.empty(counts[-1], rows, device=card.device, dtype=dtype)
    whole = x @ weights[0].t()
    invariant = all(same_bits(x[-n:] @ weights[0].t(), whole[-n:]) for n in counts)
    same = Products(counts=(counts[-1], counts[-2])).has_our_bits(matrices[0], dtype)

    def ahead(count: int) -> bool:
        part, to = x[:count], out[:count]
        ours = card.time([launches.multiply(part, m, to) for m in matrices], allowance)
        theirs = card.time(
            [lambda w=w: torch.mm(part, w.t(), out=to) for w in weights],  # type: ignore[misc]
            allowance,
        )
        return ours is not None and theirs is not None and theirs.median < ours.median

    faster = list(itertools.takewhile(ahead, reversed(counts)))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "columns": columns,
        "batch_invariant": invariant,
        "same_bits": same,
        "faster_from": faster[-1] if faster else None,
    }
