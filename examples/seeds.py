"""The same seed, the same text, whoever else is in the batch: python examples/seeds.py [MODEL]"""

import sys

from engineroom import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=2026)
    prompt = "My favourite colour is"
    with LLM(model, max_num_seqs=8) as llm:
        alone = llm.generate([prompt], params)[0].outputs[0]
        crowd = [params.replace(seed=i) for i in range(7)]
        beside = llm.generate([prompt] * 8, [params, *crowd])
        print(repr(alone.text))
        for output in beside:
            completion = output.outputs[0]
            same = "same as alone" if completion.token_ids == alone.token_ids else ""
            print(f"seed {completion.seed}: {completion.text!r} {same}")
        if beside[0].outputs[0].token_ids != alone.token_ids:
            raise SystemExit("the batch changed an output: that is a bug")


if __name__ == "__main__":
    main()
