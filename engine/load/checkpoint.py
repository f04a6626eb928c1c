"""One face over what a model comes in: a Hugging Face folder of safetensors, or a GGUF file.

Opening reads headers only; a tensor is a view of the mapped file. No code of a checkpoint ever
runs: pickle files are refused, and `auto_map` and its like become a note.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ...kernels.weights import SMALL_FLOATS, Format, RawWeight
from ...quant.published import (
    MODELOPT_FILE,
    QUANTISATION_KEYS,
    FormatError,
    Part,
    Reader,
    find_weights,
    reader_of,
    reader_of_modelopt,
)
from .gguf import GgufFile
from .mapped import CheckpointError, no_such_tensor, read_small, shown
from .safetensors import FORMATS, STORED, SafetensorsFile, open_shards, read_index
from .strict_json import parse_object

MAX_CONFIG = 1 << 22  # bytes of a config.json; real ones have a few KiB
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
CODE_KEYS = ("auto_map", "custom_code", "custom_pipelines", "_attn_implementation_internal")

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Checkpoint(Protocol):
    """What the loader, the models and the tokenizers know of a checkpoint.

    `metadata` is config.json as a dict, or a GGUF file's key-value pairs. `float_dtype` is the type
    of a 16-bit checkpoint's weights, "float32" for those of integers and of 32 bits; small floats
    go with the 16-bit tensors beside them. `total_bytes` counts the tensors'.
    """

    @property
    def kind(self) -> Literal["gguf", "safetensors"]: ...
    @property
    def path(self) -> Path: ...
    @property
    def architecture(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def generation_config(self) -> Mapping[str, Any]: ...
    @property
    def tensor_names(self) -> tuple[str, ...]: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def float_dtype(self) -> str: ...
    @property
    def quantised(self) -> bool: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first. Errors: CheckpointError for an unknown name."""
        ...

    def tensor(self, name: str) -> RawWeight:
        """One tensor as a view of the mapped file. Errors: CheckpointError for an unknown name."""
        ...

    def is_spare(self, name: str) -> bool:
        """Whether a tensor that no model reads may be left unread."""
        ...

    def fingerprint(self) -> str:
        """Of the files that hold the weights; see MappedFile.fingerprint."""
        ...

    def let_go(self) -> None:
        """Give the pages read so far back to the system; views of them stay good."""
        ...

    def close(self) -> None:
        """Release the maps (views that are still held keep theirs alive)."""
        ...


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a .gguf file, a folder with config.json and safetensors, or one with a single .gguf.

    Errors: CheckpointError with what was seen and what to do about it.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError("path", f"no such file or folder: {path.absolute()}")
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise _pickle_refused(path.parent, [path.name])
    if suffix == ".safetensors":
        raise CheckpointError(
            "path",
            f"{path} holds weights only; give the folder that also holds its config.json",
        )
    return GgufCheckpoint(path)


class GgufCheckpoint:
    """A GGUF file as a Checkpoint."""

    kind: Literal["gguf"] = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GgufFile(path)
        self.metadata = self._file.metadata
        self.architecture: str = self.metadata["general.architecture"]
        self.generation_config: Mapping[str, Any] = {}
        hidden = self._file.hidden()
        self.tensor_names = tuple(name for name in self._file.tensors if name not in hidden)
        self.notes: tuple[str, ...] = ()
        tensors = self._file.tensors.values()
        self.total_bytes = sum(t.nbytes for t in tensors)
        self.quantised = any(not t.format.is_float for t in tensors)
        self.float_dtype = (
            "float32" if self.quantised else _float_dtype((t.format, t.nbytes) for t in tensors)
        )

    def shape(self, name: str) -> tuple[int, ...]:
        info = self._file.tensors.get(name)
        if info is None:
            raise no_such_tensor(self.path.name, name, self.tensor_names)
        return info.shape

    def tensor(self, name: str) -> RawWeight:
        return self._file.tensor(name)

    def is_spare(self, name: str) -> bool:
        return False

    def fingerprint(self) -> str:
        return self._file.file.fingerprint()

    @property
    def file(self) -> GgufFile:
        return self._file

    def let_go(self) -> None:
        self._file.file.let_go()

    def close(self) -> None:
        self._file.close()


