"""Complete a few prompts at once: python examples/generate.py [MODEL]"""

import sys

from engineroom import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    with LLM(model, max_num_seqs=8) as llm:
        for output in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=24)):
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
