"""The tool formats that are known, as a table, and which of them a chat template writes.

Sources: the chat templates and model cards of the families named in each row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import harmony
from .calls import CallParser, JsonCalls, NamedCalls
from .parameters import ArgCalls, Fields, PythonCalls, XmlCalls

Tools = Mapping[str, Any]  # a tool's name -> the JSON schema of its parameters


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes calls. A template that has all of `has` and none of `lacks` is of it.

    `shape`: text before a call's name, between name and arguments, behind them. `around`: text
    before and behind all calls; `between`: two of them. `fields`: how arguments are written where
    they are no JSON object. `markers`: what of these may be special tokens. `short_ids`: ids of
    calls are nine letters and digits, as Mistral's templates demand.
    """

    name: str
    has: tuple[str, ...]
    parser: Callable[[Tools], CallParser]
    markers: tuple[str, ...]
    shape: tuple[str, str, str]
    fields: Fields | None = None
    between: str = "\n"
    around: tuple[str, str] = ("", "")
    lacks: tuple[str, ...] = ()
    short_ids: bool = False

    @property
    def marker(self) -> str:
        """What a call, or the first of several, begins with; "" where it is a whole text."""
        first = self.around[0] + self.shape[0]
        return next((m for m in self.markers if first.startswith(m)), "")

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls as a model of the family would write them."""
        before, middle, after = self.shape
        written = self.fields.write if self.fields else json.dumps
        texts = [f"{before}{n}{middle}{written(a)}{after}" for n, a in calls]
        return self.around[0] + self.between.join(texts) + self.around[1]


_HERMES = ("<tool_call>", "</tool_call>")
_SEED = ("<seed:tool_call>", "</seed:tool_call>")
_DEEPSEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
)
_KIMI = (
    "<|tool_calls_section_begin|>",
    "<|tool_calls_section_end|>",
    "<|tool_call_begin|>",
    "<|tool_call_end|>",
    "<|tool_call_argument_begin|>",
)
_LFM = ("<|tool_call_start|>", "<|tool_call_end|>")
# The last two stand around an answer's text.
_COMMAND = ("<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
_PARAMETERS = Fields(
    "<parameter=",
    ">\n",
    pad="\n",
    end="</parameter>",
    tail="\n",
    stops=("<parameter=", "</function>"),
)
_MISTRAL = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
_NAME = r"(?P<name>[\w.:/-]{1,128})"
_MISTRAL_HEAD = re.compile(rf"\s*{_NAME}(?:\[CALL_ID\]\s*\w+)?\s*(?:\[ARGS\])?\s*")
_DEEPSEEK_HEAD = re.compile(
    rf"\s*(?:function<｜tool▁sep｜>)?{_NAME}(?:<｜tool▁sep｜>|\s*```json)\s*"
)
_KIMI_HEAD = re.compile(
    r"\s*(?:functions\.)?(?P<name>[\w./-]{1,128})(?::\d+)?\s*<\|tool_call_argument_begin\|>\s*"
)


def _mistral(tools: Tools) -> CallParser:
    return NamedCalls(("[TOOL_CALLS]",), _MISTRAL_HEAD, lists=True)


def _deepseek(tools: Tools) -> CallParser:
    begins, end, drops = _DEEPSEEK[2:3], _DEEPSEEK[3], _DEEPSEEK[:2]
    return NamedCalls(begins, _DEEPSEEK_HEAD, end, drops=drops, fence="```")


TOOL_FORMATS = {
    f.name: f
    for f in (
        ToolFormat(  # Mistral Small 3.2, Devstral, Magistral
            "mistral",
            ("[TOOL_CALLS]", "[ARGS]"),
            _mistral,
            _MISTRAL,
            ("[TOOL_CALLS]", "[ARGS]", ""),
            between="",
            short_ids=True,
        ),
        ToolFormat(  # Mistral 7B v0.3, Nemo, Large
            "mistral_json",
            ("[TOOL_CALLS]",),
            _mistral,
            _MISTRAL,
            ('{"name": "', '", "arguments": ', "}"),
            between=", ",
            around=("[TOOL_CALLS][", "]"),
            short_ids=True,
        ),
        ToolFormat(  # Kimi K2
            "kimi_k2",
            ("<|tool_call_begin|>",),
            lambda tools: NamedCalls(_KIMI[2:3], _KIMI_HEAD, _KIMI[3], drops=_KIMI[:2]),
            _KIMI,
            ("<|tool_call_begin|>functions.", ":0<|tool_call_argument_begin|>", _KIMI[3]),
            between="",
            around=(_KIMI[0], _KIMI[1]),
        ),
        ToolFormat(  # DeepSeek V3, R1 and its distillations
            "deepseek_v3",
            ("<｜tool▁calls▁begin｜>", "```json"),
            _deepseek,
            _DEEPSEEK,
            ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", f"\n```{_DEEPSEEK[3]}"),
            around=(_DEEPSEEK[0], _DEEPSEEK[1]),
        ),
        ToolFormat(  # DeepSeek V3.1
            "deepseek_v31",
            ("<｜tool▁calls▁begin｜>",),
            _deepseek,
            _DEEPSEEK,
            ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", _DEEPSEEK[3]),
            between="",
            around=(_DEEPSEEK[0], _DEEPSEEK[1]),
        ),
        ToolFormat(  # Seed-OSS
            "seed_oss",
            ("<seed:tool_call>", "<function="),
            lambda tools: XmlCalls(_SEED, tools),
            _SEED,
            ("<seed:tool_call>\n<function=", ">\n", "</function>\n</seed:tool_call>"),
            _PARAMETERS,
        ),
        ToolFormat(  # Qwen3-Coder, Nemotron 3, Step 3.5
            "qwen3_coder",
            ("<function=", "<parameter="),
            lambda tools: XmlCalls(_HERMES, tools),
            _HERMES,
            ("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>"),
            _PARAMETERS,
        ),
        ToolFormat(  # GLM-4.5, 4.6
            "glm45",
            ("<tool_call>{function-name}\n<arg_key>",),
            lambda tools: ArgCalls(_HERMES, tools),
            _HERMES,
            ("<tool_call>", "\n", "</tool_call>"),
            Fields(
                "<arg_key>",
                "</arg_key>\n<arg_value>",
                end="</arg_value>",
                tail="\n",
                stops=("<arg_key>", "</tool_call>"),
            ),
        ),
        ToolFormat(  # GLM-4.7
            "glm47",
            ("<arg_key>", "<arg_value>"),
            lambda tools: ArgCalls(_HERMES, tools),
            _HERMES,
            ("<tool_call>", "", "</tool_call>"),
            Fields(
                "<arg_key>",
                "</arg_key><arg_value>",
                end="</arg_value>",
                stops=("<arg_key>", "</tool_call>"),
            ),
            between="",
        ),
        ToolFormat(  # LFM2, LFM2.5
            "lfm2",
            ("List of tools: ", "<|im_start|>"),
            lambda tools: PythonCalls(_LFM, tools),
            _LFM,
            ("", "(", ")"),
            Fields("", "=", between=", ", quoted=True),
            between=", ",
            around=(f"{_LFM[0]}[", f"]{_LFM[1]}"),
        ),
        ToolFormat(  # Command R7B, Command A
            "command",
            ("<|START_ACTION|>", '"tool_name"'),
            lambda tools: JsonCalls(("<|START_ACTION|>",), "<|END_ACTION|>", drops=_COMMAND[2:]),
            _COMMAND,
            ('{"tool_call_id": "0", "tool_name": "', '", "parameters": ', "}"),
            between=",\n    ",
            around=("<|START_ACTION|>[\n    ", "\n]<|END_ACTION|>"),
        ),
        ToolFormat(  # gpt-oss
            "harmony",
            ("<|channel|>analysis<|message|>", "functions."),
            lambda tools: NamedCalls(
                (harmony.CALL,), harmony.HEAD, "<|call|>", drops=("<|start|>assistant",)
            ),
            harmony.MARKERS,
            (harmony.CALL, " <|constrain|>json<|message|>", "<|call|>"),
            between="<|start|>assistant",
        ),
        ToolFormat(  # Granite 3
            "granite",
            ("<|tool_call|>",),
            lambda tools: JsonCalls(("<|tool_call|>",)),
            ("<|tool_call|>",),
            ('{"name": "', '", "arguments": ', "}"),
            between=", ",
            around=("<|tool_call|>[", "]"),
        ),
        ToolFormat(  # Apriel 1.5
            "apriel",
            ("<tool_calls>[",),
            lambda tools: JsonCalls(("<tool_calls>",), "</tool_calls>"),
            ("<tool_calls>", "</tool_calls>"),
            ('{"name": "', '", "arguments": ', "}"),
            between=", ",
            around=("<tool_calls>[", "]</tool_calls>"),
        ),
        ToolFormat(  # Hermes 2 and 3, Qwen2.5, Qwen3, QwQ, Granite 4 and many others
            "hermes",
            ("<tool_call>",),
            lambda tools: JsonCalls(_HERMES[:1], _HERMES[1]),
            _HERMES,
            ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"),
            lacks=("<arg_key>",),
        ),
        ToolFormat(  # Llama 3.1, 3.2, 3.3
            "llama3",
            ('"parameters": dictionary of argument name',),
            lambda tools: JsonCalls(("<|python_tag|>",), bare=frozenset(tools)),
            ("<|python_tag|>",),
            ('{"name": "', '", "parameters": ', "}"),
            between="; ",
        ),
    )
}


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template writes; None where it is none of the table's."""
    for row in TOOL_FORMATS.values():
        if all(s in template for s in row.has) and not any(s in template for s in row.lacks):
            return row
    return None


__all__ = ["TOOL_FORMATS", "ToolFormat", "Tools", "tool_format_of"]
