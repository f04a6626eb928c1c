"""The CPU kernels on machines other than this one, and what their objects may contain.

`kernels/cpu/selftest*.cpp` hold every table that a machine can run to plain double precision. It is
linked to the objects of the installed module on this machine; under emulators of older and other
processors and under sanitizers, to what is compiled here with the options of
`kernels/cpu/CMakeLists.txt`. `make test` runs what needs neither an emulator nor a second build.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.counts import FULL

pytestmark = pytest.mark.cores

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "kernels" / "cpu"
LISTS = (CPU / "CMakeLists.txt").read_text("utf-8")
BUILD = ROOT / "build" / "machines"  # objects are kept there and made again when a source changes
HEADERS = sorted([*CPU.glob("*.hpp"), *CPU.glob("isa/*.hpp"), *CPU.glob("isa/*.inl")])

X86 = ("isa/generic.cpp", "isa/avx2.cpp", "isa/avx512.cpp")
AMX = "isa/amx.cpp"  # beside X86, where the compiler knows it
ARM = ("isa/generic.cpp", "isa/neon.cpp")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
HERE = X86 if IS_X86 else ARM

full = pytest.mark.skipif(not FULL, reason="make test-all runs it")


def installed_object(source: str) -> Path | None:
    """What the build of the module made of a source; None where the source is newer."""
    made = list(ROOT.glob(f"build/*/CMakeFiles/_native.dir/{source}.o"))
    newest = max(made, key=lambda path: path.stat().st_mtime, default=None)
    of = (CPU / source, CPU / "CMakeLists.txt", *HEADERS)
    if newest is None or newest.stat().st_mtime < max(path.stat().st_mtime for path in of):
        return None
    return newest


def cmake_set(name: str) -> list[str]:
    found = re.search(rf"^set\({name}\s+([^()]*)\)", LISTS, re.MULTILINE)
    assert found is not None, f"CMakeLists.txt has no set({name} ...)"
    return found[1].split()


def unit_options(unit: str) -> list[str]:
    pattern = (
        rf"set_source_files_properties\({re.escape(unit)} PROPERTIES COMPILE_OPTIONS\s+\"([^\"]*)\""
    )
    found = re.search(pattern, LISTS)
    assert found is not None or unit == "isa/generic.cpp", (
        f"CMakeLists.txt has no options of {unit}"
    )
    return found[1].split(";") if found else []


SOURCES, OPTIONS = cmake_set("SOURCES"), cmake_set("OPTIONS")
SELFTEST = cmake_set("SELFTEST")


@dataclass(frozen=True)
class Compilation:
    """A compiler, its processor's units, and what is added to the options of CMakeLists.txt."""

    name: str
    compiler: str
    units: tuple[str, ...] = HERE
    more: tuple[str, ...] = ()

    def objects(self, sources: Iterable[str]) -> dict[str, Path]:
        """The object of each source, compiled if it or a header has changed.

        A file is whole when it has its name: several processes may compile at once.
        """
        folder = BUILD / self.name
        folder.mkdir(parents=True, exist_ok=True)
        base = hashlib.sha256()
        version = subprocess.run([self.compiler, "--version"], capture_output=True, check=True)
        base.update(version.stdout)
        for header in HEADERS:
            base.update(header.read_bytes())

        def compiled(source: str) -> Path:
            target = folder / f"{Path(source).stem}.o"
            part = target.with_suffix(f".{os.getpid()}.o")
            options = [*OPTIONS, *(unit_options(source) if source.startswith("isa/") else [])]
            command = [self.compiler, "-std=c++17", "-fPIC", *options, *self.more]
            command += ["-c", str(CPU / source)]
            digest = base.copy()
            digest.update("\0".join(command).encode() + (CPU / source).read_bytes())
            stamp = target.with_suffix(".key")
            if not (target.exists() and stamp.exists() and stamp.read_text() == digest.hexdigest()):
                stamp.unlink(missing_ok=True)
                run([*command, "-o", str(part)])
                part.replace(target)
                stamp.write_text(digest.hexdigest())
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(sources, pool.map(compiled, sources), strict=True))

    def program(self, *link: str) -> Path:
        objects = self.objects([*self.units, *SOURCES, *SELFTEST])
        name = "selftest-" + "".join(c for c in "".join(link) if c.isalnum())
        return self.linked(objects.values(), name, *link)

    def linked(self, objects: Iterable[Path], name: str, *link: str) -> Path:
        target = BUILD / self.name / name
        part = target.with_suffix(f".{os.getpid()}")
        command = [self.compiler, *self.more, *link, *map(str, objects), "-pthread"]
        run([*command, "-o", str(part)])
        part.replace(target)
        return target


