"""The server under load: streaming clients on loopback, every answer compared with the same one alone.

    python -m benchmarks.serve_load [--config tinystories_7m] [--clients 1 16 64] [--seconds 120]

Each client sends one request after the other, for `--seconds` with the most clients and a quarter of
that with fewer and for the other server; ours has compiled all its programs before. Beside it stands
transformers' own generate, one request after the other, behind the same framework (Starlette and
uvicorn). Weights are random unless `--checkpoint` names a run. Server and clients share the machine.
The first token is the first event of a stream that has a choice.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import ratio, report
from tinyllm_jax.config import ModelConfig, TokenizerConfig, load_config

COLUMNS = (
    *("what", "clients", "answers", "lost", "other text", "first token, median ms"),
    *("first token, p95 ms", "tokens/s", "x one client", "server's processor ms/token"),
)
NAMES = {"ours": "tinyllm_jax.serve", "transformers": "transformers generate behind Starlette"}
# Different requests; each client goes through them from another place.
REQUESTS = 48


@dataclasses.dataclass
class Told:
    """One answer as a client got it."""

    request: int
    text: str
    tokens: int
    first_seconds: float
    whole: bool


def requests(*, tokens: int, lines: list[str]) -> list[bytes]:
    """Write the bodies: prompts of different length, each with its own seed."""
    bodies = []
    for number in range(REQUESTS):
        prompt = " ".join(lines[number % len(lines)].split()[: 2 + number % 30])
        asked = {"prompt": prompt, "seed": number, "temperature": 1.0, "max_tokens": tokens}
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        bodies.append(json.dumps(asked).encode())
    return bodies


async def ask(port: int, number: int, body: bytes) -> Told:
    """Send one request and read its stream; raises where it breaks off."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    told, done = Told(number, "", 0, 0.0, False), False
    try:
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                done = True
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                told.tokens = event["usage"]["completion_tokens"]
            for choice in event.get("choices", ()):
                told.first_seconds = told.first_seconds or time.perf_counter() - start
                told.text += choice["text"]
                told.whole = bool(choice["finish_reason"])
    finally:
        writer.close()
    told.whole = told.whole and done
    return told


async def load(
    port: int, bodies: list[bytes], *, clients: int, seconds: float
) -> tuple[list[Told], float]:
    """Let clients ask for so long, and wait for the last answers; gives them and the time."""
    found: list[Told] = []
    start = time.perf_counter()

    async def client(place: int) -> None:
        number = place * 7
        while time.perf_counter() - start < seconds:
            number += 1
            try:
                found.append(await ask(port, number % REQUESTS, bodies[number % REQUESTS]))
            except (OSError, ValueError):
                found.append(Told(number % REQUESTS, "", 0, 0.0, False))

    await asyncio.gather(*(client(place) for place in range(clients)))
    return found, time.perf_counter() - start


async def alone(port: int, bodies: list[bytes]) -> list[str]:
    """Give the text of each request when nothing else is asked."""
    return [(await ask(port, number, body)).text for number, body in enumerate(bodies)]


# The servers ----------------------------------------------------------------------------------------


def made_up_lines() -> list[str]:
    """Make text of enough different words for any vocabulary."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    return [" ".join(draw.choices(words, k=40)) for _ in range(4000)]


def our_server(arguments: argparse.Namespace, shape: ModelConfig) -> None:
    """Be `serve`, with random weights where no checkpoint is named."""
    from tinyllm_jax import serve
    from tinyllm_jax.data.tokenizer import train_tokenizer
    from tinyllm_jax.inference import language_model
    from tinyllm_jax.model.weights import initial_weights

    if not arguments.checkpoint:
        tokenizer = train_tokenizer(
            iter(made_up_lines()), config=TokenizerConfig(), vocab_size=shape.vocab_size
        )
        # Not before the command asks for it, which first says how many devices a CPU is.
        language_model.load = lambda _: language_model.LanguageModel(
            shape, initial_weights(shape, seed=0), tokenizer
        )
    words = ["--checkpoint", arguments.checkpoint or "random", "--port", "0"]
    words += ["--engine.slots", str(arguments.slots), "--engine.replicas", str(arguments.replicas)]
    serve.main(words)


def transformers_server(shape: ModelConfig, *, tokens: int) -> None:
    """Be Starlette in front of transformers' generate, one request at a time."""
    import torch
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route
    from transformers import LlamaConfig, LlamaForCausalLM

    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads max_position_embeddings tie_word_embeddings"
    made = LlamaConfig(**{name: getattr(shape, name) for name in names.split()})
    model: Any = LlamaForCausalLM(made).eval()
    one_at_a_time = threading.Lock()

    class Streamer:
        """Passes each new token on; the first call brings the prompt."""

        def __init__(self, put: Any):
            self._put, self._begun = put, False

        def put(self, ids: Any) -> None:
            if self._begun:
                self._put(f" {int(ids)}")
            self._begun = True

        def end(self) -> None:
            self._put(None)

    def generate(asked: dict[str, Any], put: Any) -> None:
        ids = torch.tensor([[1, *(hash(word) % 4000 for word in asked["prompt"].split())]])
        with one_at_a_time, torch.inference_mode():
            torch.manual_seed(asked["seed"])
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                streamer=Streamer(put),
                pad_token_id=0,
            )

    async def complete(request: Request) -> StreamingResponse:
        asked, loop = await request.json(), asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def put(text: str | None) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        async def events() -> AsyncIterator[str]:
            threading.Thread(target=generate, args=(asked, put)).start()
            made = 0
            while (text := await pieces.get()) is not None:
                made += 1
                choice = {"text": text, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            last = {"choices": [{"text": "", "finish_reason": "length"}]}
            counts = {"choices": [], "usage": {"completion_tokens": made}}
            yield "".join(f"data: {json.dumps(each)}\n\n" for each in (last, counts))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])
    config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
    listening = config.bind_socket()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
    uvicorn.Server(config).run([listening])


