"""What every request passes first: the host's name, the key, and a count of what became of it."""

import hmac
import ipaddress
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tinyllm_jax.config import ServerConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.server.errors import ApiError
from tinyllm_jax.server.metrics import Metrics
from tinyllm_jax.server.replies import encode_json

Send = Callable[[Any], Awaitable[None]]

# In the environment, since everybody on a machine can read a program's flags.
KEY_VARIABLE = "TINYLLM_API_KEY"


class Gate:
    """ASGI middleware.

    Args:
        app: Answers what is let in.
        settings: Names of the server; its host is the address that it listens at.
        keys: One of these must come with each request, unless there are none.
        metrics: Counts the answers.
        paths: Counted by themselves; what a client makes up is counted together.
        open_paths: Need no key.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        settings: ServerConfig,
        *,
        keys: Sequence[bytes],
        metrics: Metrics,
        paths: Iterable[str],
        open_paths: Iterable[str],
    ):
        self._app, self._keys, self._metrics = app, keys, metrics
        self._paths, self._open_paths = frozenset(paths), frozenset(open_paths)
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self._loopback_only = is_loopback(settings.host)

    async def __call__(self, scope: Any, receive: Any, send: Send) -> None:
        """Let one request in, or not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        headers = dict(scope["headers"])
        problem = self.problem(scope["path"], headers)
        if problem is None:
            await self._app(scope, receive, counted)
            return
        content = encode_json(problem.content).encode()
        told = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        pairs = {**told, "Connection": "close", **problem.headers}.items()
        lines = [(name.lower().encode(), value.encode()) for name, value in pairs]
        await counted({"type": "http.response.start", "status": problem.status, "headers": lines})
        await counted({"type": "http.response.body", "body": content})

    def problem(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        """Say why a request is not let in."""
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        # A page elsewhere whose own name is made to point here would be of the same origin.
        if self._loopback_only and not is_loopback(host) and host not in self._hosts:
            return ApiError(
                403,
                f"This server listens on loopback only and is not known as '{host}'. Use localhost, or "
                "start it with --server.allowed_hosts.",
                code="unknown_host",
            )
        if not self._keys or path in self._open_paths:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and fits(self._keys, given.strip()):
            return None
        return ApiError(
            401,
            "The key is wrong, or there is none. Send 'Authorization: Bearer KEY' with a key of this "
            "server.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def read_keys(api_key_file: str, environment: str) -> list[bytes]:
    """Collect the keys that let requests in: lines of a file, and one from the environment.

    Raises:
        InputError: the file is not there, or one of them holds none.
    """
    keys = [os.fsencode(environment).strip()] if environment else []
    if keys == [b""]:
        raise InputError(f"{KEY_VARIABLE} holds spaces alone. Put a key there, or unset it.")
    if api_key_file:
        path = Path(api_key_file)
        if not path.is_file():
            raise InputError(f"server.api_key_file={path}: no such file. Write a key into it.")
        found = [line.strip() for line in path.read_bytes().splitlines()]
        if not any(found):
            raise InputError(f"server.api_key_file={path}: no key in it. Write one, a line each.")
        keys += filter(None, found)
    return keys


def fits(keys: Sequence[bytes], given: bytes) -> bool:
    """Compare with every key, each in a time that does not tell how much is alike."""
    return sum(hmac.compare_digest(key, given) for key in keys) > 0


def host_name(host: str) -> str:
    """Take the name out of a Host header, without port and brackets."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    return name.strip("[]").lower()


def is_loopback(name: str) -> bool:
    """Tell whether a name or address is this machine's own."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
