"""Receipts: what an answer was computed from and what it was, so that anybody can compute it again.

    receipt = llm.receipt(output, params)
    Path("answer.json").write_text(receipt.to_json())

`engineroom replay answer.json` computes it again. See docs/receipts.md.
"""

from .receipt import Receipt, ReceiptError, changes, first_difference, make, read

__all__ = ["Receipt", "ReceiptError", "changes", "first_difference", "make", "read"]
