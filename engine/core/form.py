"""Form: what a request's output has to fit into, as the scheduler sees it."""

from __future__ import annotations

from typing import Any

__all__ = ["FREE", "Form"]


class Form:
    """This one lets everything pass; engine/features has those of structured output.

    masks: whether mask() says which tokens may come. near: whether a sampled one has to pass
    settle() besides. complete: whether the tokens taken so far are a whole output; None where there
    is no form. cut: whether its end came for want of tokens. error: why no token can come any more.
    """

    masks: bool = False
    near: bool = False
    complete: bool | None = None
    cut: bool = False
    error: str | None = None

    def mask(self) -> Any:
        """The tokens that may come next, as u32 words of 32 tokens each, token 0 in bit 0."""
        raise NotImplementedError

    def settle(self, token_id: int) -> bool:
        """Whether this token may be taken; another has to be sampled where not."""
        return True

    def instead(self) -> int:
        """The token to take where none that was sampled may be."""
        raise NotImplementedError

    def take(self, token_id: int) -> bool:
        """A token of the output, in order. True where nothing may follow it."""
        return False


FREE = Form()