def run(command: list[str], **more: str) -> str:
    """What the command prints; fails, showing its output, where it does not end with 0."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **more})
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if not re.search(r"\s ok\s", line)]
        shown = "\n".join([*lines[-40:], done.stderr[-8000:]])
        pytest.fail(f"{' '.join(command)}\nended with {done.returncode}\n{shown}", pytrace=False)
    return done.stdout


def tables(said: str) -> list[str]:
    """The tables that a run of the self-test went through; each must have been checked."""
    first, *lines = said.splitlines()
    assert first.startswith("tables: ")
    names = first.split()[1:]
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in lines) >= 60, name
    assert lines[-1] == "all checks passed"
    return names


def found(*programs: str) -> str:
    """The first of the programs that is installed; skips where none is."""
    for program in programs:
        path = shutil.which(program)
        if path is not None:
            return path
    pytest.skip(f"{programs[0]} is not installed")


def units_here() -> tuple[str, ...]:
    """The units of x86-64 that the compiler here knows: AMX came with GCC 11 and Clang 11."""
    command = [compiler_here(), *unit_options(AMX), "-xc++", "-fsyntax-only", os.devnull]
    knows = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return (*X86, AMX) if knows else X86


def compiler_here() -> str:
    if os.environ.get("CXX"):
        return found(os.environ["CXX"])
    return found("c++", "g++", "clang++")


def here(sources: Iterable[str]) -> dict[str, Path]:
    """This machine's object of each source: of the installed module, else compiled."""
    sources = list(sources)
    objects = {source: installed_object(source) for source in sources}
    missing = [source for source, path in objects.items() if path is None]
    compiled = Compilation("here", compiler_here()).objects(missing)
    return {source: objects[source] or compiled[source] for source in sources}


def x86_only() -> None:
    if not (IS_X86 and sys.platform == "linux"):
        pytest.skip("the objects of x86-64 Linux are looked into")


# ------------------------------------------------------------------------------------ this machine


@pytest.mark.timeout(900)
def test_here() -> None:
    units = units_here() if IS_X86 else ARM
    objects = here([*units, *SOURCES, *SELFTEST]).values()
    names = tables(run([str(Compilation("here", compiler_here()).linked(objects, "selftest"))]))
    assert names[-1] == "generic"
    assert set(names) <= {Path(unit).stem for unit in units}


@pytest.mark.timeout(900)
def test_tile_registers_in_software() -> None:
    """AMX's products over a model of its instructions: int8 of any number of rows as AVX-512's.

    The model aborts where the processor would fault: shapes that do not fit, tiles without one.
    """
    x86_only()
    more = ("-DENGINEROOM_AMX", "-DENGINEROOM_TILE_MODEL")
    model = Compilation("model", compiler_here(), more=more)
    objects = {**here([*X86, *SOURCES, *SELFTEST]), **model.objects([AMX, "kernels.cpp"])}
    program = model.linked(objects.values(), "selftest")
    first, *lines = run([str(program), "tiles", "numbers", "linear"]).splitlines()
    if "avx512" not in first.split():
        pytest.skip("the unit of AMX needs AVX-512 beside it")
    assert first.split()[1:3] == ["amx", "avx512"]
    assert lines[-1] == "all checks passed"
    same = [line for line in lines if re.match(r"amx +rows of \S+ as in avx512 +ok", line)]
    assert len(same) == 17, "one line for each format of integers"
    of_bf16 = [
        line for line in lines if re.match(r"amx +rows of (BF16|FP8\S*) as in amx +ok", line)
    ]
    assert len(of_bf16) == 3


