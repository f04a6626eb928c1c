"""The Triton backend: a Program as launches of kernels on one GPU, or on the CPU's interpreter.

One file per operation holds its kernel, its launcher and the tile that it was compiled for. Nothing
here touches a driver when it is imported. With TRITON_INTERPRET=1 in the environment Triton runs
every kernel in numpy on CPU tensors; that is how the tests run them.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
