"""`engineroom complete`: text in, text out, streamed."""

from __future__ import annotations

from typing import TextIO

from ..core.answers import RequestOutput
from ..core.sampling_params import SamplingParams
from .chat import printable
from .session import Session


def stream_text(
    session: Session, prompt: str, params: SamplingParams, out: TextIO
) -> RequestOutput:
    """Write the completion as it grows; several samples follow each other, each under a heading.

    Returns the finished output. Errors: ParameterError, AdmissionError, RequestFailed.
    """
    last: RequestOutput | None = None
    terminal = out.isatty()
    single = params.num_samples == 1
    for output in session.run(prompt, params):
        last = output
        if single:
            out.write(printable(output.deltas[0]) if terminal else output.deltas[0])
            out.flush()
    if last is None:
        raise RuntimeError("the engine ended a request without an output")
    if not single:
        for completion in last.outputs:
            text = printable(completion.text) if terminal else completion.text
            out.write(f"--- sample {completion.index + 1} of {len(last.outputs)} ---\n{text}\n")
    elif terminal:
        out.write("\n")  # piped, the text is exact
    out.flush()
    return last


__all__ = ["stream_text"]
