"""One line of JSON per request: no string of a caller's can forge a line."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

log = logging.getLogger("engineroom.access")


class JsonFormatter(logging.Formatter):
    """A record as one JSON object on one line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def access(scope: Any, request_id: str, status: int, seconds: float) -> None:
    """Note one request. The path is the caller's text; the query, which may hold a key, is not
    noted."""
    caller = scope.get("state", {}).get("caller")
    fields = {
        "request_id": request_id,
        "client": scope["client"][0] if scope.get("client") else "",
        "key": caller.name if caller is not None else "",
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(seconds * 1000.0, 2),
    }
    log.info("request", extra={"fields": fields})


__all__ = ["JsonFormatter", "access"]