@contextlib.contextmanager
def started(who: str, arguments: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Start a server in a process of its own; gives its port and process id."""
    words = ["--worker", who, "--config", arguments.config, "--slots", str(arguments.slots)]
    words += ["--replicas", str(arguments.replicas)]
    words += ["--tokens", str(arguments.tokens), "--checkpoint", arguments.checkpoint]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.serve_load", *words], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    port = 0
    for line in process.stderr:
        print(line, end="", file=sys.stderr, flush=True)
        if "/v1" in line:
            port = int(line.split("/v1")[0].rpartition(":")[2])
            break
    rest = threading.Thread(target=process.stderr.read)  # so that it can go on talking
    rest.start()
    try:
        assert port, "the server has not started"
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()
        rest.join()


def wait_for_programs(port: int) -> None:
    """Wait until `serve` has compiled all that it will."""
    for _ in range(3000):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as metrics:
            if b"\ntinyllm_missing_programs 0.0\n" in metrics.read():
                return
        time.sleep(0.1)
    raise TimeoutError("programs are missing after 5 minutes")


def processor_seconds(pid: int) -> float:
    """Give the processor time that a process has used, all threads together; 0 where unknown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(who: str, arguments: argparse.Namespace, bodies: list[bytes]) -> list[dict[str, Any]]:
    """Make the rows of one server."""
    rows, first = [], None
    with started(who, arguments) as (port, pid):
        if who == "ours":
            wait_for_programs(port)
        asyncio.run(load(port, bodies, clients=2, seconds=3))
        texts = asyncio.run(alone(port, bodies)) if who == "ours" else None
        for clients in arguments.clients:
            most = clients == max(arguments.clients) and who == "ours"
            seconds = arguments.seconds if most else arguments.seconds / 4
            before = processor_seconds(pid)
            found, took = asyncio.run(load(port, bodies, clients=clients, seconds=seconds))
            whole = [each for each in found if each.whole]
            times = [each.first_seconds * 1000 for each in whole] or [0.0]
            tokens = sum(each.tokens for each in whole)
            speed = tokens / took
            used = processor_seconds(pid) - before
            first = first or speed
            rows.append(
                {
                    "what": NAMES[who],
                    "clients": clients,
                    "answers": len(found),
                    "lost": len(found) - len(whole),
                    "other text": sum(each.text != texts[each.request] for each in whole)
                    if texts
                    else None,
                    "first token, median ms": statistics.median(times),
                    "first token, p95 ms": float(np.percentile(times, 95)),
                    "tokens/s": speed,
                    "x one client": ratio(speed, first),
                    "server's processor ms/token": used * 1000 / tokens if tokens else None,
                }
            )
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    """Measure, or be one of the servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="tinystories_7m", help="preset or TOML file")
    parser.add_argument("--checkpoint", default="", help="run whose weights are served")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each answer")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=0, help="engines; 0 is one for each core")
    parser.add_argument("--servers", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--worker", choices=list(NAMES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = load_config(arguments.config, {}).model
    if arguments.worker == "ours":
        our_server(arguments, shape)
    elif arguments.worker == "transformers":
        transformers_server(shape, tokens=arguments.tokens)
    if arguments.worker:
        return
    bodies = requests(tokens=arguments.tokens, lines=made_up_lines())
    rows = [row for who in arguments.servers for row in measure(who, arguments, bodies)]
    settings = {key: str(value) for key, value in vars(arguments).items() if key != "worker"}
    report(
        "Serving",
        COLUMNS,
        rows,
        settings=settings,
        packages=("jax", "starlette", "uvicorn", "torch", "transformers"),
        json_path=arguments.json,
    )


if __name__ == "__main__":
    main()
