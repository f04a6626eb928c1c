"""Offline batches that lose nothing: JSON lines in, JSON lines out, a journal between them."""

from .errors import BatchError, Interrupted, signals
from .inputs import FORMATS
from .report import Status, Summary, status, verify
from .run import BATCH_DEFAULTS, run

__all__ = [
    "BATCH_DEFAULTS",
    "FORMATS",
    "BatchError",
    "Interrupted",
    "Status",
    "Summary",
    "run",
    "signals",
    "status",
    "verify",
]
