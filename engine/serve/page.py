"""The pages: one file each, with a policy that lets it run its own script and ask this server."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

_PAGES = Path(__file__).with_name("web")


@functools.cache
def _read(name: str) -> tuple[str, str]:
    """The page, and its Content-Security-Policy: script and style by their SHA-256."""
    text = (_PAGES / f"{name}.html").read_text("utf-8")
    script, style = (_source(text, tag) for tag in ("script", "style"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _source(text: str, tag: str) -> str:
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


def page(name: str) -> Response:
    """The answer to GET of a page: "chat" or "dashboard"."""
    text, policy = _read(name)
    headers = {"content-security-policy": policy, "referrer-policy": "no-referrer"}
    return Response(text, headers=headers, media_type="text/html")


__all__ = ["page"]
