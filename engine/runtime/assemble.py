"""From a model's name to a runner that can answer: resolve, read, plan, load."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...kernels.backend import Backend, KVSpec
from ...kernels.choose import Choice, choose, create, preload
from ...kernels.program import Program
from ...kernels.weights import RawWeight, WeightGroup, WeightTooLarge
from ...quant.policy import NothingToQuantise, quantise
from .. import models
from ..config import QUANTIZATIONS, ConfigError, EngineConfig, ModelConfig
from ..load.chat_template import ChatTemplate, TemplateError, load_chat_template
from ..load.checkpoint import Checkpoint, open_checkpoint
from ..load.fetch import cache_dir
from ..load.mapped import CheckpointError
from ..load.source import ModelSource, resolve
from ..load.tokenizer import Tokenizer, load_tokenizer
from ..models import Family
from .heap import give_back_freed
from .keep import keep_quantised
from .load import open_model, raw_weights
from .memory import DoesNotFit, MemoryPlan, activation_dtype, kv_spec, plan_memory, too_long
from .runner import Runner

Progress = Callable[[str], None]
_log = logging.getLogger("engineroom")


@dataclass(frozen=True)
class LoadedModel:
    """Everything that one engine owns of its model."""

    source: ModelSource
    checkpoint: Checkpoint
    config: EngineConfig  # resolved: no field is None or "auto" that decides a computation
    model: ModelConfig
    backend_choice: Choice
    backend: Backend
    program: Program
    memory: MemoryPlan
    runner: Runner
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    load_s: float

    def require_chat_template(self) -> ChatTemplate:
        """The chat template. Errors: TemplateError where the checkpoint has none."""
        if self.chat_template is None:
            raise TemplateError(
                f"{self.source.name} has no chat template (looked in {self.source.path}). It may "
                "be a base model: use generate() or `engineroom complete`; or give a template with "
                "chat_template=PATH"
            )
        return self.chat_template

    def close(self) -> None:
        """End the template's helper process and unmap the checkpoint."""
        if self.chat_template is not None:
            self.chat_template.close()
        self.checkpoint.close()


@dataclass(frozen=True)
class LoadPlan:
    """What loading will do, known from headers alone."""

    config: EngineConfig  # dtypes resolved
    backend: Backend
    program: Program
    hidden: Callable[[], Program]  # the program without its head
    weights: Mapping[str, RawWeight | WeightGroup]
    kv: KVSpec
    memory: MemoryPlan
    notes: tuple[str, ...] = ()  # on what becomes of the weights' values


def plan_load(
    config: EngineConfig,
    checkpoint: Checkpoint,
    module: Family,
    model: ModelConfig,
    choice: Choice,
) -> LoadPlan:
    """Record the program and plan the memory, on the backend that will run it; reads no weight.

    Errors: CheckpointError, ConfigError, BackendUnavailable.
    """
    config = config.replace(dtype=activation_dtype(config, model))
    backend = create(
        choice,
        activation_dtype=config.dtype,
        threads=config.threads,
        activations=config.activations,
        packed_cache=_packed_cache(checkpoint) if config.packed_cache else None,
    )
    quantised = checkpoint.quantised or config.quantization is not None
    kv = kv_spec(config, model, backend.kv_dtype(config.dtype, quantised))
    config = config.replace(kv_cache_dtype=kv.dtype)
    # What is recorded may depend on the context served and on the dtype results are rounded to.
    context = min(config.max_model_len or model.max_position, model.longest_context)
    recorded = model.replace(max_position=context, dtype=config.dtype)
    program = models.record(module, recorded)
    weights = raw_weights(checkpoint, module, model)
    notes: tuple[str, ...] = ()
    if config.quantization is not None:
        weights, notes = _quantised(weights, program, config.quantization, checkpoint)
    notes += backend.packing_notes(weights)
    memory = plan_memory(
        config,
        model,
        weight_bytes=backend.weights_bytes(program, weights),
        workspace_bytes=backend.workspace_bytes(
            program,
            config.max_num_batched_tokens,
            config.max_logit_rows,
            context,
            weights=weights,
            kv=kv,
        ),
        kv=kv,
        available=backend.available_memory(),
    )
    hidden = functools.partial(models.record_hidden, module, recorded)
    return LoadPlan(config, backend, program, hidden, weights, kv, memory, notes)


def linear_weights(program: Program, *, every: bool = False) -> list[str]:
    """The weights that may become small, in order, the head's last.

    What decides which experts a token takes, and how much of them, keeps its bits: it is small, and
    is among them with `every` only.
    """
    deciding = {op.inputs[0] for op in program if op.name == "top_experts"}
    deciding |= {op.inputs[1] for op in program if op.name == "sigmoid_scale"}
    return [
        program.handles[op.inputs[1]].name  # type: ignore[index]
        for op in program
        if op.name in ("linear", "expert_linear") and (every or op.output not in deciding)
    ]


