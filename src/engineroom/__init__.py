"""The front door: the public names, resolved on first use, and nothing else.

Importing this package loads no third-party module: `engineroom --help` and tools that only want
the version stay fast. Each name is imported from the file that owns it when it is first touched.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from engineroom.engine.async_llm import AsyncLLM as AsyncLLM
    from engineroom.engine.batch import BatchError as BatchError
    from engineroom.engine.config import ConfigError as ConfigError
    from engineroom.engine.config import EngineConfig as EngineConfig
    from engineroom.engine.core.answers import CompletionOutput as CompletionOutput
    from engineroom.engine.core.answers import FinishReason as FinishReason
    from engineroom.engine.core.answers import Logprob as Logprob
    from engineroom.engine.core.answers import RequestOutput as RequestOutput
    from engineroom.engine.core.checks import AdmissionError as AdmissionError
    from engineroom.engine.core.parameter import ParameterError as ParameterError
    from engineroom.engine.core.sampling_params import SamplingParams as SamplingParams
    from engineroom.engine.core.structured import StructuredOutput as StructuredOutput
    from engineroom.engine.llm import LLM as LLM
    from engineroom.engine.load.mapped import CheckpointError as CheckpointError
    from engineroom.engine.load.source import SourceError as SourceError
    from engineroom.engine.load.template_process import TemplateError as TemplateError
    from engineroom.engine.runtime.memory import DoesNotFit as DoesNotFit
    from engineroom.kernels.backend import BackendUnavailable as BackendUnavailable

# Public name -> the module that owns it. A test holds this equal to the block above.
_OWNERS = {
    "LLM": "engineroom.engine.llm",
    "AsyncLLM": "engineroom.engine.async_llm",
    "BatchError": "engineroom.engine.batch",
    "SamplingParams": "engineroom.engine.core.sampling_params",
    "StructuredOutput": "engineroom.engine.core.structured",
    "RequestOutput": "engineroom.engine.core.answers",
    "CompletionOutput": "engineroom.engine.core.answers",
    "Logprob": "engineroom.engine.core.answers",
    "FinishReason": "engineroom.engine.core.answers",
    "ParameterError": "engineroom.engine.core.parameter",
    "AdmissionError": "engineroom.engine.core.checks",
    "EngineConfig": "engineroom.engine.config",
    "ConfigError": "engineroom.engine.config",
    "CheckpointError": "engineroom.engine.load.mapped",
    "SourceError": "engineroom.engine.load.source",
    "TemplateError": "engineroom.engine.load.template_process",
    "DoesNotFit": "engineroom.engine.runtime.memory",
    "BackendUnavailable": "engineroom.kernels.backend",
}

__all__ = ["__version__", *sorted(_OWNERS)]


def __getattr__(name: str) -> Any:
    owner = _OWNERS.get(name)
    if owner is None:
        raise AttributeError(f"module 'engineroom' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(owner), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_OWNERS})
