"""The one error of the meters."""


class MeterUnavailable(RuntimeError):
    """A meter that cannot be read here: why, and how to mend it."""
