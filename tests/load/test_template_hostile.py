"""Templates made to hang, swell, crash or break out: each an error within its limits."""

# ruff: noqa: E501 (a table of templates, one line each)

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from engineroom.engine.load.chat_template import ChatTemplate, TemplateError

USER: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LIMITS = {"limit", "runtime", "security", "syntax", "crashed"}

HOSTILE = {
    "endless range": "{% for i in range(10**9) %}x{% endfor %}",
    "huge string": "{{ 'a'*10**9 }}",
    "huge list": "{{ [0]*10**9 }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}",
    "much output": "{% for a in range(99999) %}{{ 'aaaaaaaaaa' * 1000 }}{% endfor %}",
    "much output in one": "{{ 'é' * (2**23 // 2 + 1) }}",
    "recursive macro": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "recursive macro, twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [[]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "power": "{{ (10**(10**8)) % 7 }}",
    "power of a power": "{{ 9**(9**9) }}",
    "format width": "{{ '%999999999d' | format(1) }}",
    "center": "{{ 'x' | center(999999999) }}",
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "lipsum globals": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "cycler init": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "self": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment }}",
    "namespace class": "{{ namespace.__init__.__globals__ }}",
    "dict class": "{{ dict.__class__.__init__.__globals__ }}",
    # CVE-2024-56326: str.format reached through a filter, so that the sandbox did not see the call
    "format by map": "{{ ['{0.__class__.__mro__}'] | map('format', 1) | list }}{{ ''.__class__ }}",
    "indirect format": "{% set f = '{0.__class__.__init__.__globals__}'.format %}{{ f(raise_exception) }}",
    # CVE-2025-27516: str.format through the attr filter
    "attr format": "{{ ('{0.__class__.__init__.__globals__}' | attr('format'))(raise_exception) }}",
    "attr class": "{{ '' | attr('__class__') | attr('__mro__') }}{{ ('' | attr('__class__')).__mro__ }}",
    "import": "{% import 'os' as os %}{{ os.system('id') }}",
    "include": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "changes its input": "{{ messages.append({}) }}",
    "lines of a syntax error": "{{ x" + "\n" * 100_000 + "}",
}


# What stops some of them, where another limit further out would also do.
STOPPED_BY = {
    "huge string": "needs too much memory",
    "huge list": "needs too much memory",
    "much output": "more than 8388608 bytes of text",
    "much output in one": "more than 8388608 bytes of text",
    "recursive macro": "recurses too deeply",
    "nested loops": "took longer than 1 s",
    "changes its input": "unsafe",
}


@pytest.fixture(scope="module")
def template() -> Iterator[ChatTemplate]:
    made = ChatTemplate(GOOD, special_tokens={}, origin="a test")
    made.render(USER)
    yield made
    made.close()


def render(template: ChatTemplate, source: str) -> str:
    template.source = source
    return template.render(USER)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_and_the_next_one_renders(template: ChatTemplate, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        text = render(template, HOSTILE[name])
        # What jinja calls undefined prints as nothing; anything more would be a way out.
        assert text == "", text[:200]
        raise TemplateError("nothing came out", kind="security")
    assert caught.value.kind in LIMITS
    if sys.platform == "linux":  # elsewhere memory may have no limit, and time has to do
        assert STOPPED_BY.get(name, "") in str(caught.value)
    assert time.monotonic() - began < 15  # 1 s, and a new process on a busy machine
    assert render(template, GOOD) == "<user>Hi"


def test_the_formatting_hole_shows_nothing(template: ChatTemplate) -> None:
    """CVE-2024-56201 and -56326: neither a file name nor a format reaches the interpreter."""
    for source in (
        "{{ '{0.__globals__}'.format(raise_exception) }}",
        "{% set x = '{0.__class__}' %}{{ x.format_map({'0': 1}) }}",
        "{{ '%s' % raise_exception.__globals__ }}",
    ):
        try:
            text = render(template, source)
        except TemplateError:
            continue
        assert "builtins" not in text and "class" not in text


def test_a_hostile_template_costs_its_neighbour_nothing(template: ChatTemplate) -> None:
    """While one rendering runs into its limit, others of the same template are answered."""
    switch = (
        "{% if messages[0].content == 'hang' %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}"
    )
    template.source = switch
    assert template.render(USER) == "Hi"
    failed: list[TemplateError] = []

    def hang() -> None:
        with pytest.raises(TemplateError) as caught:
            template.render([{"role": "user", "content": "hang"}])
        failed.append(caught.value)

    thread = threading.Thread(target=hang)
    thread.start()
    time.sleep(0.05)
    answered = 0
    while thread.is_alive():
        assert template.render(USER) == "Hi"
        answered += 1
    thread.join()
    assert answered >= 3
    assert failed[0].kind == "limit" and "longer than 1 s" in str(failed[0])


def test_a_process_that_was_killed_is_replaced(template: ChatTemplate) -> None:
    render(template, GOOD)
    pool = template._pool
    for worker in pool._idle:
        os.kill(worker._process.pid, signal.SIGKILL)
        worker._process.wait()
    assert render(template, GOOD) == "<user>Hi"


def test_a_process_that_dies_while_rendering_is_an_error(template: ChatTemplate) -> None:
    render(template, GOOD)
    (pid, *_) = [worker._process.pid for worker in template._pool._idle][::-1]
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(TemplateError, match="ended the process it ran in") as caught:
        render(template, HOSTILE["nested loops"])
    timer.join()
    assert caught.value.kind == "crashed"
    assert render(template, GOOD) == "<user>Hi"


def test_a_process_that_is_stopped_is_replaced(template: ChatTemplate) -> None:
    render(template, GOOD)
    for worker in template._pool._idle:
        os.kill(worker._process.pid, signal.SIGSTOP)
    for _ in range(len(template._pool._idle)):
        with pytest.raises(TemplateError, match="longer than 1 s"):
            render(template, GOOD)
    assert render(template, GOOD) == "<user>Hi"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_is_left_behind() -> None:
    def children() -> set[str]:
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
            return set(file.read().split())

    before = children()
    made = ChatTemplate(HOSTILE["nested loops"], special_tokens={}, origin="a test")
    with pytest.raises(TemplateError):
        made.render(USER)
    made.close()
    del made
    assert children() <= before
