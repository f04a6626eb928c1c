"""The formats that a model could run in here: size, bytes read a token, measured loss, a choice.

Losses are what `eval --keep` (or `inspect --measure`) measured of these very weights against the
checkpoint's own bits; what nobody measured is said to be not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ...kernels.choose import choose
from ...kernels.weights import RawWeight, WeightGroup
from ..config import QUANTIZATIONS, ConfigError, EngineConfig, show_bytes
from ..load.checkpoint import open_checkpoint
from ..load.source import resolve
from ..runtime.assemble import LoadPlan, plan_load
from ..runtime.load import open_model
from . import measured
from .evaluate import evaluate
from .texts import evaluation_text

GOOD_KL = 0.02  # nats: below it a model's choices are hardly told from those of its own bits
_MEASURED_CHUNKS = 4


def list_choices(config: EngineConfig) -> list[dict[str, Any]]:
    """Plain values of each way to hold the weights here, the checkpoint's own bits first.

    bytes and bits_per_weight of the weights as they are multiplied; token_bytes: what decoding one
    token reads of them, which bounds its speed; kl and top1: {"value", "error"}, or None. Reads no
    weight. Errors: those of opening the model.
    """
    source = resolve(config.model)
    checkpoint = open_checkpoint(source.path)
    try:
        module, model = open_model(checkpoint)
        choice = choose(config.device)
        results = measured.load(source.path, checkpoint.fingerprint())
        found = []
        for quantization in (None, *QUANTIZATIONS):
            asked = dataclasses.replace(config, quantization=quantization)
            try:
                plan = plan_load(asked, checkpoint, module, model, choice)
            except ConfigError:  # nothing to gain: the checkpoint has as few bits
                continue
            rows = {op.inputs[0] for op in plan.program if op.name == "embedding"}
            read = {i for op in plan.program if op.name != "embedding" for i in op.inputs}
            elements = token = 0
            for name, weight in plan.weights.items():
                parts = weight.parts if isinstance(weight, WeightGroup) else (weight,)
                elements += sum(part.num_rows * part.shape[-1] for part in parts)
                handle = plan.program.weights[name].id
                if handle in read or handle not in rows:
                    token += _read_bytes(plan, name, parts)
            loss = _loss(results, quantization, choice.name)
            found.append(
                {
                    "quantization": quantization,
                    "bytes": plan.memory.weights,
                    "bits_per_weight": 8 * plan.memory.weights / elements,
                    "token_bytes": token,
                    "fits": plan.memory.fits,
                    "kl": loss.get("mean_kl"),
                    "top1": loss.get("top1"),
                }
            )
        return found
    finally:
        checkpoint.close()


def _read_bytes(plan: LoadPlan, name: str, parts: Sequence[RawWeight]) -> int:
    """What a step reads of a weight, as the backend holds it: all of it, but not a table of the
    embedding that is held beside the head's own."""
    held = plan.backend.weights_bytes(plan.program, {name: plan.weights[name]})
    handle = plan.program.weights[name].id
    if not any(op.name == "embedding" and op.inputs[0] == handle for op in plan.program):
        return held
    table = sum(part.nbytes for part in parts if part.is_as_stored)
    return max(held - table, sum(part.packed_nbytes for part in parts))


def _loss(results: list[dict[str, Any]], quantization: str | None, backend: str) -> dict[str, Any]:
    """What was measured of this quantization against the checkpoint's own bits."""
    for result in results:
        against = result["against"]
        if (
            result["model"]["quantization"] == quantization
            and result["model"]["backend"] == backend
            and against is not None
            and against["quantization"] is None
            and against["fingerprint"] == result["model"]["fingerprint"]
        ):
            return result
    return {}


def measure(config: EngineConfig) -> None:
    """Measure and keep the loss of each choice that would load and has none. Errors: those of eval
    and of writing the file."""
    for row in list_choices(config):
        if row["quantization"] is None or row["kl"] is not None or not row["fits"]:
            continue
        asked = dataclasses.replace(config, quantization=row["quantization"])
        against = dataclasses.replace(config, quantization=None)
        text = evaluation_text()
        measured.save(evaluate(asked, against, text, most_chunks=_MEASURED_CHUNKS))


def recommend(choices: list[dict[str, Any]]) -> tuple[str | None, str]:
    """The quantization to take and why. The checkpoint's own bits lose nothing and need no
    measurement."""
    fitting = [c for c in choices if c["fits"]]
    if not fitting:
        return None, "none of them fits: free memory, or take a smaller model"
    small = [
        c
        for c in fitting
        if c["quantization"] is None or (c["kl"] is not None and c["kl"]["value"] <= GOOD_KL)
    ]
    if not small:
        best = max(fitting, key=lambda c: c["bits_per_weight"])
        return best["quantization"], (
            "it has the most bits of those that fit; its loss is "
            + ("not measured" if best["kl"] is None else f"KL {best['kl']['value']:.4f}")
        )
    best = min(small, key=lambda c: c["token_bytes"])
    unknown = [c["quantization"] for c in fitting if c["quantization"] and c["kl"] is None]
    more = f"; {', '.join(unknown)} not measured (--measure does it)" if unknown else ""
    if best["quantization"] is None:
        return None, f"nothing smaller is known to stay below a KL divergence of {GOOD_KL}{more}"
    return best["quantization"], (
        f"it reads the fewest bytes a token of those whose measured KL divergence "
        f"({best['kl']['value']:.4f}) is below {GOOD_KL}{more}"
    )


def render(choices: list[dict[str, Any]]) -> list[str]:
    """Lines for a terminal."""
    lines = ["  quantization   weights      bits   read a token       loss against its own bits"]
    own = choices[0]["token_bytes"]
    for c in choices:
        loss = "none" if c["quantization"] is None else "not measured"
        if c["kl"] is not None:
            loss = (
                f"KL {c['kl']['value']:.4f} ± {c['kl']['error']:.4f}, same token "
                f"{c['top1']['value']:.3f} ± {c['top1']['error']:.3f}"
            )
        share = f"{show_bytes(c['token_bytes'])} ({c['token_bytes'] / own:.2f})"
        fits = "" if c["fits"] else " (does not fit)"
        lines.append(
            f"    {c['quantization'] or 'None':<12} {show_bytes(c['bytes']):>9} "
            f"{c['bits_per_weight']:>8.2f}   {share:<18} {loss}{fits}"
        )
    quantization, why = recommend(choices)
    lines.append(f"  recommended    quantization={quantization}: {why}")
    return lines


__all__ = ["GOOD_KL", "list_choices", "measure", "recommend", "render"]