class SafetensorsCheckpoint:
    """A Hugging Face folder as a Checkpoint: config.json and one or more .safetensors files.

    Of a quantised one the tensors that make a weight are hidden behind it: `tensor` gives it as
    `module.weight`, whatever its parts are called.
    """

    kind: Literal["safetensors"] = "safetensors"

    def __init__(self, folder: Path, names: frozenset[str]) -> None:
        self.path = folder
        self.metadata = _read_json(folder / "config.json")
        self.architecture = _architecture(self.metadata)
        self._reader = _reader(self.metadata)
        self._beside: Mapping[str, Any] = {}  # how it was quantised, where config.json has no word
        if self._reader is None and MODELOPT_FILE in names:
            self._beside = _read_json(folder / MODELOPT_FILE)
            self._reader = _reader(self._beside, reader_of_modelopt)
        self.generation_config: Mapping[str, Any] = (
            _read_json(folder / "generation_config.json")
            if "generation_config.json" in names
            else {}
        )
        notes = _code_notes(self.metadata, names)
        formats = FORMATS if self._reader is None else STORED
        if WEIGHTS in names:
            self._files = {WEIGHTS: SafetensorsFile(folder / WEIGHTS, formats)}
            if INDEX in names:
                notes.append(f"{INDEX} is ignored: {WEIGHTS} is there too and holds all tensors")
        else:
            self._files = open_shards(folder, read_index(folder / INDEX), formats)
        self._home = {name: f for f in self._files.values() for name in f.tensors}
        self._made: dict[str, RawWeight] = {}
        if self._reader is not None:
            self._made = self._quantised(self._reader)
            notes += self._reader.notes
        self.notes = tuple(notes)
        parts = {p for weight in self._made.values() for p in weight.buffers}
        self.tensor_names = tuple(sorted({*self._home, *self._made} - (parts - {*self._made})))
        self.quantised = bool(self._made)
        tensors = [t for f in self._files.values() for t in f.tensors.values()]
        self.total_bytes = sum(t.nbytes for t in tensors)
        self.float_dtype = _float_dtype(
            (t.format, t.nbytes) for t in tensors if t.format.name in _DTYPES
        )
        if any(
            w.format.name not in SMALL_FLOATS and not w.format.is_float for w in self._made.values()
        ):
            self.float_dtype = "float32"

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._made:
            return self._made[name].shape
        return self._file_of(name).tensors[name].shape

    def tensor(self, name: str) -> RawWeight:
        if name in self._made:
            return self._made[name]
        tensor = self._file_of(name).tensor(name)
        if tensor.format.name not in FORMATS:
            raise CheckpointError(
                name,
                f"tensor {name!r} is {tensor.format.name} and has no scale by which config.json's "
                "quantization_config would make it a weight",
            )
        return tensor

    def is_spare(self, name: str) -> bool:
        reader = self._reader
        return reader is not None and name in self._home and reader.is_spare(self._part(name))

    def fingerprint(self) -> str:
        files = " ".join(f.file.fingerprint() for f in self._files.values())
        if self._reader is None:
            return files
        # What the same bytes mean stands in config.json.
        settings: list[Any] = [self.metadata.get(key) for key in QUANTISATION_KEYS]
        settings += [self._beside] if self._beside else []
        meaning = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        return f"{files} {meaning[:16]}"

    def let_go(self) -> None:
        for shard in self._files.values():
            shard.file.let_go()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _quantised(self, reader: Reader) -> dict[str, RawWeight]:
        """The weights that several tensors make. Errors: CheckpointError."""
        made: dict[str, RawWeight] = {}
        try:
            for name, (module, parts) in find_weights(reader, self._home).items():
                have = {role: self._part(part) for role, part in parts.items()}
                buffers = {part.name: part.data for part in have.values()}
                made[name] = replace(reader.weight(module, have), buffers=buffers)
        except FormatError as error:
            raise CheckpointError(error.field, f"{self.path}: {error}") from error
        return made

    def _part(self, name: str) -> Part:
        tensor = self._file_of(name).tensor(name)
        return Part(name, tensor.format.name, tensor.shape, tensor.data)

    def _file_of(self, name: str) -> SafetensorsFile:
        file = self._home.get(name)
        if file is None:
            raise no_such_tensor(str(self.path), name, self.tensor_names)
        return file


