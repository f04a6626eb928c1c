"""Which weights quantising on load makes small, and how small: the one place that decides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..kernels.weights import FP8, INT4, INT8, NF4, SMALL_FLOATS, Format, RawWeight, WeightGroup


@dataclass(frozen=True)
class Scheme:
    """`quantization=` as it is asked for: formats of the layers' weights and of the head's."""

    layers: Format
    head: Format | None  # None: it stays as it is

    @property
    def has_integers(self) -> bool:
        return any(f is not None and f.name not in SMALL_FLOATS for f in (self.layers, self.head))


# The head of a small model suffers most from 4 bits: docs/quantisation.md has what was measured.
SCHEMES: Mapping[str, Scheme] = {
    "int8": Scheme(INT8, INT8),
    "int4": Scheme(INT4, INT8),
    "fp8": Scheme(FP8, FP8),
    "nf4": Scheme(NF4, INT8),
    "bitsandbytes": Scheme(NF4, None),
}


class NothingToQuantise(ValueError):
    """The checkpoint has no more bits than were asked for."""


@dataclass(frozen=True)
class Quantised:
    """The weights with `pack_as` set where they become small, and what is to be said of it."""

    weights: dict[str, RawWeight | WeightGroup]
    notes: tuple[str, ...]


def quantise(
    weights: Mapping[str, RawWeight | WeightGroup], linear: Collection[str], head: str, method: str
) -> Quantised:
    """Mark the weights named in `linear`, of which `head` makes the logits, by SCHEMES[method].

    The others (norms, biases, a table that only rows are read of) stay as they are, and so does a
    weight of as many bits or fewer, or one whose rows are not whole blocks.

    Errors: NothingToQuantise where the weights have as few bits, on the mean, as the layers would.
    """
    scheme = SCHEMES[method]
    out = dict(weights)
    made: Counter[str] = Counter()
    sizes: Counter[str] = Counter()  # bytes
    kept: Counter[str] = Counter()
    odd: Counter[int] = Counter()
    chosen = {name: _parts(weight) for name, weight in weights.items() if name in linear}
    parts = [part for group in chosen.values() for part in group]
    elements = sum(part.num_rows * part.shape[-1] for part in parts)
    bits = 8 * sum(part.nbytes for part in parts) / max(elements, 1)
    if bits <= scheme.layers.bits_per_element:
        formats = ", ".join(sorted({part.format.name for part in parts}))
        raise NothingToQuantise(
            f"quantization={method!r} stores {scheme.layers.bits_per_element:g} bits a weight; the "
            f"checkpoint is quantised to {formats} already, {bits:.2f} bits a weight. Load it with "
            "quantization=None, or take a checkpoint of more bits"
        )
    for name, group in chosen.items():
        target = scheme.head if name == head else scheme.layers
        if target is None:
            continue
        small = []
        for part in group:
            if part.format.bits_per_element <= target.bits_per_element:
                kept[part.format.name] += 1
            elif part.shape[-1] % target.block_elements:
                odd[part.shape[-1]] += 1
            else:
                part = dataclasses.replace(part, pack_as=target)
                label = f"{target.name}{' (head)' if name == head else ''}"
                made[label] += 1
                sizes[label] += part.packed_nbytes
            small.append(part)
        out[name] = WeightGroup(tuple(small)) if len(small) > 1 else small[0]
    counts = ", ".join(
        f"{n} to {label}, {sizes[label] / 2**20:.1f} MiB" for label, n in made.items()
    )
    notes = [f"quantised on load, {method}: {counts or 'nothing'}"]
    notes += [f"{n} stay {name}, of no more bits" for name, n in kept.items()]
    notes += [
        f"{n} stay as they are: rows of {columns} are no whole groups of "
        f"{scheme.layers.block_elements}"
        for columns, n in odd.items()
    ]
    return Quantised(out, tuple(notes))


def _parts(weight: RawWeight | WeightGroup) -> tuple[RawWeight, ...]:
    return weight.parts if isinstance(weight, WeightGroup) else (weight,)


__all__ = ["SCHEMES", "NothingToQuantise", "Quantised", "Scheme", "quantise"]
