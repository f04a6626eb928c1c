"""`engineroom eval`: perplexity, and how far a model's predictions are from another's.

A text is cut into chunks of `context` tokens, and the second half of each is scored, as llama.cpp's
llama-perplexity does it: a chunk begins with BOS where the tokenizer adds one (in place of its
first token), tokens context / 2 + 1 .. context - 1 are scored, and a last chunk that is not full is
dropped. Rows of the two models' distributions are compared as they come and kept nowhere.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...kernels.weights import WeightGroup
from ..config import ConfigError, EngineConfig
from ..llm import LLM
from ..load.tokenizer import Tokenizer
from ..runtime.assemble import plan_load
from ..runtime.load import open_model
from .texts import Text

_RESAMPLES = 200  # of the bootstrap that gives the percentile's standard error
_PERCENTILE = 99.9
# What the engine that is compared to may be told on its own; the rest is as for the model.
AGAINST_OPTIONS = ("device", "dtype", "quantization", "activations", "kv_cache_dtype")


@dataclass(frozen=True)
class Estimate:
    """A number measured over tokens, and its standard error, tokens taken as independent."""

    value: float
    error: float

    def as_plain(self) -> dict[str, float]:
        return {"value": self.value, "error": self.error}


@dataclass
class Scores:
    """What is kept of each scored token: three numbers and a yes or no."""

    nll: list[float] = field(default_factory=list)  # -log q(token)
    against_nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # KL(against || model) of the distributions
    same: list[bool] = field(default_factory=list)  # whether both have one most likely token

    def add(self, token: int, row: np.ndarray, against: np.ndarray | None) -> None:
        """Rows are fp32 log-probabilities [V]."""
        self.nll.append(-float(row[token]))
        if against is None:
            return
        self.against_nll.append(-float(against[token]))
        p = np.exp(against)
        with np.errstate(invalid="ignore"):  # what has no probability adds nothing
            terms = np.where(p > 0, p * (against - row), np.float32(0))
        self.kl.append(float(terms.sum(dtype=np.float64)))
        self.same.append(int(row.argmax()) == int(against.argmax()))

    def report(self) -> dict[str, Any]:
        """perplexity, mean_kl, kl_999 (99.9th percentile), top1: {"value", "error"} each."""
        found = {"perplexity": perplexity(self.nll)}
        if self.kl:
            found |= {
                "against_perplexity": perplexity(self.against_nll),
                "mean_kl": mean(self.kl),
                "kl_999": percentile(self.kl),
                "top1": share(self.same),
            }
        return {name: estimate.as_plain() for name, estimate in found.items()}


def mean(values: Sequence[float]) -> Estimate:
    array = np.asarray(values, np.float64)
    spread = array.std(ddof=1) if len(array) > 1 else math.nan
    return Estimate(float(array.mean()), float(spread / math.sqrt(len(array))))


def perplexity(nll: Sequence[float]) -> Estimate:
    """exp of the mean, its error by the first term of the exponential's series."""
    found = mean(nll)
    value = math.exp(found.value)
    return Estimate(value, value * found.error)


def share(yes: Sequence[bool]) -> Estimate:
    return mean([float(y) for y in yes])


def percentile(values: Sequence[float]) -> Estimate:
    """The 99.9th; its error is the spread over resamples drawn with replacement."""
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(len(array))
    drawn = [
        np.percentile(array[rng.integers(0, len(array), len(array))], _PERCENTILE)
        for _ in range(_RESAMPLES)
    ]
    return Estimate(float(np.percentile(array, _PERCENTILE)), float(np.std(drawn, ddof=1)))


def cut(tokenizer: Tokenizer, text: Text, context: int, most: int | None) -> list[list[int]]:
    """The text's chunks of `context` tokens, at most `most`. Errors: ConfigError."""
    if context < 4 or context % 2:
        raise ConfigError("context", f"a context is an even number of 4 and more, not {context}")
    ids = tokenizer.encode(text.text, parse_special=False)
    count = len(ids) // context
    if not count:
        raise ConfigError(
            "text",
            f"{text.name} has {len(ids)} tokens, fewer than the {context} of one chunk; take a "
            "longer text, or a smaller --context",
        )
    chunks = [ids[i * context : (i + 1) * context] for i in range(count)][:most]
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        for chunk in chunks:
            chunk[0] = tokenizer.bos_token_id
    return chunks


