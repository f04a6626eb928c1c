"""A conversation of two turns: python examples/chat.py [MODEL]"""

import sys

from engineroom import LLM, SamplingParams

QUESTIONS = ["What is the capital of France?", "And of Italy?"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    messages = []
    with LLM(model, max_num_seqs=1) as llm:
        for question in QUESTIONS:
            messages.append({"role": "user", "content": question})
            output = llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=32))[0]
            answer = output.outputs[0].text
            messages.append({"role": "assistant", "content": answer})
            cached = output.usage.cached_tokens  # the second turn finds the first one computed
            print(f"> {question}\n{answer}\n  ({cached} tokens of the prompt came from the cache)")


if __name__ == "__main__":
    main()
