"""What keeps the server's memory from growing."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, gc
from engineroom.engine.serve.heap import settle

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
settle()
for _ in range(3):  # freed once, such a block would be taken from the heap from then on
    before = libc.mallinfo2().hblkhd
    block = bytes(300_000)
    print(libc.mallinfo2().hblkhd - before >= len(block))
    del block
print(gc.get_freeze_count() > 1000)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc's malloc")
def test_large_blocks_lie_apart_and_what_is_loaded_is_frozen() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if "mallinfo2" in done.stderr:
        pytest.skip("this C library has no mallinfo2()")
    assert done.stdout.split() == ["True"] * 4, done.stdout + done.stderr
