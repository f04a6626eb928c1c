"""Two streams in one batch, and one that is left early: python examples/async_stream.py [MODEL]"""

import asyncio
import sys

from engineroom import AsyncLLM, SamplingParams


async def tell(llm: AsyncLLM, prompt: str, max_chars: int) -> str:
    """The completion, left as soon as it is long enough; that frees its memory at once."""
    text = ""
    stream = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=48))
    async for output in stream:
        text = output.outputs[0].text
        if len(text) >= max_chars:
            break
    await stream.aclose()
    return text


async def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    async with AsyncLLM(model, max_num_seqs=4) as llm:
        texts = await asyncio.gather(
            tell(llm, "The mountain is", 1000), tell(llm, "The river is", 20)
        )
    for text in texts:
        print(repr(text))


if __name__ == "__main__":
    asyncio.run(main())