# ----------------------------------------------------------------------------------- folders


def _open_folder(folder: Path) -> Checkpoint:
    try:
        names = frozenset(os.listdir(folder))
    except OSError as error:
        raise CheckpointError("path", f"cannot list {folder}: {error.strerror}") from None
    has_weights = WEIGHTS in names or INDEX in names
    if "config.json" in names and has_weights:
        return SafetensorsCheckpoint(folder, names)
    ggufs = sorted(n for n in names if n.lower().endswith(".gguf"))
    if len(ggufs) == 1 and not has_weights:
        return GgufCheckpoint(folder / ggufs[0])
    if len(ggufs) > 1 and not has_weights:
        raise CheckpointError(
            "path", f"{folder} holds {len(ggufs)} GGUF files ({_some(ggufs)}); name one of them"
        )
    pickles = sorted(n for n in names if Path(n).suffix.lower() in PICKLES)
    if pickles and not has_weights:
        raise _pickle_refused(folder, pickles)
    missing = [] if "config.json" in names else ["config.json"]
    if not has_weights:
        missing.append(f"{WEIGHTS} (or {INDEX} and its files)")
    raise CheckpointError(
        "path",
        f"{folder.absolute()} is no model folder: missing {' and '.join(missing)}, and no single "
        f".gguf file; it holds {_some(sorted(names)) or 'nothing'}",
    )


def _pickle_refused(folder: Path, names: list[str]) -> CheckpointError:
    """A pickle file runs whatever code it holds when it is read; so it is not read, ever."""
    return CheckpointError(
        "path",
        f"{folder} has its weights only as pickle ({_some(names)}), which can run code when read "
        "and is refused. Fetch the model's safetensors or GGUF version, or convert it where it can "
        "do no harm (a container without network; torch 2.10 or newer), then open the folder "
        "again:\n"
        "  import torch\n"
        "  from safetensors.torch import save_file\n"
        "  state = {}\n"
        f"  for name in {names[:12]!r}:\n"
        '      state.update(torch.load(name, map_location="cpu", weights_only=True))\n'
        "  state = {name: t.contiguous().clone() for name, t in state.items()}\n"
        f'  save_file(state, "{WEIGHTS}", metadata={{"format": "pt"}})',
    )


def _read_json(path: Path) -> dict[str, Any]:
    return parse_object(read_small(path, MAX_CONFIG), path.name)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not isinstance(first, str) or not first.isidentifier() or len(first) > 128:
        raise CheckpointError(
            "architectures",
            'config.json: architectures must name the model class, such as ["LlamaForCausalLM"]; '
            f"it is {shown(repr(names))} (model_type: {shown(repr(config.get('model_type')))})",
        )
    return first


def _reader(
    config: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Reader | None] = reader_of
) -> Reader | None:
    try:
        return read(config)
    except FormatError as error:
        raise CheckpointError(
            error.field,
            f"{error}; or use the model's 16-bit safetensors or a GGUF version of it",
        ) from error


def _code_notes(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    found = [key for key in CODE_KEYS if key in config]
    scripts = sorted(n for n in names if n.endswith(".py"))
    notes = []
    if found:
        notes.append(f"config.json names code of its own ({', '.join(found)}): it is never run")
    if scripts:
        notes.append(f"Python files in the folder are never run: {_some(scripts)}")
    return notes


def _float_dtype(tensors: Iterable[tuple[Format, int]]) -> str:
    """The float type that holds most of the bytes: norms are often wider than the matrices."""
    count: Counter[str] = Counter()
    for fmt, nbytes in tensors:
        count[_DTYPES[fmt.name]] += nbytes
    return max(count, key=lambda name: count[name], default="float32")


def _some(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]
