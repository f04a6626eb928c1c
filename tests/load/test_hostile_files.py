"""One hostile file per known hole in a model-file parser: each refused fast, small and by field.

Rows that have no file to be made of: llama.cpp's rpc-server (CVE-2024-42477 to -42479; there is no
RPC), the minicpmv converter (llama.cpp #27166) and vLLM's image decoder (CVE-2026-22778; there are
no images), whose second half, an address in an error's text, is checked on every refusal here.
"""

import json
import os
import re
import resource
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from engineroom.engine.load.checkpoint import CheckpointError, open_checkpoint
from tests.load.writers import (
    Typed,
    gguf_head,
    gguf_pair,
    gguf_string,
    gguf_tensor_info,
    safetensors_bytes,
    write_safetensors,
)

MOST_SECONDS = 0.1
MOST_BYTES = 50 << 20

ARCH = gguf_pair("general.architecture", "llama")
TOKENS = "tokenizer.ggml.tokens"


def key(name: str, *types: int) -> bytes:
    """A pair's name and type numbers, its value left to the case."""
    return gguf_string(name) + struct.pack(f"<{len(types)}I", *types)


def tensor(*shape: int, kind: int = 0, offset: int = 0) -> bytes:
    """A file of one tensor called "w" with little data behind the header."""
    return gguf_head(1, 1) + ARCH + gguf_tensor_info("w", shape, kind, offset) + bytes(200)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


VOCABULARY = gguf_pair(TOKENS, ["a", "<0x-1>"])

