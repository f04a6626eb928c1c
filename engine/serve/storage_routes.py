"""/v1/files and /v1/batches: OpenAI's paths over the data folder.

Source: the OpenAI API reference (files, batches). Fields that ask for what is not here are refused.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.types import Message

from ..core.sampling_params import SamplingParams
from .batches import ENDPOINTS, BatchList, BatchQuery, BatchRequest
from .body import read
from .errors import ApiError
from .files import FileList, FileQuery, page_of
from .query import query
from .service import Caller, Service, Work
from .sse import dump
from .storage import Storage

_FORM_BYTES = 1 << 16  # of an upload beside the file itself


class StorageRoutes:
    """One method per operation on files and batches."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create_file(self, request: Request) -> Response:
        store, limit = self._storage().files, self._service.settings.max_file_bytes
        upload, purpose = await _upload(request, limit)
        try:
            if purpose != "batch":
                raise ApiError(
                    "unsupported",
                    "purpose: files are for batches here; send purpose='batch'",
                    param="purpose",
                )
            size = upload.size or 0
            if size > limit:
                raise ApiError(
                    "body_too_large", f"the file has {size} bytes; at most {limit}", param="file"
                )
            made = await asyncio.to_thread(
                store.create,
                _caller(request).owner,
                upload.file,
                size,
                filename=upload.filename or "",
                purpose=purpose,
            )
        finally:
            await upload.close()
        return _json(made)

    async def files(self, request: Request) -> Response:
        store, owner = self._storage().files, _caller(request).owner
        asked = query(request, FileQuery)
        rows = await asyncio.to_thread(store.files, owner)
        if asked.purpose:
            rows = [row for row in rows if row.purpose == asked.purpose]
        rows = rows if asked.order == "desc" else rows[::-1]
        found, more = page_of(rows, asked.after, asked.limit)
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return _json(FileList(data=found, first_id=first, last_id=last, has_more=more))

    async def file(self, request: Request) -> Response:
        owner, file_id = _caller(request).owner, request.path_params["file_id"]
        return _json(await asyncio.to_thread(self._storage().files.get, owner, file_id))

    async def file_content(self, request: Request) -> Response:
        owner, file_id = _caller(request).owner, request.path_params["file_id"]
        path = await asyncio.to_thread(self._storage().files.path, owner, file_id)
        return FileResponse(path, media_type="application/octet-stream")

    async def delete_file(self, request: Request) -> Response:
        owner, file_id = _caller(request).owner, request.path_params["file_id"]
        return _json(await asyncio.to_thread(self._storage().files.delete, owner, file_id))

    async def create_batch(self, request: Request) -> Response:
        batches, caller = self._storage().batches, _caller(request)
        body = await read(request, BatchRequest, self._service.settings)
        if body.endpoint not in ENDPOINTS:
            raise ApiError(
                "invalid_value", f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint"
            )
        if body.output_expires_after is not None:
            raise ApiError(
                "unsupported",
                "output_expires_after: files stay until they are deleted",
                param="output_expires_after",
            )
        if self._service.draining:
            raise ApiError("draining", "the server is ending and takes no more requests")
        salt = Work(prompt="", params=SamplingParams(), caller=caller).salt
        made = await asyncio.to_thread(
            batches.create,
            caller.owner,
            salt,
            input_file_id=body.input_file_id,
            endpoint=body.endpoint,
            completion_window=body.completion_window,
            metadata=body.metadata,
        )
        return _json(made)

    async def batches(self, request: Request) -> Response:
        batches, asked = self._storage().batches, query(request, BatchQuery)
        found, more = batches.page(_caller(request).owner, asked.after, asked.limit)
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return _json(BatchList(data=found, first_id=first, last_id=last, has_more=more))

    async def batch(self, request: Request) -> Response:
        owner, batch_id = _caller(request).owner, request.path_params["batch_id"]
        return _json(self._storage().batches.get(owner, batch_id))

    async def cancel_batch(self, request: Request) -> Response:
        owner, batch_id = _caller(request).owner, request.path_params["batch_id"]
        return _json(await asyncio.to_thread(self._storage().batches.cancel, owner, batch_id))

    def _storage(self) -> Storage:
        if self._service.storage is None:
            raise ApiError(
                "storage_off",
                "this server keeps no files and runs no batches: it was started without a folder "
                "for them; serve with --data-dir FOLDER",
            )
        return self._service.storage


async def _upload(request: Request, limit: int) -> tuple[UploadFile, str]:
    """(the file, its purpose) of a form. Errors: ApiError."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(
            "unsupported_media_type", "a file is sent as multipart/form-data, with its purpose"
        )
    left = limit + _FORM_BYTES

    async def receive() -> Message:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise ApiError("body_too_large", f"the file exceeds {limit} bytes", param="file")
        return message

    try:
        form = await Request(request.scope, receive).form(
            max_files=1, max_fields=8, max_part_size=_FORM_BYTES
        )
    except HTTPException as error:  # what the parser refuses
        raise ApiError("invalid_value", f"the form cannot be read: {error.detail}") from None
    file, purpose = form.get("file"), form.get("purpose")
    try:
        for name in form:
            if name not in ("file", "purpose"):
                raise ApiError("unsupported", f"{name[:64]}: not supported here", param=name[:64])
        if not isinstance(file, UploadFile):
            raise ApiError("invalid_value", "the form has no file", param="file")
        if not isinstance(purpose, str):
            raise ApiError("invalid_value", "the form has no purpose", param="purpose")
    except ApiError:
        await form.close()
        raise
    return file, purpose


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["state"]["caller"]
    return caller


def _json(value: Any) -> Response:
    return Response(dump(value), media_type="application/json")


__all__ = ["StorageRoutes"]