# ---------------------------------------------------------------------------------- other machines


@full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("model", "want"), [("Nehalem", ["generic"]), ("Haswell", ["avx2", "generic"])]
)
def test_older_x86(model: str, want: list[str]) -> None:
    """Nehalem has no AVX, Haswell no AVX-512: any such instruction ends the run."""
    x86_only()
    emulator = found("qemu-x86_64-static", "qemu-x86_64")
    program = Compilation("here", compiler_here()).program("-static")
    assert tables(run([emulator, "-cpu", model, str(program)])) == want


@full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("model", "want"),
    [
        ("max", ["neon", "generic"]),
        ("cortex-a76", ["neon", "generic"]),  # dot products, but neither BF16 nor I8MM
        ("cortex-a72", ["generic"]),  # no dot products
    ],
)
def test_arm(model: str, want: list[str]) -> None:
    emulator = found("qemu-aarch64-static", "qemu-aarch64")
    compiler = found("aarch64-linux-gnu-g++")
    program = Compilation("aarch64", compiler, ARM).program("-static")
    assert tables(run([emulator, "-cpu", model, str(program)])) == want


@full
@pytest.mark.timeout(1800)
def test_clang() -> None:
    """The compiler of macOS: other vector extensions, other inlining."""
    compiler = found("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
    assert tables(run([str(Compilation("clang", compiler).program())]))[-1] == "generic"


# -------------------------------------------------------------------------------------- sanitizers


@full
@pytest.mark.timeout(1800)
def test_memory_and_undefined_behaviour() -> None:
    more = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    tables(run([str(Compilation("address", compiler_here(), more=more).program())]))


@full
@pytest.mark.timeout(1800)
def test_threads_share_no_memory_unordered() -> None:
    """Without target_clones: their resolvers run before the sanitizer has begun."""
    more = ("-O1", "-g", "-fsanitize=thread", "-Dtarget_clones(...)=unused")
    program = Compilation("thread", compiler_here(), more=more).program()
    said = run(
        [str(program), "linear", "attention", "sampler", "pool"], TSAN_OPTIONS="halt_on_error=1"
    )
    assert said.splitlines()[-1] == "all checks passed"


@full
@pytest.mark.timeout(1800)
def test_cmake_builds_it_too(tmp_path: Path) -> None:
    cmake = found("cmake")
    run([cmake, "-S", str(CPU), "-B", str(tmp_path), "-DENGINEROOM_SELFTEST=ON"])
    run([cmake, "--build", str(tmp_path), "--parallel", str(os.cpu_count() or 1)])
    tables(run([str(tmp_path / "selftest")]))


# ---------------------------------------------------------------------------------------- objects

# Encodings of AVX and later: mnemonics that begin with v, those of mask registers, wide registers.
AVX = re.compile(
    r"^\s*[0-9a-f]+:\s+(?:\{\w+\} )?"
    r"(?:v[a-z0-9]+|k(?:mov|and|or|xor|not|test|shift|add|unpck)\w*)\s"
    r"|%[yz]mm"
)
CLONE = re.compile(r"\.(avx2|avx512f)(\.|$)")  # of target_clones, which the loader chooses by CPUID


@pytest.mark.timeout(900)
def test_only_units_use_more_than_the_default() -> None:
    """A machine without AVX may run everything but the units of AVX2, AVX-512 and AMX."""
    x86_only()
    objdump = found("objdump")
    objects = here([*units_here(), *SOURCES])
    wide = {"isa/avx2.cpp", "isa/avx512.cpp", AMX}
    for source, path in objects.items():
        users = set()
        function = ""
        for line in run([objdump, "-d", "--no-show-raw-insn", str(path)]).splitlines():
            if line.endswith(">:"):
                function = line.split("<", 1)[1][:-2]
            elif AVX.search(line) and not CLONE.search(function):
                users.add(function)
        if source in wide:
            assert users  # or the pattern finds nothing
        else:
            assert not users, f"{source} uses AVX in {sorted(users)}"


@pytest.mark.timeout(900)
def test_units_share_nothing_with_other_units() -> None:
    """A function that two units define is kept once: perhaps as the unit of AVX-512 compiled it.

    So a unit may give the linker its table (AMX: a function of a table), and functions of its own
    namespace.
    """
    x86_only()
    nm = found("nm")
    objects = here(units_here())
    for source, path in objects.items():
        name = Path(source).stem
        own = re.compile(rf"^_Z[A-Z]*?10engineroom{len(name)}{name}\w")
        table = f"_ZN10engineroom{len('kernels_' + name)}kernels_{name}E"
        defined = [
            line.split()[-2:] for line in run([nm, "--defined-only", str(path)]).splitlines()
        ]
        shared = {symbol for kind, symbol in defined if kind.isupper() or kind in "uvw"}
        local = {symbol for kind, symbol in defined} - shared
        assert table in shared or source == AMX
        strangers = {symbol for symbol in shared - {table} if not own.match(symbol)}
        assert not strangers, f"{source} shares {sorted(strangers)}"
        # Code of a unit runs when its table is called, never at start.
        assert not any(symbol.startswith("_GLOBAL__sub_I") for symbol in local), source


@pytest.mark.timeout(900)
def test_tile_registers_and_no_spills() -> None:
    """What AMX's unit is made of: a sum that spills would cost most of what the tiles gain."""
    x86_only()
    objdump = found("objdump")
    if AMX not in units_here():
        pytest.skip("the compiler does not know AMX")
    path = here([AMX])[AMX]
    code: dict[str, list[str]] = {}
    function = ""
    for line in run([objdump, "-d", "-C", "--no-show-raw-insn", str(path)]).splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1]
        elif "\t" in line:
            code.setdefault(function, []).append(line.split("\t", 1)[1])
    every = [line for lines in code.values() for line in lines]
    for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tdpbssd", "tdpbf16ps"):
        assert any(line.startswith(name) for line in every), name
    # One for each way to scale a group: a scale, with a minimum, two scales, two that are whole
    # numbers, none of its own.
    hot = {name: lines for name, lines in code.items() if "int8_block<" in name}
    assert len(hot) == 5
    for name, lines in hot.items():
        assert sum(line.startswith("tdpbssd") for line in lines) == 2
        # Sixteen rows of two parts, or of both as one: converted, scaled and added in registers.
        converted = 16 if "ScaleWhole16" in name else 32
        assert sum(line.startswith("vcvtdq2ps") for line in lines) == converted
        assert not [line for line in lines if re.search(r"zmm.*\(%r[sb]p|\(%r[sb]p.*zmm", line)]


