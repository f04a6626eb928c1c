"""Offline batches that lose nothing: JSON lines in, JSON lines out, a journal between them."""

from .errors import CHANGED, DUPLICATE, LIMIT, BatchError, Interrupted, signals
from .inputs import Inputs
from .limits import Limits
from .report import Status, Summary, status, verify
from .run import BATCH_DEFAULTS, Refused, partial, run
from .sources import FORMATS
from .template import Prompting

__all__ = [
    "BATCH_DEFAULTS",
    "CHANGED",
    "DUPLICATE",
    "FORMATS",
    "LIMIT",
    "BatchError",
    "Inputs",
    "Interrupted",
    "Limits",
    "Prompting",
    "Refused",
    "Status",
    "Summary",
    "partial",
    "run",
    "signals",
    "status",
    "verify",
]