# id: bytes of the file, field of the refusal, words of its message
GGUF: dict[str, tuple[bytes, str, str]] = {
    "CVE-2026-27940 tensor count times its size wraps": (
        gguf_head(2**61, 1) + ARCH,
        "tensor_count",
        str(2**61),
    ),
    "CVE-2025-53630 offset plus size wraps": (
        tensor(8, offset=2**64 - 32),
        "w offset",
        "reach beyond",
    ),
    "CVE-2026-33298 byte size wraps to a small one": (
        tensor(2**33, 2**31 + 1),
        "w dims",
        str(4 * 2**33 * (2**31 + 1)),
    ),
    "CVE-2025-49847 token of 2^31 bytes": (
        gguf_head(0, 2) + ARCH + key(TOKENS, 9, 8) + u64(1) + u64(2**31) + bytes(40),
        TOKENS,
        "reach beyond",
    ),
    "CVE-2025-52566 length that is negative when signed": (
        gguf_head(0, 2) + ARCH + key("general.name", 8) + u64(2**63) + bytes(40),
        "general.name length",
        str(2**63),
    ),
    "CVE-2024-23605 key count": (gguf_head(0, 2**60) + ARCH, "metadata_kv_count", str(2**60)),
    "CVE-2024-21802 more dimensions than room for them": (
        tensor(*[1] * 64),
        "w n_dims",
        "64 dimensions",
    ),
    "CVE-2024-21825 array count times element size wraps": (
        gguf_head(0, 2) + ARCH + key("x", 9, 10) + u64(2**61) + bytes(40),
        "x count",
        str(2**64),
    ),
    "CVE-2024-21836 tensor count in a file of header only": (
        gguf_head(1000, 1) + ARCH,
        "tensor_count",
        "do not fit",
    ),
    "CVE-2024-23496 text length of 2^64 - 1": (
        gguf_head(0, 1) + u64(2**64 - 1) + bytes(40),
        "key 0 length",
        str(2**64 - 1),
    ),
    "oss-security 2026-05-15 alignment of 2^31": (
        gguf_head(0, 2) + ARCH + gguf_pair("general.alignment", 2**31),
        "general.alignment",
        str(2**31),
    ),
    "oss-security 2026-05-15 n_dims of 0xFFFFFFFF": (
        gguf_head(1, 1) + ARCH + gguf_string("w") + b"\xff" * 4 + bytes(64),
        "w n_dims",
        str(0xFFFFFFFF),
    ),
    "oss-security 2026-05-15 INT8 scores": (
        gguf_head(0, 2) + ARCH + gguf_pair("tokenizer.ggml.scores", Typed("int8", [1, 2])),
        "tokenizer.ggml.scores",
        "is array of int8; it must be array of float32",
    ),
    "llama.cpp-26511 byte token <0x-1>": (
        gguf_head(0, 3) + ARCH + VOCABULARY + gguf_pair("tokenizer.ggml.token_type", [1, 6]),
        TOKENS,
        "'<0x-1>', not <0xHH>",
    ),
    "CVE-2026-7482 tensor offset beyond the file": (
        tensor(8, offset=4096),
        "w offset",
        "reach beyond",
    ),
    "CVE-2026-7482 tensor size beyond the file": (tensor(4096), "w dims", "takes 16384 bytes"),
    "CVE-2025-0312 no architecture": (
        gguf_head(0, 1) + gguf_pair("general.name", "x"),
        "general.architecture",
        "missing",
    ),
    "CVE-2025-0315 allocation from an array count": (
        gguf_head(0, 2) + ARCH + key(TOKENS, 9, 8) + u64(2**40) + bytes(40),
        f"{TOKENS} count",
        str(2**40),
    ),
    "CVE-2025-0317 alignment of 0": (
        gguf_head(0, 2) + ARCH + gguf_pair("general.alignment", 0),
        "general.alignment",
        "0 is not a power of two",
    ),
    "CVE-2025-66959 text length beyond the file": (
        gguf_head(0, 2) + ARCH + key("general.name", 8) + u64(1000) + bytes(40),
        "general.name",
        "needs 1000 bytes",
    ),
    "CVE-2025-66960 header ends within a value": (
        gguf_head(0, 2) + ARCH + key("x.count", 4) + bytes(2),
        "x.count",
        "needs 4 bytes",
    ),
    "CVE-2024-12055 number array read out of bounds": (
        gguf_head(0, 2) + ARCH + key("x.list", 9, 4) + u64(100) + bytes(40),
        "x.list count",
        "needs 400 bytes",
    ),
    "CVE-2024-8063 block count of 0": (
        gguf_head(0, 2) + ARCH + gguf_pair("llama.block_count", 0),
        "llama.block_count",
        "0; a model has 1..65535 layers",
    ),
    "CVE-2024-39720 four bytes": (b"GGUF", "version", "needs 4 bytes"),
    "CVE-2026-53923 dimension that 32 bits cut": (
        tensor(1, 2**32 + 32, kind=8),
        "w dims",
        "takes 4563402786 bytes",
    ),
    "tensors enough to spend a minute on": (
        gguf_head(2**20 + 1, 1) + ARCH,
        "tensor_count",
        "1048577 is more than",
    ),
    "texts enough to spend a minute on": (
        gguf_head(0, 2) + ARCH + key("x", 9, 8) + u64(2**22 + 1),  # 32 MiB of empty texts follow
        "x count",
        "more than 4194304 texts",
    ),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_hostile_gguf_is_refused(tmp_path: Path, case: str) -> None:
    raw, field, words = GGUF[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    if "minute" in case:
        os.truncate(path, len(raw) + 8 * 2**22 + 8)
    else:
        assert len(raw) < 1024
    refuse(path, field, words)


def index_to(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"w": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return build


def fifo_shard(folder: Path) -> None:
    index_to("pipe.safetensors")(folder)
    os.mkfifo(folder / "pipe.safetensors")


def device_shard(folder: Path) -> None:
    index_to("zero.safetensors")(folder)
    (folder / "zero.safetensors").symlink_to("/dev/zero")


def directory_shard(folder: Path) -> None:
    index_to("sub.safetensors")(folder)
    (folder / "sub.safetensors").mkdir()


def weights(raw: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(raw) and None


def claim(**entry: object) -> Callable[[Path], None]:
    sound = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return weights(safetensors_bytes({"w": sound | entry}, bytes(8)))


FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "CVE-2026-69112 shard in the parent folder": (
        index_to("../secret.safetensors"),
        "weight_map",
        "bare name",
    ),
    "CVE-2026-69112 shard by absolute path": (
        index_to("/etc/x.safetensors"),
        "weight_map",
        "bare name",
    ),
    "CVE-2026-69112 shard is a FIFO": (fifo_shard, "pipe.safetensors", "not a regular file"),
    "CVE-2026-69112 shard is a device": (device_shard, "zero.safetensors", "not a regular file"),
    "CVE-2026-69112 shard is a folder": (directory_shard, "sub.safetensors", "not a regular file"),
    "CVE-2025-0315 header length of 2^63": (
        weights(u64(2**63) + bytes(100)),
        "header length",
        str(2**63),
    ),
    "CVE-2026-7482 offsets beyond the file": (
        claim(shape=[200], data_offsets=[0, 800]),
        "w data_offsets",
        "the file at",
    ),
    "CVE-2026-33298 byte size wraps to a small one": (
        claim(shape=[2**33, 2**31 + 1]),
        "w data_offsets",
        str(4 * 2**33 * (2**31 + 1)),
    ),
    "CVE-2025-52566 negative size": (claim(shape=[-2]), "w shape", "[-2]"),
    "CVE-2024-39720 four bytes": (weights(bytes(4)), "header length", "takes 8 bytes"),
    "nested JSON": (
        weights(safetensors_bytes(b'{"w":' + b"[" * 100_000)),
        "model.safetensors: header",
        "nested too deeply",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_hostile_folder_is_refused(tmp_path: Path, case: str) -> None:
    build, field, words = FOLDERS[case]
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_safetensors(tmp_path / "model.safetensors", {})
    build(tmp_path)
    refuse(tmp_path, field, words)


def test_a_name_in_a_refusal_cannot_forge_a_line_or_fill_a_log(tmp_path: Path) -> None:
    name = "w\r\n\x1b[2J\u202eOK" + "x" * 60_000
    file = tmp_path / "hostile.gguf"
    file.write_bytes(gguf_head(1, 1) + ARCH + gguf_tensor_info(name, (1,), 99, 0) + bytes(99))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    entry = {"dtype": name, "shape": [1], "data_offsets": [0, 4]}
    header = safetensors_bytes({name: entry}, bytes(4))
    (tmp_path / "model.safetensors").write_bytes(header)
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path)
        for text in (str(error.value), error.value.field):
            assert text.isprintable() and len(text) < 600
        assert "w\\r\\n\\x1b[2J\\u202eOK" in str(error.value)


def refuse(path: Path, field: str, words: str) -> None:
    """Refused by `field` and `words`, quickly (best of three: the machine is shared) and small."""
    seconds, before = [], peak_rss()
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(path)
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < MOST_SECONDS:
            break
    assert min(seconds) < MOST_SECONDS
    assert peak_rss() - before < MOST_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert error.value.field == field
    assert words in str(error.value)
    assert not re.search(r"0x[0-9a-f]{6,}", str(error.value)), "an address tells where to aim"


def peak_rss() -> int:
    """Bytes. Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
