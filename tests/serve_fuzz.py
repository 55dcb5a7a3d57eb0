"""Requests that are wrong in every way, at a running server: it must answer each, and never with 5xx.

    python tests/serve_fuzz.py http://127.0.0.1:8000 [--requests 10000] [--seed 0] [--pid PID]

Prints how many got which status, the slowest answer, and, with --pid, how the memory of the server
grew. A request is a good one with parts replaced, or no request at all.
"""

import argparse
import collections
import copy
import json
import random
import socket
import sys
import time
from pathlib import Path
from typing import Any

PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "Once", "max_tokens": 2}),
    ("/v1/completions", {"prompt": ["Once", "A"], "n": 2, "max_tokens": 1, "logprobs": 2}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True},
    ),
]
NAMES = (
    *("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "repetition_penalty", "n", "stop", "seed", "stream", "stream_options"),
    *("logprobs", "top_logprobs", "tools", "logit_bias", "echo", "user", "role", "content", "new"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**70), 0.5, 1e-320, 1e308, -0.0),
    *("", "a", "true", "\0", "\ufeff", "😀" * 50, "Once upon a time " * 99, "</s>", "<|im_end|>"),
    *([], {}, [[]], [None], ["a", 1], [1, 2], [[1], [2]], [10**9], [-1], [""], ["a"] * 40),
    *({"a": 1}, {"include_usage": 1}, [{"role": "user"}], [{"role": "user", "content": []}]),
    [{"role": "user", "content": [{"type": "text", "text": "\n"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}],
)
BODIES = (
    *(b"", b"{", b"nul", b"[]", b'"a"', b"1", b"\xff\xfe", b'{"prompt": "\\ud800"}'),
    *(b'{"prompt": NaN}', b'{"prompt": 1e999, "n": 1e999}', b'{"a":' * 3000, b"[" * 100_000),
    b'{"prompt": "' + b"x" * 70_000 + b'"}',
    b'{"prompt": "a", "prompt": ["b"], "max_tokens": 1' + b"0" * 5000 + b"}",
)
HEADERS = (
    *("Content-Type: text/plain", "Content-Type: application/json; charset=utf-7", "Expect: 1"),
    *("Content-Length: -1", "Content-Length: 9" * 9, "Transfer-Encoding: chunked", "A: \x01"),
    *("Authorization: Basic x", "Host: evil.example", "X: " + "y" * 9000, "Connection: Upgrade"),
    "Upgrade: websocket",
)


def make(draw: random.Random) -> tuple[bytes, bool]:
    """Write one request, and say whether a server can tell that it has come to its end."""
    path, content = draw.choice(PLAIN)
    content = json.loads(json.dumps(content))
    for _ in range(draw.randint(1, 3)):
        place: Any = content
        if draw.random() < 0.2 and isinstance(content.get("messages"), list):
            place = draw.choice(content["messages"] or [content])
        if isinstance(place, dict):
            place[draw.choice(NAMES)] = copy.deepcopy(draw.choice(VALUES))
    body = json.dumps(content).encode()
    method, version, headers = "POST", "HTTP/1.1", ["Content-Type: application/json"]
    whole = True
    length = f"Content-Length: {len(body)}"
    kind = draw.random()
    if kind < 0.15:
        body = draw.choice(BODIES)
        length = f"Content-Length: {len(body)}"
    elif kind < 0.25:
        cut = draw.randrange(len(body))
        body = body[:cut] + draw.randbytes(draw.randint(0, 4)) + body[cut + draw.randint(0, 4) :]
        length = f"Content-Length: {len(body)}"
    elif kind < 0.3:
        headers.insert(draw.randint(0, 1), draw.choice(HEADERS))
        whole = False
    elif kind < 0.33:
        method = draw.choice(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW", "post", ""])
    elif kind < 0.36:
        path = draw.choice(["/", "//", "/v1", "/v1/models/%2e%2e", "/../..", "*", "/%00", "/é"])
    elif kind < 0.38:
        version = draw.choice(["HTTP/1.0", "HTTP/9.9", "", "FTP/1.1"])
    elif kind < 0.4:
        return draw.randbytes(draw.randint(1, 200)) + b"\r\n\r\n", False
    head = [f"{method} {path} {version}", "Host: localhost", "Connection: close", length, *headers]
    return "\r\n".join(head).encode("latin-1", "replace") + b"\r\n\r\n" + body, whole


def send(address: tuple[str, int], request: bytes, *, whole: bool) -> tuple[str, bytes]:
    """Send a request and read all that is answered; gives the status beside it."""
    with socket.create_connection(address, timeout=20) as connection:
        found = b""
        try:
            connection.sendall(request)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
        except ConnectionError:
            pass  # refused before it was all there
        try:
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
    return found[9:12].decode("latin-1") or "none", found


def resident_megabytes(pid: int) -> float:
    """Read how much memory a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def campaign(url: str, *, requests: int, seed: int, pid: int | None = None) -> dict[str, Any]:
    """Send so many requests, one after the other.

    Raises:
        AssertionError: one was answered with 5xx or an error in another shape; it is shown.
        TimeoutError: one was not answered.
    """
    host, port = url.removeprefix("http://").split(":")
    draw, counts, slowest = random.Random(seed), collections.Counter(), 0.0
    memory = []
    for number in range(requests):
        if pid and number % max(requests // 10, 1) == 0:
            memory.append(round(resident_megabytes(pid), 1))
        request, whole = make(draw)
        start = time.perf_counter()
        status, answer = send((host, int(port)), request, whole=whole)
        slowest = max(slowest, time.perf_counter() - start)
        counts[status] += 1
        assert not status.startswith("5"), (request, answer)
        assert answer or not whole, request
        head, _, body = answer.partition(b"\r\n\r\n")
        if status.startswith("4") and b"application/json" in head and body:
            assert {*json.loads(body)["error"]} == {"message", "type", "param", "code"}, request
    return {"statuses": dict(counts), "slowest_seconds": round(slowest, 3), "megabytes": memory}


def main() -> None:
    """Run the campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int)
    given = parser.parse_args()
    found = campaign(given.url, requests=given.requests, seed=given.seed, pid=given.pid)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
