"""`python -m tinyllm_jax.serve`: how it starts, what it refuses, and how it ends."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import test_engine
import test_serve_api
import test_serve_limits
from conftest import ROOT, Command
from serving import connect, post, read_all, settings_of, wait_for

from tinyllm_jax import serve
from tinyllm_jax.config import ServeConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.server import run as server_run
from tinyllm_jax.server.app import Api
from tinyllm_jax.settings import setting_fields

LONG = json.dumps({"prompt": "Once", "max_tokens": 10**6, "stream": True}).encode()


# That of the other tests, whose programs are compiled already.
SHAPE = ["--engine.slots", "4", "--engine.tokens_per_dispatch", "2"]


class Running:
    """A server in a process of its own."""

    def __init__(self, command: Command, *flags: str, endless: bool = False):
        program = [str(ROOT / "tests" / "serve_program.py")] if endless else []
        words = program or ["-m", "tinyllm_jax.serve"]
        self.process = subprocess.Popen(
            [sys.executable, *words, "--port", "0", *SHAPE, *flags],
            **command.options,  # type: ignore[arg-type]
        )
        self.said: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if line.startswith("Try:"):
                break
        found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", "".join(self.said))
        assert found, self.said
        self.url = found[1]

    def end(self, *, seconds: float = 30) -> tuple[int, str]:
        """Wait until it has ended; gives the exit code and what it said since it began."""
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.mark.slow
def test_it_says_where_it_is_and_what_to_type(command: Command, trained_run: Path) -> None:
    with Running(command, "--checkpoint", str(trained_run)) as server:
        said = "".join(server.said)
        assert f"{server.url}/v1: small, 4 answers at the same time." in said
        assert f"Page: {server.url}/\n" in said
        line = next(line for line in server.said if line.startswith("Try: curl"))
        url, body = re.fullmatch(r"Try: curl (\S+) -H '[^']*' -d '(.*)'\n", line).groups()  # type: ignore[union-attr]
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data=body.encode(), headers=headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["choices"][0]["text"]
        server.process.send_signal(signal.SIGINT)
        code, said = server.end()
        assert code == 0, said
        assert "Traceback" not in said


@pytest.mark.slow
def test_sigterm_lets_answers_end_and_refuses_new_ones(command: Command, trained_run: Path) -> None:
    with Running(command, "--checkpoint", str(trained_run), endless=True) as server:
        with connect(server.url) as connection, connect(server.url) as idle:
            connection.sendall(post("/v1/completions", LONG))
            found = connection.recv(200)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.stderr is not None
            assert server.process.stderr.readline().startswith("Stopping: answers in work have 30")
            with (
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
                pytest.raises(openai.InternalServerError) as caught,
            ):
                client.completions.create(model="small", prompt="A")
            assert caught.value.status_code == 503
            assert int(caught.value.response.headers["Retry-After"]) >= 1
            with pytest.raises(urllib.error.HTTPError, match="503"):
                urllib.request.urlopen(f"{server.url}/health", timeout=20)
            found += read_all(connection)
            assert found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert b'"finish_reason":"length"' in found
            assert read_all(idle) == b""
        assert server.end()[0] == 0


@pytest.mark.slow
def test_answers_that_take_too_long_are_cut_and_said_to_be(
    command: Command, trained_run: Path
) -> None:
    flags = ["--checkpoint", str(trained_run), "--server.drain_seconds", "0"]
    with Running(command, *flags, endless=True) as server, connect(server.url) as connection:
        connection.sendall(post("/v1/completions", LONG))
        found = connection.recv(200)
        server.process.send_signal(signal.SIGTERM)
        found += read_all(connection)
        assert b"The server is stopping" in found
        assert b"[DONE]" not in found
        assert server.end()[0] == 1


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(command: Command, trained_run: Path) -> None:
    with Running(command, "--checkpoint", str(trained_run), endless=True) as server:
        with connect(server.url) as connection:
            connection.sendall(post("/v1/completions", LONG))
            connection.recv(200)
            start = time.monotonic()
            for _ in range(2):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.1)
            code, said = server.end()
            assert time.monotonic() - start < 10
        assert code == 1
        assert "Traceback" not in said


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "127.1", "0x7f000001", "0.0.0.0"])
def test_a_server_on_loopback_knows_it_however_its_host_is_spelled(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Api] = []

    def keep(api: Api, **_: Any) -> None:
        made.append(api)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "start_service", lambda *_: SimpleNamespace())
    monkeypatch.setattr(server_run, "make_server", keep)
    with pytest.raises(KeyboardInterrupt):
        serve.main(["--checkpoint", str(tmp_path), "--host", host, "--port", "0"])
    problem = made[0].app().problem("/health", {b"host": b"evil.example"})  # type: ignore[attr-defined]
    assert (problem is None) == (host == "0.0.0.0")


# What is refused ----------------------------------------------------------------------------------


def test_a_port_in_use_is_said_before_anything_slow(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"port={port} is in use.*--port 0"):
            serve.main(["--checkpoint", str(tmp_path / "none"), "--port", str(port)])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "--checkpoint is missing"),
        (["--port", "99999"], "65535 or less"),
        (["--port", "many"], "a whole number"),
        (["--server.prot", "1"], "server.port"),
        (["--prompt", "Hello"], "sampling.prompt says nothing"),
        (["--slide"], "sampling.slide says nothing"),
        (["--num-samples", "17"], "server.max_choices=16"),
        (["--host", "no.such.host.example"], "no address of this machine"),
        (["--server.api_key_file", "none"], "no such file"),
        (["--port", "0"], "none"),
    ],
)
def test_a_bad_command_is_refused_in_one_line(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        serve.main([*(["--checkpoint", "none"] if flags else []), *flags])


def test_missing_packages_are_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"starlette.*pip install 'tinyllm\[serve\]'"):
        serve.main(["--checkpoint", "none"])


@pytest.mark.parametrize(
    ("path", "name"),
    [("runs/a", "a"), ("runs/a/best", "a"), ("runs/a/checkpoints/300", "a"), ("b.gguf", "b.gguf")],
)
def test_a_model_has_the_name_of_its_run(path: str, name: str, tmp_path: Path) -> None:
    assert serve.run_name(tmp_path / path) == name


# The settings of the server -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_name_and_a_number_of_answers_are_settings(trained_run: Path, command: Command) -> None:
    flags = ["--checkpoint", str(trained_run), "--server.model_name", "mine"]
    flags += ["--server.max_choices", "1", "--engine.replicas", "2"]
    with Running(command, *flags) as server:
        wait_for(
            lambda: b"tinyllm_replicas 2.0" in test_serve_limits.get(f"{server.url}/metrics")[2]
        )
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert client.models.list().data[0].id == "mine"
            with pytest.raises(openai.BadRequestError, match="gives 1 to a request"):
                client.completions.create(model="mine", prompt="A", n=2)
            assert client.completions.create(model="mine", prompt="A").model == "mine"
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0


# Each setting of the section, and the test that sees what it does.
SHOWN_BY: dict[str, Any] = {
    "server.host": test_serve_limits.test_a_loopback_server_answers_to_its_own_names_only,
    "server.port": test_a_port_in_use_is_said_before_anything_slow,
    "server.model_name": test_a_name_and_a_number_of_answers_are_settings,
    "server.api_key_file": test_serve_limits.test_keys_come_from_a_file_and_the_environment,
    "server.allowed_hosts": test_serve_limits.test_a_loopback_server_answers_to_its_own_names_only,
    "server.max_body_bytes": (
        test_serve_limits.test_a_long_body_is_refused_whether_it_says_its_length_or_not
    ),
    "server.max_choices": test_a_name_and_a_number_of_answers_are_settings,
    "server.max_connections": test_serve_limits.test_more_clients_than_allowed_are_turned_away,
    "server.buffer_pieces": test_serve_limits.test_only_so_much_is_kept_for_a_slow_reader,
    "server.request_seconds": (
        test_serve_limits.test_a_request_that_does_not_come_is_not_waited_for
    ),
    "server.answer_seconds": test_serve_limits.test_an_answer_may_take_only_so_long,
    "server.stall_seconds": test_serve_limits.test_a_client_that_reads_nothing_is_let_go,
    "server.drain_seconds": test_answers_that_take_too_long_are_cut_and_said_to_be,
}
SHOWN_BY |= {
    "engine.slots": test_serve_limits.test_too_many_questions_are_told_when_to_come_again,
    "engine.queue": test_serve_limits.test_too_many_questions_are_told_when_to_come_again,
    "engine.replicas": test_a_name_and_a_number_of_answers_are_settings,
    "engine.context": test_engine.test_less_room_ends_answers_earlier,
    "engine.prefill_tokens": test_engine.test_settings_change_what_they_name,
    "engine.tokens_per_dispatch": test_engine.test_settings_change_what_they_name,
    "engine.weights": test_engine.test_settings_change_what_they_name,
}
SHOWN_BY |= {
    name: test_serve_api.test_settings_of_sampling_hold_where_a_request_says_nothing
    for name in setting_fields(ServeConfig)
    if name.startswith("sampling.")
}


def test_every_setting_of_the_server_is_shown_to_do_something() -> None:
    assert {*SHOWN_BY} == {*setting_fields(ServeConfig)}
    assert settings_of(server__port=0).server.port == 0
