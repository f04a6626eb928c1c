"""Answer a file of requests, stop, and go on: python examples/batch.py [MODEL]"""

import json
import sys
import tempfile
from pathlib import Path

from engineroom import LLM

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time"]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    with tempfile.TemporaryDirectory() as folder, LLM(model, max_num_seqs=8) as llm:
        requests, answers = Path(folder) / "requests.jsonl", Path(folder) / "answers.jsonl"
        with requests.open("w") as file:
            for number, prompt in enumerate(PROMPTS):
                body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
                line = {"custom_id": f"q{number}", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        print(llm.batch(requests, answers))
        print(llm.batch(requests, answers))  # nothing is left to do
        for line in answers.read_text("utf-8").splitlines():
            answer = json.loads(line)
            print(answer["custom_id"], repr(answer["response"]["body"]["choices"][0]["text"]))


if __name__ == "__main__":
    main()
