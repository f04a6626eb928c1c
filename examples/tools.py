"""A model that calls Python functions: python examples/tools.py [MODEL]"""

import json
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime

import openai

# Whatever the model was trained on, it is told of its tools and calls them by this template.
TEMPLATE = """{%- if tools %}<|im_start|>system
<tool_call>{"name": ..., "arguments": {...}}</tool_call> calls one of:
{% for t in tools %}{{ t.function.name }} {{ t.function.parameters.properties | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or "" }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}
<|im_end|>
{% endfor %}<|im_start|>assistant
"""
PLACES = {"type": "string", "enum": ["Paris", "Rome"]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": takes,
                "required": list(takes),
                "additionalProperties": False,
            },
        },
    }
    for name, takes in (("weather", {"at": PLACES}), ("now", {}))
]
FUNCTIONS = {
    "weather": lambda at: f"Sunny in {at}, 21 degrees",
    "now": lambda: datetime.now(UTC).isoformat(timespec="minutes"),
}


def converse(client: openai.OpenAI, question: str) -> str:
    """Ask, run what the model calls, and ask again with what came of it."""
    messages = [{"role": "user", "content": question}]
    how = {"tools": TOOLS, "parallel_tool_calls": False, "max_tokens": 80, "temperature": 0}
    for choice in ("required", "none"):  # with a larger model: "auto", until it calls nothing
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=messages,
            tool_choice=choice,
            **how,
        ).choices[0]
        messages.append(answer.message.model_dump(exclude_none=True))
        for call in answer.message.tool_calls or ():
            result = FUNCTIONS[call.function.name](**json.loads(call.function.arguments))
            print(f"{call.function.name}({call.function.arguments}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return answer.message.content or ""


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        print(TEMPLATE, file=template, flush=True, end="")
        command = [sys.executable, "-m", "engineroom", "serve", model, "--port", "0"]
        command += ["--chat-template", template.name, "--max-num-seqs", "1"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            try:
                said = next(filter(None, (re.search(r"http://\S+:\d+", s) for s in server.stderr)))
                client = openai.OpenAI(base_url=f"{said[0]}/v1", api_key="none")
                print(converse(client, "What is the weather in Paris?"))
            finally:
                server.terminate()


if __name__ == "__main__":
    main()
