"""The page at `/`: self-contained, allowed nothing but itself, and no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from pathlib import Path

from tests.house.tree import ROOT

from .conftest import Running
from .http import get


def test_the_page_runs_its_own_script_alone(server: Running) -> None:
    answer = get(server, "/")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_the_page_asks_nobody_else_and_makes_no_markup_of_text(server: Running) -> None:
    text = get(server, "/").body.decode()
    assert not re.search(r"https?://|//[a-z]+\.|<link|<img|<iframe|@import|url\(", text)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text
    # What the policy would refuse: a style or a handler written at an element.
    assert not re.search(r"\s(style|on[a-z]+)=", text)


def test_a_wheel_holds_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["scikit-build"]["wheel"]
    assert wheel["packages"]["engineroom/engine"] == "engine"
    assert (ROOT / "engine" / "serve" / "web" / "chat.html").is_file()
    page = Path("engineroom/engine/serve/web/chat.html")
    assert not any(page.match(pattern) for pattern in wheel["exclude"])
