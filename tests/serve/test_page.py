"""The pages: self-contained, allowed nothing but itself, and no text becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
import tomllib
from pathlib import Path

import pytest

from tests.house.tree import ROOT

from .conftest import Running
from .http import completion, get, post

PAGES = ["/", "/dashboard"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_runs_its_own_script_alone(server: Running, path: str) -> None:
    answer = get(server, path)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy
    assert "unsafe" not in policy and "http" not in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.body.decode(), re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


@pytest.mark.parametrize("path", PAGES)
def test_a_page_asks_nobody_else_and_makes_no_markup_of_text(server: Running, path: str) -> None:
    text = get(server, path).body.decode()
    assert not re.search(r"https?://|//[a-z]+\.|<link|<img|<iframe|@import|url\(", text)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in text
    # What the policy would refuse: a style or a handler written at an element.
    assert not re.search(r"\s(style|on[a-z]+)=", text)


@pytest.mark.parametrize("name", ["chat.html", "dashboard.html"])
def test_a_wheel_holds_the_pages(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["scikit-build"]["wheel"]
    assert wheel["packages"]["engineroom/engine"] == "engine"
    assert (ROOT / "engine" / "serve" / "web" / name).is_file()
    page = Path("engineroom/engine/serve/web") / name
    assert not any(page.match(pattern) for pattern in wheel["exclude"])


def test_what_the_dashboard_shows(server: Running) -> None:
    post(server, "/v1/completions", completion(max_tokens=20))
    answer = get(server, "/dashboard/data")
    told = answer.json
    assert answer.headers["cache-control"] == "no-store"
    assert told["status"] == "ok" and told["model"] == "fake" and told["live_requests"] == 0
    latency = told["time_to_first_token_ms"]
    assert latency["count"] > 0 and latency["p50"] == latency["p99"] == 250.0
    assert told["per_token_ms"]["p50"] > 0


def test_percentiles() -> None:
    from engineroom.engine.serve.dashboard import Percentiles

    assert Percentiles.of([]) == Percentiles(0, None, None, None)
    of_hundred = Percentiles.of([n / 1000 for n in range(100)])
    assert of_hundred == Percentiles(100, 50.0, 90.0, 99.0)
