"""Exact token ids on the vectors of the test data (llama.cpp's models/ggml-vocab-*.gguf)."""

import pytest

from tests.data import data_path
from tests.load.vocabularies import VOCABULARIES, tokenizer_of

SEPARATOR = "\n__ggml_vocab_test__\n"


def vectors(name: str) -> list[tuple[str, list[int]]]:
    """(text, ids) pairs of a vocabulary, as tests/test-tokenizer-0.cpp of llama.cpp reads them."""
    base = f"vocab/ggml-vocab-{name}.gguf"
    texts = data_path(base + ".inp").read_bytes().decode().split(SEPARATOR)
    lines = data_path(base + ".out").read_text().splitlines()
    if texts[-1] == "":
        texts.pop()  # the last text is followed by a separator too
    return [(t, [int(i) for i in line.split()]) for t, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_the_vectors(name: str) -> None:
    tokenizer, cases = tokenizer_of(name), vectors(name)
    assert len(cases) == 46
    got = [tokenizer.encode(t, add_special_tokens=False, parse_special=False) for t, _ in cases]
    wrong = [(t, g, ids) for (t, ids), g in zip(cases, got, strict=True) if g != ids]
    assert not wrong, f"{len(wrong)} of {len(cases)} differ, first: {wrong[0]}"


@pytest.mark.parametrize("name", VOCABULARIES)
def test_the_vectors_decode_to_their_texts(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text, ids in vectors(name):
        assert tokenizer.decode(ids) == text
