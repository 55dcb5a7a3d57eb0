"""Serve a trained model over HTTP: `python -m tinyllm_jax.serve --checkpoint DIR --port 8000`.

The endpoints are OpenAI's (/v1/chat/completions, /v1/completions, /v1/models), with /health,
/metrics and a page to try it on. docs/serving.md says more.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyllm_jax.cli import run, say
from tinyllm_jax.config import SamplingConfig, ServeConfig
from tinyllm_jax.errors import InputError
from tinyllm_jax.settings import Parser, add_checkpoint_flag, add_flags, parse_checkpoint_flags

if TYPE_CHECKING:
    from tinyllm_jax.inference.service import Service
    from tinyllm_jax.server.app import Api

PACKAGES = ("starlette", "uvicorn", "httptools", "pydantic", "prometheus_client")


def main(words: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; 0 when every answer in work was finished."""
    checkpoint, settings = read_command(words)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"The server needs {', '.join(missing)}. Type: pip install 'tinyllm[serve]'."
        )
    # Imported here so that --help and bad flags need not wait for JAX.
    from tinyllm_jax.server.app import Api
    from tinyllm_jax.server.gate import KEY_VARIABLE, read_keys
    from tinyllm_jax.server.run import make_server, open_socket

    keys = read_keys(settings.server.api_key_file, os.environ.get(KEY_VARIABLE, ""))
    with open_socket(settings.server.host, settings.server.port) as listening:
        service = start_service(checkpoint, settings)
        api = Api(
            service,
            model_name=settings.server.model_name or run_name(Path(checkpoint)),
            sampling=settings.sampling,
            # The address itself, which has many spellings.
            settings=dataclasses.replace(settings.server, host=listening.getsockname()[0]),
            keys=keys,
        )
        server = make_server(api, on_start=lambda: greet(api, listening.getsockname()))
        try:
            server.run([listening])
        finally:
            service.stop()
    return 0 if server.was_drained else 1


def start_service(checkpoint: str, settings: ServeConfig) -> "Service":
    """Load a model and compile what answers with it."""
    from tinyllm_jax.compilation_cache import enable_compilation_cache
    from tinyllm_jax.inference.language_model import load
    from tinyllm_jax.inference.replicas import make_cpu_devices
    from tinyllm_jax.inference.service import Service

    make_cpu_devices(settings.engine)
    enable_compilation_cache()
    service = Service(load(checkpoint), settings.engine)
    service.start()
    return service


def run_name(checkpoint: Path) -> str:
    """Name a run by its folder, whichever of its checkpoints was named."""
    path = checkpoint.resolve()
    if path.name == "best":
        return path.parent.name
    return path.parents[1].name if path.name.isdigit() and len(path.parents) > 1 else path.name


def greet(api: "Api", address: tuple[Any, ...]) -> None:
    """Say where the server is, and what to type to try it."""
    from tinyllm_jax.server.gate import KEY_VARIABLE, is_loopback

    host, port = address[:2]
    if not api.keys and not is_loopback(host):
        say(
            f"Everybody who reaches {host} can use it. Set {KEY_VARIABLE} to let in only who knows it."
        )
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    key = f" -H 'Authorization: Bearer '${KEY_VARIABLE}" if api.keys else ""
    ask = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Tell me a story."}]')
        if api.service.can_chat
        else ("completions", f'"prompt": "{SamplingConfig.prompt}"')
    )
    say(f"{url}/v1: {api.model_name}, {api.service.stats().slots} answers at the same time.")
    say(f"Page: {url}/")
    say(f"Try: curl {url}/v1/{ask[0]} -H 'Content-Type: application/json'{key} -d '{{{ask[1]}}}'")


def read_command(words: Sequence[str] | None) -> tuple[str, ServeConfig]:
    """Read the command line as (checkpoint, checked settings)."""
    parser = Parser(
        prog="python -m tinyllm_jax.serve",
        description="Serve a trained model over HTTP, as OpenAI's API. Settings of sampling are taken "
        "where a request says nothing.",
    )
    add_checkpoint_flag(parser)
    add_flags(parser, ServeConfig)
    arguments, config = parse_checkpoint_flags(parser, ServeConfig, words)
    return arguments.checkpoint, config


if __name__ == "__main__":
    run(main)
