"""What tests of the server share: one that runs in a thread, and small models for it."""

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tinyllm_jax.config import ServeConfig
from tinyllm_jax.data.chat_template import CONTROL_TOKENS
from tinyllm_jax.data.tokenizer import extend_tokenizer
from tinyllm_jax.inference import engine
from tinyllm_jax.inference.language_model import LanguageModel
from tinyllm_jax.model.weights import initial_weights
from tinyllm_jax.server.app import Api
from tinyllm_jax.server.run import Server, make_server, open_socket
from tinyllm_jax.settings import build

NAME = "small"


def settings_of(**values: Any) -> ServeConfig:
    """Give settings of a server for tests, by dotted keys with __ for the dot."""
    few = {"engine.slots": 4, "engine.tokens_per_dispatch": 2, "sampling.max_new_tokens": 12}
    named = {key.replace("__", "."): value for key, value in values.items()}
    return build(ServeConfig, [("", {**few, **named})])


def chat_model(model: LanguageModel, *, context: int) -> LanguageModel:
    """Give random weights that know turns, with the tokenizer of another model."""
    tokenizer = extend_tokenizer(model.tokenizer, CONTROL_TOKENS)
    config = dataclasses.replace(
        model.config, vocab_size=tokenizer.vocab_size, max_position_embeddings=context
    )
    return LanguageModel(config, initial_weights(config, seed=1), tokenizer)


def endless_model(model: LanguageModel) -> LanguageModel:
    """Give a model with much room, which never ends an answer by itself."""
    # One length of the cache: each would be compiled by itself.
    engine.SHORTEST_REACH = 2048
    model = chat_model(model, context=2048)
    return LanguageModel(model.config, model.weights, Endless(model.tokenizer))


class Endless:
    """A tokenizer whose end token no model can pick."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.eos_id = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


@contextlib.contextmanager
def running(service: Any, settings: ServeConfig, *, keys: tuple[bytes, ...] = ()) -> Iterator[str]:
    """Serve in a thread; gives the address, such as http://127.0.0.1:40000."""
    with serving_thread(service, settings, keys=keys) as (_, __, url):
        yield url


@contextlib.contextmanager
def serving_thread(
    service: Any, settings: ServeConfig, *, keys: tuple[bytes, ...] = ()
) -> Iterator[tuple[Server, threading.Thread, str]]:
    """Serve in a thread; gives the server and its thread besides the address."""
    api = Api(
        service, model_name=NAME, sampling=settings.sampling, settings=settings.server, keys=keys
    )
    listening = open_socket("127.0.0.1", 0)
    ready = threading.Event()
    server = make_server(api, on_start=ready.set)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    assert ready.wait(timeout=20)
    try:
        yield server, thread, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def wait_for(happens: Callable[[], Any], *, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.02)


def connect(url: str, *, receive_bytes: int | None = None) -> socket.socket:
    """Open a connection by hand."""
    host, port = url.removeprefix("http://").split(":")
    found = socket.socket()
    if receive_bytes is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    found.settimeout(20)
    found.connect((host, int(port)))
    return found


def post(path: str, body: bytes, *headers: str) -> bytes:
    """Write a request by hand."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found
