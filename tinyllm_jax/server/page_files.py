"""The page to try a model on: a few files, which load nothing from elsewhere."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tinyllm_jax.server.errors import ApiError

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src "
    "'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """The files there are, each under its name; `/` is index.html."""

    def __init__(self) -> None:
        self._files = {
            "/" if path.name == "index.html" else f"/{path.name}": path
            for path in sorted(PAGE.glob("*"))
            if path.suffix in TYPES
        }
        self.names = self._files.keys() | {"/"}

    async def get(self, request: Request) -> Response:
        """Give a file."""
        path = self._files.get(request.url.path)
        if path is None:
            raise ApiError(404, "This server has no page. /openapi.json lists its endpoints.")
        kind = f"{TYPES[path.suffix]}; charset=utf-8"
        return Response(path.read_bytes(), media_type=kind, headers=HEADERS)
