"""Every kernel of the Triton backend at the tiles that the launchers choose for common models."""

from collections.abc import Iterator

from . import attention, experts, layers, sampling, small
from .configuration import TARGETS, Configuration


def configurations() -> Iterator[Configuration]:
    """In the order of the page that lists them."""
    for part in (attention, layers, experts, small, sampling):
        yield from part.configurations()


__all__ = ["TARGETS", "Configuration", "configurations"]
