"""What the engine and a model are configured to be: frozen, resolved once, passed down.

`resolve()` returns a new object. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar


class ConfigError(ValueError):
    """A configuration that cannot be honoured: what, why, and how to mend it. `field` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


# ---------------------------------------------------------------------------------------- rope


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding as a checkpoint configures it; `table()` gives the frequencies.

    kind: default, linear, dynamic, llama3, yarn or longrope. Lengths are in tokens. Fields that a
    kind does not use stay at their defaults.
    """

    theta: float
    rotary_dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float = 0.0  # yarn, 0 = unset
    mscale_all_dim: float = 0.0  # yarn, 0 = unset
    truncate: bool = True  # yarn: round the correction range to whole dims
    attention_factor: float | None = None  # yarn, longrope: set in the checkpoint
    short_factor: tuple[float, ...] = ()  # longrope
    long_factor: tuple[float, ...] = ()  # longrope
    interleaved: bool = False  # GGUF's llama layout pairs (2j, 2j + 1)
    freq_divisors: tuple[float, ...] = ()  # GGUF rope_freqs.weight: divides each frequency

    KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

    def table(self, max_model_len: int) -> tuple[tuple[float, ...], float]:
        """(inverse frequencies [rotary_dim / 2], attention factor) for contexts to max_model_len.

        dynamic and longrope depend on the length in use; here that is max_model_len, fixed at load,
        so that a token's output never depends on how long its sequence becomes later (law 2).
        Sources: linear, Chen et al. 2023 (arXiv:2306.15595); dynamic, the NTK-aware scaling of the
        transformers library; llama3, Meta's Llama 3.1 reference; yarn, Peng et al. 2023
        (arXiv:2309.00071); longrope, Ding et al. 2024 (arXiv:2402.13753).
        """
        compute: dict[str, Callable[[], tuple[Sequence[float], float]]] = {
            "default": lambda: (self._base(self.theta), 1.0),
            "linear": lambda: ([f / self.factor for f in self._base(self.theta)], 1.0),
            "dynamic": lambda: (self._dynamic(max_model_len), 1.0),
            "llama3": lambda: (self._llama3(), 1.0),
            "yarn": self._yarn,
            "longrope": lambda: self._longrope(max_model_len),
        }
        freqs, attention_factor = compute[self.kind]()
        if self.freq_divisors:
            freqs = [f / d for f, d in zip(freqs, self.freq_divisors, strict=True)]
        return tuple(freqs), attention_factor

    def _base(self, theta: float) -> list[float]:
        return [theta ** -(2 * j / self.rotary_dim) for j in range(self.rotary_dim // 2)]

    def _dynamic(self, length: int) -> list[float]:
        original = self.original_max_position
        if length <= original:
            return self._base(self.theta)
        d = self.rotary_dim
        stretch = self.factor * length / original - (self.factor - 1)
        return self._base(self.theta * stretch ** (d / (d - 2)))

    def _llama3(self) -> list[float]:
        low = self.original_max_position / self.low_freq_factor
        high = self.original_max_position / self.high_freq_factor
        out = []
        for f in self._base(self.theta):
            wavelength = 2 * math.pi / f
            if wavelength > low:
                f /= self.factor
            elif wavelength >= high:
                smooth = (self.original_max_position / wavelength - self.low_freq_factor) / (
                    self.high_freq_factor - self.low_freq_factor
                )
                f = (1 - smooth) * f / self.factor + smooth * f
            out.append(f)
        return out

    def _yarn(self) -> tuple[list[float], float]:
        d, original = self.rotary_dim, self.original_max_position

        def correction_dim(rotations: float) -> float:
            return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = correction_dim(self.beta_fast), correction_dim(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        if low == high:
            high += 0.001
        freqs = []
        for j, f in enumerate(self._base(self.theta)):
            ramp = min(max((j - low) / (high - low), 0.0), 1.0)
            freqs.append(f / self.factor * ramp + f * (1 - ramp))

        def magnitude(scale: float, mscale: float) -> float:
            return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

        if self.attention_factor is not None:
            return freqs, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return freqs, magnitude(self.factor, self.mscale) / magnitude(
                self.factor, self.mscale_all_dim
            )
        return freqs, magnitude(self.factor, 1.0)

    def _longrope(self, length: int) -> tuple[list[float], float]:
        original = self.original_max_position
        divisors = self.long_factor if length > original else self.short_factor
        freqs = [f / d for f, d in zip(self._base(self.theta), divisors, strict=True)]
        factor = self.attention_factor
        if factor is None:
            factor = (
                1.0
                if self.factor <= 1
                else math.sqrt(1 + math.log(self.factor) / math.log(original))
            )
        return freqs, factor


# --------------------------------------------------------------------------------------- model


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family's forward() may read. Built by the family's own config_from_*()."""

    family: str  # name of the file in engine/models
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    max_position: int  # longest context, tokens: the checkpoint's, or at load what will be served
    rope: RopeConfig
    rope_local: RopeConfig | None = None  # of sliding-window layers, where it differs (Gemma 3)
    windows: tuple[int, ...] = ()  # per layer: sliding window in tokens, 0 = full
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0  # 1 where the checkpoint stores norm weight - 1
    activation: str = "silu"  # silu, gelu_tanh or clamped_silu
    attention_scale: float = 0.0  # 0 = 1 / sqrt(head_dim)
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    embedding_scale: float = 1.0
    num_experts: int = 0  # of each mixture of experts; 0: there is none
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of one expert
    shared_expert_size: int = 0  # of the expert that every token passes; 0: there is none
    renormalise_experts: bool = True  # the chosen experts' weights add up to 1
    dense_layers: tuple[
        int, ...
    ] = ()  # with num_experts: the layers that have one MLP all the same
    dtype: str = "float32"  # of a 16-bit checkpoint; float32 for quantised ones
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()  # what the reader of the checkpoint should know

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (0,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ConfigError(
                "windows", f"{len(self.windows)} windows for {self.num_layers} layers"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                "num_kv_heads",
                f"{self.num_heads} query heads do not share {self.num_kv_heads} kv heads evenly",
            )

    @property
    def score_scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def num_mixtures(self) -> int:
        """Layers whose MLP is a mixture of experts."""
        return self.num_layers - len(self.dense_layers) if self.num_experts else 0

    @property
    def longest_context(self) -> int:
        """The most tokens that may be asked for: dynamic rope stretches beyond max_position."""
        stretch = self.rope.factor if self.rope.kind == "dynamic" else 1.0
        return int(self.max_position * stretch)

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)


