"""`/openapi.json`: requests and responses of the server in OpenAPI 3.1, for tools that generate or test clients."""

from __future__ import annotations

from typing import Any

from deepseek_jax import __version__
from deepseek_jax.chat.messages import ROLES
from deepseek_jax.serving.decode import ALTERNATIVES
from deepseek_jax.serving.openai.requests import IGNORED, LONGEST_STOP, MOST_STOPS, UNSUPPORTED

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
OPEN: Schema = {"type": "object"}  # with any fields
FLAG: Schema = {"type": "boolean", "default": False}


def _array(items: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": items, **limits}


def _object(*optional: str, closed: bool = False, **fields: Schema) -> Schema:
    """All fields except the `optional` ones are required; `closed`: there are no others."""
    schema = {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}
    return schema | ({"additionalProperties": False} if closed else {})


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _named(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
IDS = _array({"type": "integer", "minimum": 0}, minItems=1)
BOTH: dict[str, Schema] = {
    "model": TEXT | {"description": "The served model's name, or left out."},
    "max_tokens": {"type": "integer", "minimum": 0, "maximum": 10**9},
    "temperature": NUMBER | {"minimum": 0, "maximum": 2, "default": 1},
    "top_p": NUMBER | {"exclusiveMinimum": 0, "maximum": 1, "default": 1},
    "top_k": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1, "default": 0, "description": "0: no limit."},
    "n": {"type": "integer", "minimum": 1, "default": 1},
    "stream": FLAG,
    "stream_options": _object("include_usage", "include_obfuscation", closed=True, include_usage=_or_null(FLAG),
                              include_obfuscation={}),
    "stop": {"anyOf": [STOP, _array(STOP, maxItems=MOST_STOPS)]},
    "seed": {"type": "integer", "minimum": -2**63, "maximum": 2**64 - 1},
    "return_drafts": FLAG | {"description": "Whether to tell what became of each drafted token."},
}
COMPLETION: dict[str, Schema] = BOTH | {
    "prompt": {"anyOf": [TEXT, _array(TEXT, minItems=1), IDS, _array(IDS, minItems=1)]},
    "echo": FLAG,
    "best_of": {"type": "integer", "minimum": 1, "description": "Can only equal n."},
    "logprobs": {"type": "integer", "minimum": 0, "maximum": ALTERNATIVES},
}
SAID = {"anyOf": [TEXT, _array(_object(closed=True, type={"const": "text"}, text=TEXT))]}
MESSAGE = {"anyOf": [
    _object("name", closed=True, role={"enum": list(ROLES)}, name=TEXT, content=SAID),
    _object("name", "reasoning_content", closed=True, role={"const": "assistant"}, name=TEXT, content=SAID,
            reasoning_content=TEXT | {"description": "For models whose chat template knows it."})]}
CHAT: dict[str, Schema] = BOTH | {
    "messages": _array(MESSAGE, minItems=1),
    "max_completion_tokens": BOTH["max_tokens"] | {"minimum": 1},
    "logprobs": FLAG,
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": ALTERNATIVES},
    "chat_template_kwargs": OPEN | {"description": "Names of the model's chat template, such as enable_thinking."},
}
USAGE = _object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details=OPEN,
                completion_tokens_details=OPEN)
FINISH = _or_null({"enum": ["stop", "length", "error"]})
LOGPROBS = _or_null(OPEN)
DRAFTS = _array(_array({}))
EVENT = _object("event", data=TEXT | {"description": "A chunk as JSON, then [DONE]."}, event=TEXT)
MODEL = _object(id=TEXT, object={"const": "model"}, created=WHOLE, owned_by=TEXT, max_model_len=WHOLE)


def _request(fields: dict[str, Schema], required: str) -> Schema:
    """A body of these fields: null means the same as leaving one out; unsupported fields allow only values without
    effect."""
    nothing = {name: {"enum": [*values, None]} for name, values in UNSUPPORTED.items()}
    known = {name: schema if name == required else _or_null(schema) for name, schema in fields.items()}
    others = {name: {} for name in IGNORED} | nothing
    return _object(*known.keys() - {required}, *others, closed=True, **known, **others)


def _answer(kind: str, **choice: Schema) -> Schema:
    return _object(id=TEXT, object={"const": kind}, created=WHOLE, model=TEXT, usage=USAGE, choices=_array(_object(
        "drafts", closed=False, index=WHOLE, finish_reason=FINISH, logprobs=LOGPROBS, drafts=DRAFTS, **choice)))


SCHEMAS: dict[str, Schema] = {
    "CompletionRequest": _request(COMPLETION, "prompt"),
    "ChatRequest": _request(CHAT, "messages"),
    "Completion": _answer("text_completion", text=TEXT),
    "ChatCompletion": _answer("chat.completion", message=_object(
        "reasoning_content", role={"const": "assistant"}, content=TEXT, reasoning_content=TEXT,
        refusal={"type": "null"})),
    "Model": MODEL,
    "Models": _object(object={"const": "list"}, data=_array(MODEL)),
    "Health": _object("progress", "seconds", status={"enum": ["ok", "starting", "failed", "stalled"]}, progress=TEXT,
                      seconds=WHOLE),
    "Loads": _object(loads=_array(_array(WHOLE))),
    "Error": _object(error=_object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=TEXT)),
}
REFUSALS = {400: "a field that cannot be served", 401: "no or a wrong key", 403: "a foreign host or origin",
            404: "another model", 413: "a body that is too long", 415: "not application/json",
            429: "too many requests", 500: "a failure of the server", 503: "not there yet, or ending"}


def _content(kind: str, schema: Schema) -> Schema:
    return {"content": {kind: {"schema": schema}}}


def _operation(summary: str, result: Schema, refusals: tuple[int, ...] = (401, 403, 503), **more: Any) -> Schema:
    refused = {str(status): {"description": REFUSALS[status]} | _content("application/json", _named("Error"))
               for status in refusals}
    return {"summary": summary, "responses": {"200": {"description": "as asked for"} | result} | refused} | more


def _json(name: str) -> Schema:
    return _content("application/json", _named(name))


def _post(summary: str, body: str, answer: str) -> Schema:
    streamed = {"content": _json(answer)["content"] | _content("text/event-stream", EVENT)["content"]}
    return {"post": _operation(summary, streamed, tuple(REFUSALS), requestBody={"required": True} | _json(body))}


def openapi(model: str, with_key: bool) -> Schema:
    """The description. with_key: whether clients must send a key."""
    health = _operation("Whether the engine runs", _json("Health"), (403,))
    health["responses"]["503"] = {"description": "it does not, or not yet"} | _json("Health")
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT | {"minLength": 1}}
    key = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}} if with_key else {}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"deepseek-jax: {model}", "version": __version__,
                 "description": "Completions and chats as clients of the OpenAI API know them."},
        **({"security": [{"key": []}]} if with_key else {}),
        "paths": {
            "/health": {"get": health | {"security": []}},
            "/metrics": {"get": _operation("Prometheus metrics", _content("text/plain", TEXT), (401, 403))},
            "/loads": {"get": _operation("Tokens that chose each expert of each MoE layer", _json("Loads"))},
            "/v1/models": {"get": _operation("The model, in a list", _json("Models"))},
            "/v1/models/{name}": {"get": _operation("The model", _json("Model"), (401, 403, 404, 503)) |
                                  {"parameters": [name]}},
            "/v1/completions": _post("Continues texts or lists of token ids", "CompletionRequest", "Completion"),
            "/v1/chat/completions": _post("Answers a chat", "ChatRequest", "ChatCompletion")},
        "components": {"schemas": SCHEMAS, **key},
    }
