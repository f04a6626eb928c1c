"""Offline batches that lose nothing: JSON lines in, JSON lines out, a journal between them."""

from .errors import BatchError, Interrupted, signals
from .limits import Limits
from .report import Status, Summary, status, verify
from .run import BATCH_DEFAULTS, run
from .sources import FORMATS
from .template import Prompting

__all__ = [
    "BATCH_DEFAULTS",
    "FORMATS",
    "BatchError",
    "Interrupted",
    "Limits",
    "Prompting",
    "Status",
    "Summary",
    "run",
    "signals",
    "status",
    "verify",
]
