"""The OpenAPI description of the endpoints, from the same classes that check requests."""

from collections.abc import Mapping
from typing import Any

from tinyllm_jax.server.schemas import ChatRequest, CompletionRequest


def openapi(model_name: str, *, version: str) -> Mapping[str, Any]:
    """Describe the endpoints in OpenAPI 3.1."""
    reference = "#/components/schemas/{model}"
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    answer = {"description": "the answer", "content": {"application/json": {}}}
    wrong = {
        "description": "what is wrong",
        "content": {"application/json": {"schema": {"$ref": reference.format(model="Error")}}},
    }
    for path, kind in (
        ("/v1/chat/completions", ChatRequest),
        ("/v1/completions", CompletionRequest),
    ):
        schema = kind.model_json_schema(ref_template=reference)
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"] = {"enum": [model_name, None]}
        schemas[kind.__name__] = schema
        body = {"schema": {"$ref": reference.format(model=kind.__name__)}}
        streamed = {**answer["content"], "text/event-stream": {}}
        paths[path] = {
            "post": {
                "requestBody": {"required": True, "content": {"application/json": body}},
                "responses": {
                    "200": {**answer, "content": streamed},
                    **{str(status): wrong for status in (400, 401, 404, 413, 415, 429, 503)},
                },
            }
        }
    for path in ("/v1/models", "/health", "/metrics"):
        paths[path] = {"get": {"responses": {"200": {"description": "what is there"}}}}
    texts = {name: {"type": "string"} for name in ("message", "type")}
    words = {name: {"type": ["string", "null"]} for name in ("param", "code")}
    schemas["Error"] = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {**texts, **words},
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "tinyllm", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
