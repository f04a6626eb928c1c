"""How a server runs: where it listens, whom it lets in, and what it bounds."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import ClassVar

from ..config import ConfigError
from ..dialects.formats import TOOL_FORMATS
from ..dialects.reasoning import REASONING_FORMATS


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of `engineroom serve` beside the engine's own. Errors: ConfigError.

    `api_keys`: empty lets everybody in; "KEY weight=2" gives a key twice the share of one without
    (0.01 to 100) where several keys have requests waiting. `allowed_hosts`: names that a request's
    Host header may carry besides localhost, the bound host and IP addresses. Times in seconds but
    `timeout_ms`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None  # None: the name that --model was given
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    shared_prefix_cache: bool = False  # across API keys
    tool_format: str = "auto"  # by the chat template
    reasoning_format: str = "auto"
    timeout_ms: int | None = None  # of requests that name none
    drain_timeout: float = 30.0
    health_timeout: float = 30.0  # without progress on what runs, /health is 503
    otlp_endpoint: str | None = None  # where traces go; None: there are none
    max_body_bytes: int = 16 << 20
    max_header_bytes: int = 64 << 10
    data_dir: str | None = None  # of files and batches; None: there are none
    max_file_bytes: int = 200 << 20
    max_storage_bytes: int = 10 << 30  # of one API key's files
    batch_requests: int = 0  # in flight for all batches; 0: as many as the engine runs at once

    BOUNDS: ClassVar[dict[str, tuple[float, float]]] = {
        "port": (0, 65535),
        "timeout_ms": (1, 86_400_000),
        "drain_timeout": (0, 86_400),
        "health_timeout": (1, 3_600),
        "max_body_bytes": (1 << 10, 1 << 30),
        "max_header_bytes": (1 << 10, 1 << 20),
        "max_file_bytes": (1, 1 << 40),
        "max_storage_bytes": (1, 1 << 50),
        "batch_requests": (0, 1 << 20),
    }

    def __post_init__(self) -> None:
        for name, (low, high) in self.BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(name, f"{name} must be in {low:g}..{high:g}, not {value!r}")
        for name, formats in (
            ("tool_format", TOOL_FORMATS),
            ("reasoning_format", REASONING_FORMATS),
        ):
            known = ("auto", "none", *formats)
            if getattr(self, name) not in known:
                raise ConfigError(
                    name, f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}"
                )
        for key in self.weights:
            if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigError(
                    "api_keys",
                    "an API key is at least 8 printable ASCII characters without spaces; one of "
                    f"those given has {len(key)} characters",
                )
        if len(self.weights) != len(self.api_keys):
            raise ConfigError("api_keys", "an API key is given twice")
        if self.otlp_endpoint is not None and not re.match(r"https?://.", self.otlp_endpoint):
            raise ConfigError(
                "otlp_endpoint",
                f"otlp_endpoint={self.otlp_endpoint!r} is no address; an OTLP collector over HTTP "
                "is at one such as http://127.0.0.1:4318",
            )
        if not self.host:
            raise ConfigError("host", "host must be a name or an address, such as 127.0.0.1")
        if not self.is_local and not self.api_keys:
            raise ConfigError(
                "api_keys",
                f"host={self.host!r} can be reached from other machines and no API key is set; "
                "give --api-key-file FILE, or serve 127.0.0.1 behind a proxy that asks for one",
            )

    @property
    def weights(self) -> dict[str, float]:
        """Each API key's weight. Errors: ConfigError."""
        return dict(map(_key_and_weight, self.api_keys))

    @property
    def is_local(self) -> bool:
        """True where only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def _key_and_weight(entry: str) -> tuple[str, float]:
    key, *rest = entry.split(" ")
    if not rest:
        return key, 1.0
    match = re.fullmatch(r"weight=([0-9.]+)", " ".join(rest).strip())
    try:
        weight = float(match[1]) if match else 0.0
    except ValueError:
        weight = 0.0
    if not 0.01 <= weight <= 100:
        raise ConfigError(
            "api_keys",
            "an API key stands alone on its line, or before ` weight=NUMBER` of 0.01 to 100; one "
            "of those given is followed by something else",
        )
    return key, weight


__all__ = ["ServeConfig"]
