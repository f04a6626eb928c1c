"""ParameterError: a request parameter that cannot be honoured; and how its value is shown."""

from __future__ import annotations

__all__ = ["ParameterError", "show"]


class ParameterError(ValueError):
    """A request parameter that cannot be honoured. `.field` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def show(value: object) -> str:
    """A value in a message: its repr, cut, since it came from outside and may be huge."""
    try:
        text = repr(value)
    except Exception:  # a foreign __repr__, or an int beyond Python's digit limit
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:77] + "..."
