"""What is resident while `quantize` runs: a layer in 16 bits, and what calibrating it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.counts import FULL
from tests.data import data_path
from tests.engine.quantize_child import CONTEXT
from tests.engine.test_resident_memory import write_llama
from tests.load.stories260k import convert

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read as Linux has it"
)

HIDDEN, FFN, LAYERS, SAMPLES = 1024, 2560, 6, 4
LAYER = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)  # bytes in 16 bits
# Second moments of the widest input: the sum of their squares in float64, GPTQ's factor, and both
# in float32.
MOMENTS = 24 * FFN * FFN
# float32 values of the samples: a layer's input and output, q, k, v, and what is multiplied.
ACTIVATIONS = 4 * SAMPLES * CONTEXT * (6 * HIDDEN + 2 * FFN)
CALIBRATED = MOMENTS + 2 * ACTIVATIONS


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("quantize-memory")
    tokenizer = convert(data_path("stories260K/stories260K.bin").parent, place / "stories")["hf"]
    return (
        write_llama(tokenizer, place / "tiny", 1, 128, 128),
        write_llama(tokenizer, place / "model", LAYERS, HIDDEN, FFN),
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("method", "format", "beside"),
    [
        ("rtn", "W4A16", 0),
        ("rtn", "FP8_BLOCK", 0),
        *(("gptq", "W4A16", CALIBRATED), ("awq", "W4A16", CALIBRATED))[: 2 * FULL],
    ],
)
def test_quantising_holds_one_layer_and_what_calibrates_it(
    method: str, format: str, beside: int, models: tuple[Path, Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.engine.quantize_child", method, format, str(SAMPLES)]
    done = subprocess.run(
        [*command, *map(str, models), str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["peak"] <= LAYER + beside, (sizes, LAYER, beside)
    assert sizes["bytes"] > LAYER  # so that holding what is made would be seen