def _quantised(
    weights: Mapping[str, RawWeight | WeightGroup],
    program: Program,
    method: str,
    checkpoint: Checkpoint,
) -> tuple[dict[str, RawWeight | WeightGroup], tuple[str, ...]]:
    """The weights marked for quantising, and notes. Errors: ConfigError where nothing is gained."""
    linear = linear_weights(program)
    try:
        made = quantise(weights, linear, linear[-1], method)
    except NothingToQuantise as error:
        raise ConfigError("quantization", f"{checkpoint.path}: {error}") from None
    return made.weights, made.notes


def _packed_cache(checkpoint: Checkpoint) -> tuple[Path, str]:
    """Where a checkpoint's packed weights are kept, one file for each path, and its fingerprint."""
    path = checkpoint.path.resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return cache_dir() / "packed" / f"{path.stem}-{digest[:16]}", checkpoint.fingerprint()


def _kept(config: EngineConfig, say: Progress) -> EngineConfig:
    """The configuration of loading what is quantised from the folder that keeps it."""
    folder, method = Path(config.save or ""), config.quantization
    if method is None:
        raise ConfigError(
            "save",
            f"save={config.save!r} keeps weights that are quantised on load; it needs "
            f"quantization, one of {', '.join(QUANTIZATIONS)}",
        )
    checkpoint = open_checkpoint(resolve(config.model).path)
    try:
        module, model = open_model(checkpoint)
        plan = plan_load(config, checkpoint, module, model, choose(config.device))
        keep_quantised(folder, checkpoint, plan.weights, method, say)
    except WeightTooLarge as error:
        raise CheckpointError(error.name, f"{checkpoint.path}: {error}") from error
    finally:
        checkpoint.close()
    return config.replace(model=str(folder), quantization=None, save=None)


def load_model(config: EngineConfig, progress: Progress | None = None) -> LoadedModel:
    """Load what `config` names.

    Errors: SourceError, CheckpointError, ConfigError, BackendUnavailable, and DoesNotFit before
    any weight is read.
    """
    say = progress or _log.info
    t0 = time.perf_counter()
    if config.save is not None:
        config = _kept(config, say)
    choice = choose(config.device)
    imported = preload(choice)  # in a thread: most of a cold start is this import
    source = resolve(config.model)
    say(f"opening {source.path}")
    checkpoint = open_checkpoint(source.path)
    template: ChatTemplate | None = None
    try:
        module, model = open_model(checkpoint)
        tokenizer = load_tokenizer(checkpoint)
        if tokenizer.vocab_size > model.vocab_size:
            raise ConfigError(
                "vocab_size",
                f"{source.name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                f"{model.vocab_size}; they do not belong together",
            )
        template = load_chat_template(checkpoint, tokenizer, config.chat_template)
        if template is not None:
            template.start()
        imported()
        context = config.max_model_len or model.max_position
        if context > model.longest_context:
            raise ConfigError("max_model_len", f"{source.name}: {too_long(context, model)}")
        plan = plan_load(config, checkpoint, module, model, choice)
        config, memory = plan.config, plan.memory
        if not memory.fits:
            raise DoesNotFit(f"{source.name} does not fit: {memory.because}", memory)
        notes = (*checkpoint.notes, *model.notes, *plan.notes, *memory.notes)
        for note in (*notes, f"memory: {memory.because}"):
            say(note)
        config = config.replace(max_model_len=memory.max_model_len, num_blocks=memory.num_blocks)
        runner = Runner(
            plan.backend,
            plan.program,
            plan.weights,
            config=model,
            kv=plan.kv,
            num_blocks=memory.num_blocks,
            limits=(config.max_num_batched_tokens, config.max_logit_rows, memory.max_model_len),
            hidden=plan.hidden,
        )
        checkpoint.let_go()
        give_back_freed()
    except BaseException as error:  # Ctrl-C while loading too: no helper process stays behind
        if template is not None:
            template.close()
        checkpoint.close()
        if isinstance(error, WeightTooLarge):
            raise CheckpointError(error.name, f"{source.path}: {error}") from error
        raise
    return LoadedModel(
        source=source,
        checkpoint=checkpoint,
        config=config,
        model=model,
        backend_choice=choice,
        backend=plan.backend,
        program=plan.program,
        memory=memory,
        runner=runner,
        tokenizer=tokenizer,
        chat_template=template,
        load_s=time.perf_counter() - t0,
    )