def second_half(llm: LLM, chunk: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(position, log-probabilities [V] of the token there) of the positions that are scored."""
    for position, rows in llm.score_stream(list(chunk[:-1])):
        for at, row in enumerate(rows, position):
            if at > len(chunk) // 2:
                yield at, row


def evaluate(
    config: EngineConfig,
    against: EngineConfig | None,
    text: Text,
    *,
    context: int = 512,
    most_chunks: int | None = None,
) -> dict[str, Any]:
    """Load one model, or two, and score a text; plain values.

    Errors: ConfigError for a text or a context that does not do, or tokenizers that differ; those
    of loading.
    """
    started = time.perf_counter()
    with _open(config, context) as llm:
        chunks = cut(llm.tokenizer, text, context, most_chunks)
        if against is None:
            scores = _score(llm, None, chunks)
            other = None
        else:
            with _open(against, context) as reference:
                _require_same_tokens(llm, reference, text, chunks, context)
                scores = _score(llm, reference, chunks)
                other = _facts(reference)
        return {
            "model": _facts(llm),
            "against": other,
            "text": {"name": text.name, "sha256": text.sha256},
            "context": context,
            "chunks": len(chunks),
            "scored_tokens": len(scores.nll),
            "seconds": time.perf_counter() - started,
            **scores.report(),
        }


def against_config(config: EngineConfig, given: Mapping[str, Any]) -> EngineConfig | None:
    """What --against and --against-OPTION ask for, None where none of them is given.

    The other model runs on the same device with every other option at its default; "none" as its
    quantization is its own bits. Errors: ConfigError.
    """
    options = {
        name: given[f"against_{name}"] for name in AGAINST_OPTIONS if f"against_{name}" in given
    }
    if given["against"] is None and not options:
        return None
    if options.get("quantization") == "none":
        options["quantization"] = None
    options = {"device": config.device, "threads": config.threads, **options}
    return EngineConfig.from_options(given["against"] or config.model, options)


def _score(llm: LLM, reference: LLM | None, chunks: Sequence[Sequence[int]]) -> Scores:
    from tqdm import tqdm  # late: it costs a tenth of a cold start

    scores = Scores()
    with tqdm(chunks, desc="scoring", unit="chunk", disable=not sys.stderr.isatty()) as bar:
        for chunk in bar:
            rows = second_half(llm, chunk)
            if reference is None:
                for at, row in rows:
                    scores.add(chunk[at], row, None)
            else:
                others = second_half(reference, chunk)
                for (at, row), (_, against) in zip(rows, others, strict=True):
                    scores.add(chunk[at], row, against)
            bar.set_postfix_str(f"perplexity {perplexity(scores.nll).value:.3f}")
    return scores


def _open(config: EngineConfig, context: int) -> LLM:
    """One request at a time: a cache for more would take memory for nothing."""
    blocks = -(-context // config.block_size) + 1
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    del options["model"]
    options |= {"max_num_seqs": 1, "max_model_len": context, "num_blocks": blocks}
    return LLM(config.model, **options)


def _require_same_tokens(
    llm: LLM, reference: LLM, text: Text, chunks: list[list[int]], context: int
) -> None:
    theirs = cut(reference.tokenizer, text, context, len(chunks))
    sizes = [one.engine.model_config.vocab_size for one in (llm, reference)]
    if theirs != chunks or sizes[0] != sizes[1]:
        raise ConfigError(
            "against",
            f"the two models do not read {text.name} as the same tokens (vocabularies of "
            f"{sizes[0]:,} and {sizes[1]:,}): their distributions cannot be compared",
        )


def _facts(llm: LLM) -> dict[str, Any]:
    """What was measured. The bits are those of the weights as they are multiplied, by their rows'
    formats: a table that is also the head counts once, whatever memory it takes."""
    loaded = llm.engine.loaded
    config, checkpoint = loaded.config, loaded.checkpoint
    module, model = open_model(checkpoint)
    plan = plan_load(config, checkpoint, module, model, loaded.backend_choice)
    parts = [
        part
        for weight in plan.weights.values()
        for part in (weight.parts if isinstance(weight, WeightGroup) else (weight,))
    ]
    elements = sum(math.prod(part.shape) for part in parts)
    size = sum(part.packed_nbytes for part in parts)
    return {
        "name": loaded.source.name,
        "path": str(loaded.source.path),
        "fingerprint": checkpoint.fingerprint(),
        "quantization": config.quantization,
        "activations": config.activations,
        "backend": loaded.backend.name,
        "weight_bytes": size,
        "bits_per_weight": 8 * size / elements,
    }


_ROWS = (
    ("perplexity", "perplexity", 4),
    ("against_perplexity", "perplexity of the other", 4),
    ("mean_kl", "mean KL divergence (nats)", 6),
    ("kl_999", "99.9th percentile of it", 4),
    ("top1", "same most likely token", 4),
)


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    lines = [_named("model", report["model"])]
    if report["against"] is not None:
        lines.append(_named("against", report["against"]))
    lines.append(
        f"text     {report['text']['name']} ({report['text']['sha256'][:12]}): "
        f"{report['chunks']} chunks of {report['context']} tokens, {report['scored_tokens']:,} "
        f"scored in {report['seconds']:.1f} s"
    )
    for key, title, digits in _ROWS:
        if key in report:
            value, error = report[key]["value"], report[key]["error"]
            lines.append(f"  {title:<26} {value:>12.{digits}f} ± {error:.{digits}f}")
    return "\n".join(lines)


def _named(what: str, facts: dict[str, Any]) -> str:
    quantised = f", quantised on load: {facts['quantization']}" if facts["quantization"] else ""
    return (
        f"{what:<8} {facts['name']}{quantised}: {facts['weight_bytes'] / 2**20:.1f} MiB, "
        f"{facts['bits_per_weight']:.2f} bits a weight, {facts['backend']} backend, activations "
        f"{facts['activations']}"
    )


__all__ = [
    "AGAINST_OPTIONS",
    "Estimate",
    "Scores",
    "against_config",
    "cut",
    "evaluate",
    "mean",
    "percentile",
    "perplexity",
    "render",
    "second_half",
]
