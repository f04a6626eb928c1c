"""Print text as it is generated: python examples/stream.py [MODEL]"""

import sys

from engineroom import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    with LLM(model, max_num_seqs=1) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=48)
        for output in llm.stream("The sea is", params):
            print(output.deltas[0], end="", flush=True)
        usage, times = output.usage, output.timings
        print(f"\n({usage.completion_tokens} tokens in {times.total_s:.2f} s)")


if __name__ == "__main__":
    main()
