"""Bad clients: strangers, slow ones, those that leave, and those that send anything at all."""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_fuzz import campaign
from serving import (
    NAME,
    connect,
    endless_model,
    post,
    read_all,
    running,
    serving_thread,
    settings_of,
    wait_for,
)

from tinyllm_jax.errors import InputError
from tinyllm_jax.inference import engine
from tinyllm_jax.inference.language_model import load
from tinyllm_jax.inference.service import Piece, Service, ServiceStats
from tinyllm_jax.server import page_files, run
from tinyllm_jax.server.gate import read_keys

# An answer that takes longer than any test.
LONG = json.dumps({"prompt": "Once", "max_tokens": 10**6, "stream": True, "logprobs": 20}).encode()


@pytest.fixture(scope="module")
def service(trained_run: Path) -> Iterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "SHORTEST_REACH", engine.SHORTEST_REACH)  # put back in the end
        service = Service(endless_model(load(trained_run)), settings_of(engine__queue=4).engine)
        service.start()
        yield service
        service.stop()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with running(service, settings_of()) as url:
        yield url
    assert service.stats().busy_slots == 0


def busy(service: Service) -> int:
    return service.stats().busy_slots + service.stats().waiting


def get(url: str, **headers: str) -> tuple[int, Any, Any]:
    """Get a page as (status, headers, body)."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


# Who is let in --------------------------------------------------------------------------------------


def test_without_a_key_only_health_page_and_description_are_open(service: Service) -> None:
    with running(service, settings_of(), keys=(b"first", b"second")) as url:
        for key in ("first", "second"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                assert client.completions.create(model=NAME, prompt="A", max_tokens=2).usage
        for key in ("firs", "firstt", "FIRST", "second first"):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError) as caught:
                    client.completions.create(model=NAME, prompt="A")
                assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/v1/none", "/none"):
            assert get(f"{url}{path}")[0] == 401, path
        assert get(f"{url}/v1/models", Authorization="Basic first")[0] == 401
        assert get(f"{url}/v1/models", Authorization="bearer first")[0] == 200
        for path in ("/health", "/openapi.json"):
            assert get(f"{url}{path}")[0] == 200, path


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    assert read_keys(str(file), "three") == [b"three", b"one", b"two"]
    assert read_keys("", "") == []
    # Of a file that was read into the environment, the end of the line comes along.
    assert read_keys("", "three\n") == [b"three"]
    assert read_keys("", os.fsdecode(b"\xff")) == [b"\xff"]
    with pytest.raises(InputError, match="spaces alone"):
        read_keys("", " \n")
    file.write_text("\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(str(file), "")
    with pytest.raises(InputError, match="no such file"):
        read_keys(str(tmp_path / "none"), "three")


def test_a_loopback_server_answers_to_its_own_names_only(service: Service) -> None:
    with running(service, settings_of(server__allowed_hosts=("my.box",))) as url:
        for host in ("localhost", "localhost:80", "127.0.0.1:9", "[::1]:80", "[::1]", "MY.box:1"):
            assert get(f"{url}/health", Host=host)[0] == 200, host
        for host in ("evil.example", "localhost.evil.example", "", "10.0.0.1:8000"):
            status, _, body = get(f"{url}/health", Host=host)
            assert status == 403, host
            assert "allowed_hosts" in json.loads(body)["error"]["message"]
    with running(service, settings_of(server__host="0.0.0.0")) as url:
        assert get(f"{url}/health", Host="evil.example")[0] == 200


def test_a_body_must_be_said_to_be_json(url: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, body = get_post(url, b'{"prompt": "A"}', kind)
        assert status == 415, kind
        assert "Content-Type: application/json" in body["error"]["message"]
    assert get_post(url, b'{"prompt": "A"}', "application/json; charset=utf-8")[0] == 200


def get_post(url: str, body: bytes, kind: str) -> tuple[int, Any, Any]:
    """Post a body as (status, headers, JSON)."""
    request = urllib.request.Request(
        f"{url}/v1/completions", data=body, headers={"Content-Type": kind}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, json.load(error)


def test_what_is_not_there_is_said_in_the_same_shape(url: str) -> None:
    for path, method, status in (("/none", "GET", 404), ("/v1/completions", "GET", 405)):
        found, _, body = get(f"{url}{path}")
        assert found == status
        assert f"{method} {path}" in json.loads(body)["error"]["message"]


# How large and how slow -----------------------------------------------------------------------------


def test_a_long_body_is_refused_whether_it_says_its_length_or_not(service: Service) -> None:
    with running(service, settings_of(server__max_body_bytes=100)) as url:
        fits = json.dumps({"prompt": "A", "max_tokens": 1, "user": "x" * 48}).encode()
        assert len(fits) <= 100
        assert get_post(url, fits, "application/json")[0] == 200
        with connect(url) as connection:
            connection.sendall(post("/v1/completions", fits + b" " * 101))
            assert b" 413 " in read_all(connection)
        with connect(url) as connection:
            head = post("/v1/completions", b"", "Transfer-Encoding: chunked")
            connection.sendall(head.replace(b"Content-Length: 0\r\n", b""))
            connection.sendall(b"".join(b"20\r\n" + b" " * 32 + b"\r\n" for _ in range(4)))
            found = read_all(connection)
            assert b" 413 " in found
            assert b"more than 100 bytes" in found


def test_a_request_that_does_not_come_is_not_waited_for(service: Service) -> None:
    with running(service, settings_of(server__request_seconds=0.3)) as url:
        beginnings = (b"", b"POST /v1/compl", post("/v1/completions", b"{}", "X: y")[:-2])
        for sent in beginnings:
            with connect(url) as connection:
                connection.sendall(sent)
                start = time.monotonic()
                answer = read_all(connection)
                assert time.monotonic() - start < 5
                assert answer == b"" or b" 408 " in answer
        with connect(url) as connection:  # and again on a connection that was used
            for _ in range(2):
                connection.sendall(post("/v1/completions", b'{"prompt": "A", "max_tokens": 1}'))
                assert b" 200 " in read_until(connection, b"}}")
            connection.sendall(b"POST /v1")
            assert read_all(connection) == b""


def test_a_head_without_end_is_refused(url: str) -> None:
    sent = 0
    with connect(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\n")
        while sent < 10_000_000:
            sent += connection.send(b"X: " + b"y" * 1000 + b"\r\n")
    assert 65_536 <= sent < 10_000_000


def test_an_answer_may_take_only_so_long(service: Service) -> None:
    with running(service, settings_of(server__answer_seconds=0.05)) as url:
        with connect(url) as connection:
            connection.sendall(post("/v1/completions", LONG))
            found = read_until(connection, b'"code":"timeout"')
            assert b"event-stream" in found
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
            pytest.raises(openai.InternalServerError, match="longer than the 0.05 seconds"),
        ):
            client.completions.create(model=NAME, prompt="A", max_tokens=2000)
        wait_for(lambda: busy(service) == 0)


def read_until(connection: socket.socket, word: bytes) -> bytes:
    """Read until something was said."""
    found = b""
    while word not in found:
        part = connection.recv(65536)
        assert part, found[-500:]
        found += part
    return found


def test_too_many_questions_are_told_when_to_come_again(service: Service, url: str) -> None:
    waiting = [connect(url) for _ in range(8)]  # 4 slots, 4 in the queue
    for connection in waiting:
        connection.sendall(post("/v1/completions", LONG))
    wait_for(lambda: busy(service) == 8)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model=NAME, prompt="A")
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 60
        assert get(f"{url}/health")[0] == 200
        for connection in waiting[4:]:
            connection.close()
        wait_for(lambda: busy(service) == 4)
        # Two of three answers fit: none is begun.
        for connection in waiting[:2]:
            connection.close()
        wait_for(lambda: busy(service) == 2)
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model=NAME, prompt="A", n=7, max_tokens=100)
        wait_for(lambda: busy(service) == 2)
    for connection in waiting:
        connection.close()
    wait_for(lambda: busy(service) == 0)


def test_more_answers_than_there_are_places_are_never_worth_another_try(
    service: Service, url: str
) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError, match=r"room for 8 .*engine\.queue") as caught:
            client.completions.create(model=NAME, prompt=["A", "B", "C"], n=3, max_tokens=2)
        assert "Retry-After" not in caught.value.response.headers
        found = client.completions.create(model=NAME, prompt=["A", "B"], n=4, max_tokens=2)
        assert len(found.choices) == 8


def test_more_clients_than_allowed_are_turned_away(service: Service) -> None:
    with running(service, settings_of(server__max_connections=1)) as url:
        assert get(f"{url}/health")[0] == 200
    with running(service, settings_of(server__max_connections=3)) as url:
        idle = [connect(url) for _ in range(2)]
        time.sleep(0.2)
        assert get(f"{url}/health")[0] == 200
        idle.append(connect(url))
        wait_for(lambda: get(f"{url}/health")[0] == 503)
        for connection in idle:
            connection.close()
        wait_for(lambda: get(f"{url}/health")[0] == 200)


# Clients that leave ---------------------------------------------------------------------------------


def test_200_clients_that_leave_midway_free_their_slots(service: Service, url: str) -> None:
    before = service.stats()

    def ask_and_leave(number: int) -> None:
        with connect(url) as connection:
            connection.sendall(post("/v1/completions", LONG if number % 2 else NOT_STREAMED))
            if number % 2:
                read_until(connection, b"data: ")

    def patient(number: int) -> None:
        # The queue is short; who finds it full comes again.
        wait_for(lambda: busy(service) < 6)
        ask_and_leave(number)

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(patient, range(200)))
    wait_for(lambda: busy(service) == 0)
    after = service.stats()
    assert after.requests_total - before.requests_total == 200
    assert after.cancelled_total - before.cancelled_total == 200


NOT_STREAMED = json.dumps({"prompt": "Once", "max_tokens": 10**6}).encode()


@pytest.mark.parametrize("body", [LONG, NOT_STREAMED])
def test_a_client_that_closes_its_half_holds_no_slot(
    body: bytes, service: Service, url: str
) -> None:
    with connect(url) as connection:
        connection.sendall(post("/v1/completions", body))
        wait_for(lambda: busy(service) == 1)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: busy(service) == 0)


def test_a_client_that_leaves_the_queue_is_never_begun(service: Service, url: str) -> None:
    first = [connect(url) for _ in range(4)]
    for connection in first:
        connection.sendall(post("/v1/completions", LONG))
    wait_for(lambda: service.stats().busy_slots == 4)
    with connect(url) as late:
        late.sendall(post("/v1/completions", LONG))
        wait_for(lambda: service.stats().waiting == 1)
    wait_for(lambda: service.stats().waiting == 0)
    assert service.stats().busy_slots == 4
    for connection in first:
        connection.close()
    wait_for(lambda: busy(service) == 0)


# What the real service does not do on demand ----------------------------------------------------------


@dataclasses.dataclass
class Scripted:
    """A service that says what it is told to, from the asking thread."""

    service: Service
    pieces: list[Piece]
    repeat_last: bool = False
    cancelled: int = 0
    is_well: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.service, name)

    def ask(self, *_: Any, on_piece: Any, **__: Any) -> Any:
        pool = concurrent.futures.ThreadPoolExecutor(1)
        before = self.cancelled

        def tell() -> None:
            for piece in self.pieces:
                on_piece(piece)
            while self.repeat_last and self.cancelled == before:
                on_piece(self.pieces[-1])
                time.sleep(0.0005)

        pool.submit(tell)
        pool.shutdown(wait=False)
        return self

    prompt_tokens = 3

    def drain(self, *, seconds: float) -> bool:
        del seconds
        return True

    def stop(self) -> None:
        pass

    def cancel(self) -> None:
        self.cancelled += 1

    def stats(self) -> ServiceStats:
        return self.service.stats()


@pytest.mark.parametrize(("ended", "status"), [("failed", 500), ("cancelled", 503)])
def test_an_answer_that_fails_is_told_as_an_error(
    ended: str, status: int, service: Service
) -> None:
    scripted = Scripted(service, [Piece("Once", (), 1, ""), Piece("", (), 0, ended)])
    with running(scripted, settings_of()) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=NAME, prompt="A")
            assert caught.value.status_code == status
            texts = []
            with (
                pytest.raises(openai.APIError, match="server"),
                client.completions.create(model=NAME, prompt="A", stream=True) as stream,
            ):
                texts += [event.choices[0].text for event in stream]
        scripted.is_well = False
        assert get(f"{url}/health")[0] == 503


def test_a_client_that_reads_nothing_is_let_go(service: Service) -> None:
    scripted = Scripted(service, [Piece("x" * 20_000, (), 1, "")], repeat_last=True)
    settings = settings_of(server__stall_seconds=0.3, server__buffer_pieces=10**6)
    with running(scripted, settings) as url, connect(url, receive_bytes=4096) as connection:
        connection.sendall(post("/v1/completions", LONG))
        wait_for(lambda: scripted.cancelled > 0)
        assert not read_all(connection).endswith(b"0\r\n\r\n"), "it was cut, and seems whole"


@pytest.mark.parametrize("characters", [30_000, 10_000_000])
def test_a_client_that_reads_nothing_of_a_whole_answer_is_let_go(
    characters: int, service: Service
) -> None:
    scripted = Scripted(service, [Piece("x" * characters, (), 1, "length")])
    settings = settings_of(server__stall_seconds=0.3, server__max_connections=1)
    with running(scripted, settings) as url, connect(url, receive_bytes=4096) as connection:
        connection.sendall(post("/v1/completions", NOT_STREAMED, "Connection: close"))
        found = connection.recv(10)
        wait_for(lambda: get(f"{url}/health")[0] == 200)
        found += read_all(connection)
        assert (len(found) > characters) == (characters < 100_000)


def test_a_client_that_reads_slowly_gets_its_whole_answer(service: Service) -> None:
    scripted = Scripted(service, [Piece("x" * 8_000_000, (), 1, "length")])
    settings = settings_of(server__stall_seconds=0.5)
    with running(scripted, settings) as url, connect(url, receive_bytes=65536) as connection:
        connection.sendall(post("/v1/completions", NOT_STREAMED, "Connection: close"))
        found, start = 0, time.monotonic()
        while part := connection.recv(1_000_000):
            found += len(part)
            time.sleep(len(part) / 4_000_000)
        assert found > 8_000_000
        assert time.monotonic() - start > 3 * 0.5


@pytest.mark.parametrize(("drain_seconds", "whole"), [(30.0, True), (0.0, False)])
def test_at_the_end_a_slow_reader_has_what_is_left_of_the_time(
    drain_seconds: float, whole: bool, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "CLOSING_SECONDS", 0.3)
    scripted = Scripted(service, [Piece("x" * 10_000_000, (), 1, "length")])
    settings = settings_of(server__drain_seconds=drain_seconds)
    with (
        serving_thread(scripted, settings) as (server, thread, url),
        connect(url, receive_bytes=4096) as connection,
    ):
        connection.sendall(post("/v1/completions", LONG))
        found = connection.recv(100)
        server.handle_exit()
        thread.join(timeout=1)
        assert thread.is_alive() == whole
        found += read_all(connection)
        thread.join(timeout=10)
        assert found.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") == whole
        assert server.was_drained == whole


def test_a_signal_while_the_last_bytes_go_out_ends_at_once(service: Service) -> None:
    scripted = Scripted(service, [Piece("x" * 10_000_000, (), 1, "length")])
    with (
        serving_thread(scripted, settings_of()) as (server, thread, url),
        connect(url, receive_bytes=4096) as connection,
    ):
        connection.sendall(post("/v1/completions", LONG))
        connection.recv(100)
        server.handle_exit()
        wait_for(lambda: server.should_exit)
        server.handle_exit()
        thread.join(timeout=3)
        assert not thread.is_alive()
        assert not server.was_drained


def test_only_so_much_is_kept_for_a_slow_reader(service: Service) -> None:
    scripted = Scripted(service, [Piece("x" * 20_000, (), 1, "")], repeat_last=True)
    settings = settings_of(server__stall_seconds=60.0, server__buffer_pieces=32)
    with running(scripted, settings) as url, connect(url, receive_bytes=4096) as connection:
        connection.sendall(post("/v1/completions", LONG))
        wait_for(lambda: scripted.cancelled > 0)


# Page and counts --------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_files, "PAGE", tmp_path)
    with running(service, settings_of()) as url:
        status, _, body = get(f"{url}/")
        assert status == 404
        assert "no page" in json.loads(body)["error"]["message"]
    for name in ("index.html", "page.js", "page.css", "secret.txt"):
        (tmp_path / name).write_text(name)
    with running(service, settings_of(), keys=(b"key",)) as url:
        for path, kind in (("/", "html"), ("/page.js", "javascript"), ("/page.css", "css")):
            status, headers, body = get(f"{url}{path}")
            assert status == 200
            assert headers["Content-Type"] == f"text/{kind}; charset=utf-8"
            policy = headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'")
            assert "unsafe" not in policy
        assert get(f"{url}/secret.txt")[0] == 401
        assert get(f"{url}/secret.txt", Authorization="Bearer key")[0] == 404


def test_metrics_count_requests_tokens_and_times(service: Service, url: str) -> None:
    def told() -> dict[str, float]:
        lines = get(f"{url}/metrics")[2].decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    before = told()
    get_post(url, b'{"prompt": "A", "max_tokens": 5, "n": 2}', "application/json")
    get_post(url, b'{"prompt": "A", "x": 5}', "application/json")
    for name in (NAME, "none"):
        get(f"{url}/v1/models/{name}")
    for number in range(3):
        get(f"{url}/made/up/{number}")
    after = told()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["tinyllm_new_tokens_total"] == 10
    assert grown["tinyllm_questions_total"] == 2
    assert grown["tinyllm_answer_seconds_count"] == 1
    assert grown["tinyllm_first_token_seconds_count"] == 1
    requests = "tinyllm_http_requests_total"
    assert grown[f'{requests}{{path="/v1/completions",status="200"}}'] == 1
    assert grown[f'{requests}{{path="/v1/completions",status="400"}}'] == 1
    assert grown[f'{requests}{{path="/v1/models/{NAME}",status="200"}}'] == 1
    assert grown[f'{requests}{{path="other",status="404"}}'] == 4
    assert after["tinyllm_slots"] == 4
    assert after["tinyllm_busy_slots"] == after["tinyllm_waiting"] == 0
    assert not any("made/up" in name for name in after)


def test_hundreds_of_malformed_requests_get_no_5xx(service: Service, url: str) -> None:
    found = campaign(url, requests=400, seed=1)
    assert {"200", "400", "404", "405", "415"} <= {*found["statuses"]}
    wait_for(lambda: busy(service) == 0)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert client.completions.create(model=NAME, prompt="A", max_tokens=2).usage