@pytest.mark.timeout(900)
def test_hot_loops_keep_their_registers() -> None:
    """A register tile that spills to the stack runs at a third of its speed, and gives no error."""
    x86_only()
    path = here(["isa/avx512.cpp"])["isa/avx512.cpp"]
    hot, spills, name = set(), [], ""  # broadcasts of scalars may come from the stack
    for line in run([found("objdump"), "-d", "--no-show-raw-insn", "-C", str(path)]).splitlines():
        if line.endswith(">:"):
            name = line
            if re.search("(int8|fine|float)_rows<", name):
                hot.add(name)
        elif name in hot and re.search(r"%zmm.*\(%r[sb]p\)|\(%r[sb]p\).*%zmm", line):
            spills += [] if re.search(r"broadcast|1to16", line) else [(name, line)]
    assert len(hot) > 40, "the hot functions have other names now"
    assert not spills


def test_vectors_have_one_interface() -> None:
    """What isa/*.inl are written over: every unit's vectors have all that the generic ones have."""
    pattern = re.compile(r"^(?:ER_INLINE [^(]*?[ *]|constexpr int )(\w+)(?= ?[(=])", re.MULTILINE)

    def names(header: Path) -> set[str]:
        return set(pattern.findall(header.read_text("utf-8")))

    headers = {header.stem: names(header) for header in CPU.glob("isa/vec_*.hpp")}
    interface = {
        name
        for name in headers["vec_generic"]
        if name.startswith(("f_", "i_", "p_", "k", "prefetch"))
    }
    assert len(interface) > 50
    for header, has in headers.items():
        assert interface <= has, f"{header}.hpp lacks {sorted(interface - has)}"
