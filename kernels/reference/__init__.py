"""The reference backend: a Program interpreted in readable torch on the CPU."""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