# -------------------------------------------------------------------------------------- engine

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = (*DTYPES, "int8", "fp8", "int4", "k8v4")
MAX_PROMPT_LOGPROB_ROWS = 64  # a request's prompt logprobs take at most this many rows of a step
DEVICES = ("auto", "cpu", "cuda", "reference")
ACTIVATIONS = ("auto", "int8", "fp8", "float32")
QUANTIZATIONS = ("int8", "int4", "fp8", "nf4", "bitsandbytes")
ENERGY_METERS = ("auto", "rapl", "nvml", "model")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs. None means: decided at load from the model and the machine.

    Sizes in tokens, memory in bytes (or text such as "4GiB", see `parse_bytes`).
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    save: str | None = None
    activations: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    memory_budget: int | str | None = None
    enable_prefix_caching: bool = True
    max_waiting: int = 1024
    threads: int | None = None
    packed_cache: bool = False
    chat_template: str | None = None
    step_log: str | None = None
    energy_meter: str = "auto"
    watts_per_core: float = 5.0
    price_per_kwh: float | None = None
    price_per_hour: float | None = None
    grams_per_kwh: float | None = None
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False

    BOUNDS: ClassVar[Mapping[str, tuple[int, int]]] = {
        "max_model_len": (1, 1 << 24),
        "max_num_seqs": (1, 4096),
        "max_num_batched_tokens": (1, 1 << 20),
        "block_size": (1, 1024),
        "num_blocks": (1, 1 << 31),
        "max_waiting": (1, 1 << 20),
        "threads": (1, 1024),
    }

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise ConfigError("model", "model must be a path, a Hugging Face id or a short name")
        for name, (low, high) in self.BOUNDS.items():
            value = getattr(self, name)
            if value is None and EngineConfig.__dataclass_fields__[name].default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    name, f"{name} must be an integer in {low}..{high}, not {value!r}"
                )
        for name in ("enable_prefix_caching", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    name, f"{name} must be True or False, not {getattr(self, name)!r}"
                )
        self._one_of("device", DEVICES)
        self._one_of("dtype", DTYPES)
        self._one_of("activations", ACTIVATIONS)
        self._one_of("kv_cache_dtype", KV_CACHE_DTYPES)
        self._one_of("energy_meter", ENERGY_METERS)
        for name in ("watts_per_core", "price_per_kwh", "price_per_hour", "grams_per_kwh"):
            self._rate(name, getattr(self, name))
        if self.quantization is not None:
            self._one_of("quantization", QUANTIZATIONS, "; None keeps the checkpoint's own bits")
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                "tensor_parallel_size",
                f"tensor_parallel_size={self.tensor_parallel_size}: more than one device is not "
                "supported yet; use 1",
            )
        if self.trust_remote_code:
            raise ConfigError(
                "trust_remote_code",
                "trust_remote_code=True: code from a checkpoint is never run; supported "
                "architectures are listed by `engineroom models`",
            )
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)

    @classmethod
    def from_options(cls, model: str, options: Mapping[str, Any]) -> EngineConfig:
        """Build from keyword options. Errors: ConfigError naming an unknown option's nearest."""
        known = [f.name for f in dataclasses.fields(cls) if f.name != "model"]
        for name in options:
            if name not in known:
                raise ConfigError(name, unknown_name("option", name, known))
        return cls(model=model, **options)

    @property
    def max_logit_rows(self) -> int:
        """Most rows of logits in one step: one per sequence, and one request's prompt logprobs."""
        return self.max_num_seqs + MAX_PROMPT_LOGPROB_ROWS

    def replace(self, **changes: Any) -> EngineConfig:
        return dataclasses.replace(self, **changes)

    def _rate(self, name: str, value: float | None) -> None:
        if value is None and name != "watts_per_core":
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1e9:  # type: ignore[operator]
            raise ConfigError(name, f"{name} must be a number in 0..1e9, not {value!r}")

    def _one_of(self, name: str, allowed: tuple[str, ...], more: str = "") -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ConfigError(
                name, f"{name} must be one of {', '.join(allowed)}, not {value!r}{more}"
            )


# ------------------------------------------------------------------------------------- helpers

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{u}b": n for u, n in _UNITS.items() if u in "kmgt" and u}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: int | str) -> int:
    """Bytes from an integer or text such as "3GiB", "512 MB". Errors: ConfigError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].lower() in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2].lower()])
    raise ConfigError(
        "memory_budget",
        f'memory_budget must be bytes above 0 or text such as "4GiB", not {value!r}',
    )


def show_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not known: the nearest one, then all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


__all__ = [
    "ConfigError",
    "EngineConfig",
    "ModelConfig",
    "RopeConfig",
    "parse_bytes",
    "show_bytes",
    "unknown_name",
]
