"""`engineroom inspect`: what a model is and whether it fits here, read from its headers alone."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from typing import Any

from ...kernels.choose import choose
from ..config import EngineConfig, ModelConfig, show_bytes
from ..load.checkpoint import Checkpoint, open_checkpoint
from ..load.source import resolve
from ..runtime.assemble import plan_load
from ..runtime.load import open_model
from ..runtime.memory import MemoryPlan
from .choices import list_choices, recommend
from .choices import render as render_choices


def inspect_model(config: EngineConfig) -> dict[str, Any]:
    """Everything that the headers tell, as plain values. No weight is read.

    The plan is the one that loading would make. Errors: SourceError, CheckpointError, ConfigError,
    BackendUnavailable.
    """
    source = resolve(config.model, progress=sys.stderr)
    checkpoint = open_checkpoint(source.path)
    try:
        module, model = open_model(checkpoint)
        choice = choose(config.device)
        load = plan_load(config, checkpoint, module, model, choice)
        plan = load.memory
        choices = list_choices(config)
        best, why = recommend(choices)
        return {
            "name": source.name,
            "path": str(source.path),
            "kind": checkpoint.kind,
            "architecture": checkpoint.architecture,
            "family": model.family,
            "parameters": sum(math.prod(checkpoint.shape(n)) for n in checkpoint.tensor_names),
            "formats": _formats(checkpoint),
            "model": _model(model),
            "chat_template": _has_chat_template(checkpoint),
            "backend": choice.name,
            "quantization": load.config.quantization,
            "compute_dtype": load.config.dtype,
            "kv_cache_dtype": load.kv.dtype,
            "memory": _memory(plan),
            "fits": plan.fits,
            "because": plan.because,
            "choices": choices,
            "recommended": {"quantization": best, "because": why},
            "notes": [*checkpoint.notes, *model.notes, *load.notes, *plan.notes],
        }
    finally:
        checkpoint.close()


def _formats(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Per format: tensors, elements, bytes and bits per weight, most bytes first."""
    tensors: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name in checkpoint.tensor_names:
        weight = checkpoint.tensor(name)
        tensors[weight.format.name].append((math.prod(weight.shape), weight.nbytes))
    rows = []
    for name, sizes in tensors.items():
        elements, size = sum(e for e, _ in sizes), sum(b for _, b in sizes)
        rows.append(
            {
                "format": name,
                "tensors": len(sizes),
                "parameters": elements,
                "bytes": size,
                "bits_per_weight": 8 * size / elements if elements else 0.0,
            }
        )
    return sorted(rows, key=lambda row: -row["bytes"])


def _model(model: ModelConfig) -> dict[str, Any]:
    windows = sorted({w for w in model.windows if w})
    return {
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "context": model.max_position,
        "rope": model.rope.kind,
        "sliding_windows": windows,
        "sliding_layers": sum(1 for w in model.windows if w),
        "tied_embeddings": model.tie_embeddings,
        "experts": model.num_experts,
        "experts_per_token": model.experts_per_token,
        "shared_expert": bool(model.shared_expert_size),
        "expert_layers": model.num_mixtures,
    }


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    if checkpoint.kind == "gguf":
        return bool(checkpoint.metadata.get("tokenizer.chat_template"))
    if (checkpoint.path / "chat_template.jinja").is_file():
        return True
    return any(
        '"chat_template"' in (checkpoint.path / name).read_text("utf-8", "replace")
        for name in ("tokenizer_config.json", "chat_template.json")
        if (checkpoint.path / name).is_file()
    )


def _memory(plan: MemoryPlan) -> dict[str, Any]:
    contexts = sorted({c for c in (1024, 4096, plan.max_model_len) if 0 < c <= plan.max_model_len})
    return {
        "available": plan.available,
        "budget": plan.budget,
        "weights": plan.weights,
        "workspace": plan.workspace,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv": plan.kv,
        "kv_tokens": plan.kv_tokens,
        "block_size": plan.block_size,
        "num_blocks": plan.num_blocks,
        "total": plan.total,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "requests_at": {context: plan.requests_at(context) for context in contexts},
    }


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    model, memory = report["model"], report["memory"]
    kv_per_token = show_bytes(memory["kv_bytes_per_token"])
    lines = [
        f"{report['name']}  ({report['path']})",
        f"  architecture   {report['architecture']} ({report['kind']}, family {report['family']})",
        f"  parameters     {report['parameters'] / 1e6:,.1f} million",
        f"  shape          {model['layers']} layers, hidden {model['hidden_size']}, "
        f"{model['heads']} heads over {model['kv_heads']} kv heads of {model['head_dim']}, "
        f"vocabulary {model['vocab_size']:,}",
        *_experts(model),
        f"  context        {model['context']:,} tokens{_windows(model)}",
        f"  chat template  {'yes' if report['chat_template'] else 'no'}",
        "  formats",
    ]
    lines += [
        f"    {row['format']:<6} {row['tensors']:>4} tensors  {row['bits_per_weight']:>6.2f} bits "
        f"per weight  {show_bytes(row['bytes']):>10}"
        for row in report["formats"]
    ]
    if report["quantization"] is not None:
        lines.append(f"  quantised to   {report['quantization']}, on load")
    lines += [
        f"  computed in    {report['compute_dtype']}, KV cache in {report['kv_cache_dtype']}",
        f"  weights        {show_bytes(memory['weights'])}",
        f"  KV cache       {show_bytes(memory['kv'])}: {memory['kv_tokens']:,} tokens "
        f"at {kv_per_token} each",
        f"  workspace      {show_bytes(memory['workspace'])}",
        f"  total          {show_bytes(memory['total'])} of a budget of "
        f"{show_bytes(memory['budget'])} ({show_bytes(memory['available'])} available)",
    ]
    lines += [
        f"  at {context:,} tokens of context: {count} request{'' if count == 1 else 's'} at once"
        for context, count in memory["requests_at"].items()
        if report["fits"]
    ]
    lines += render_choices(report["choices"])
    lines += [f"  note: {note}" for note in report["notes"]]
    lines.append(f"will it fit: {'yes' if report['fits'] else 'no'}, because {report['because']}")
    return "\n".join(lines)


def _experts(model: dict[str, Any]) -> list[str]:
    if not model["experts"]:
        return []
    shared = ", and a shared one" if model["shared_expert"] else ""
    return [
        f"  experts        {model['experts_per_token']} of {model['experts']} a token{shared}, "
        f"in {model['expert_layers']} layers"
    ]


def _windows(model: dict[str, Any]) -> str:
    if not model["sliding_windows"]:
        return ""
    sizes = ", ".join(str(w) for w in model["sliding_windows"])
    return f"; {model['sliding_layers']} layers see the last {sizes} only"


__all__ = ["inspect_model", "render"]
