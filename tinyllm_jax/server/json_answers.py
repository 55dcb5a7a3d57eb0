"""Answers in JSON, and those that say what went wrong."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tinyllm_jax.server.errors import ApiError, error_content
from tinyllm_jax.server.replies import encode_json


class JsonResponse(Response):
    """JSON in ASCII, as the streams have it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Write it."""
        return encode_json(content).encode()


async def answer_api_error(_: Request, error: ApiError) -> Response:
    """Answer with an error that was raised for it."""
    return JsonResponse(error.content, status_code=error.status, headers=error.headers)


async def answer_http_error(request: Request, error: HTTPException) -> Response:
    """Answer where there is no such path or method."""
    message = f"{request.method} {request.url.path[:200]}: {error.detail}. See /openapi.json."
    content = error_content(error.status_code, message)
    return JsonResponse(content, status_code=error.status_code, headers=error.headers)


async def answer_defect(_: Request, __: Exception) -> Response:
    """Answer when this code is wrong; the traceback goes to the server's log."""
    message = "The server has a defect; its log says more."
    return JsonResponse(error_content(500, message), status_code=500)
