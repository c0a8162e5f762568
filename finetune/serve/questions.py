"""Reads requests to /v1/chat/completions and /v1/completions: the question, and which schema it is about.

A key that would change the answer and cannot be heeded is refused, and so is an unknown one, which may be misspelt. The keys of
sampling have no effect, because the answer is the most likely SQL, as in `finetune evaluate`.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from finetune.data.fences import blocks_in
from finetune.errors import shown
from finetune.runtime.files import parse_json
from finetune.serve.api_errors import ApiError, invalid

MAX_BODY_BYTES = 1 << 20
MAX_QUESTION_CHARACTERS = 32_000
OURS = ("schema", "database", "evidence", "dialect")
_NO_EFFECT = frozenset(
    [
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "stop",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "user",
        "metadata",
        "store",
        "service_tier",
        "reasoning_effort",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "verbosity",
    ]
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
    "web_search_options": (), "moderation": (),
}  # fmt: skip
"""Keys of OpenAI's API that are not supported -> the values that ask for nothing."""
_READ = frozenset(("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens"))
_KNOWN = frozenset((*OURS, *_NO_EFFECT, *_NEUTRAL, *_READ))
_DDL = re.compile(r"\bCREATE\b(?:\s+\w+){0,6}?\s+(?:TABLE|VIEW)\b", re.IGNORECASE)
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Question:
    """schema: DDL text that the client gives; database: the name of one that the server was started with. At most one is set.
    max_tokens: None: as many as the config of the model says. usage: whether a stream ends with the usage counts."""

    text: str
    schema: str | None
    database: str | None
    evidence: str | None
    dialect: str | None
    max_tokens: int | None
    stream: bool
    usage: bool


def read_question(body: bytes, *, chat: bool, models: tuple[str, ...]) -> Question:
    """chat: whether the question is in `messages`, else in `prompt`. models: the names that `model` may have. Raises ApiError."""
    values = _object(body)
    _check_keys(values)
    _check_model(values, models)
    ddl = None
    if chat:
        text, ddl = _messages(values.get("messages"))
    else:
        text = _prompt(values.get("prompt"))
    if not text.strip():
        raise invalid("the question is empty", param="messages" if chat else "prompt", code="empty_question")
    if len(text) > MAX_QUESTION_CHARACTERS:
        raise invalid(
            f"the question has {len(text):,} characters; {MAX_QUESTION_CHARACTERS:,} is the limit",
            param="messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    schema, database = _text(values, "schema"), _text(values, "database")
    if schema is not None and database is not None:
        raise invalid("`schema` and `database` are both given; give one of them", param="schema")
    if schema is None and database is None:
        schema = ddl
    options = values.get("stream_options") or {}
    if not isinstance(options, dict):
        raise invalid("stream_options: expected an object", param="stream_options")
    return Question(
        text=text,
        schema=schema,
        database=database,
        evidence=_text(values, "evidence"),
        dialect=_text(values, "dialect"),
        max_tokens=_max_tokens(values),
        stream=_flag(values, "stream"),
        usage=_flag(options, "include_usage"),
    )


def _object(body: bytes) -> dict[str, Any]:
    try:
        values = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, f"the body: expected a JSON object, found {shown(values)}", code="invalid_json")
    return values


def _check_keys(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in _KNOWN:
            near = difflib.get_close_matches(key, _KNOWN, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise invalid(f"unknown key {shown(key)}{meant}", param=key[:80], code="unknown_parameter")
        if key in _NEUTRAL and value is not None and value not in _NEUTRAL[key]:
            raise invalid(f"{key}: {shown(value)} is not supported", param=key, code="unsupported_parameter")


def _check_model(values: dict[str, Any], models: tuple[str, ...]) -> None:
    model = _text(values, "model")
    if model is None:
        raise invalid(f"model: missing; this server has {', '.join(models)}", param="model", code="missing_parameter")
    if model not in models:
        raise ApiError(
            404, f"no model is called {shown(model)} here; this server has {', '.join(models)}",
            code="model_not_found", param="model",
        )  # fmt: skip


def _messages(value: Any) -> tuple[str, str | None]:
    """The question, which is the last message of the user, and the DDL in the system's messages, if there is any."""
    if not isinstance(value, list) or not value:
        raise invalid("messages: expected a list with at least one message", param="messages")
    question: str | None = None
    ddl: list[str] = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise invalid(f"{where}: expected an object with a role ({', '.join(_ROLES)})", param=where)
        if message["role"] == "user":
            question = _content(message.get("content"), where)
        elif message["role"] in ("system", "developer"):
            ddl += _ddl_in(_content(message.get("content"), where))
    if question is None:
        raise invalid(
            "messages: none is from the user, so there is no question", param="messages", code="empty_question"
        )
    return question, "\n".join(ddl) or None


def _content(value: Any, where: str) -> str:
    if isinstance(value, list):
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise invalid(f"{where}.content: only parts of type text are supported", param=where)
        value = "\n".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise invalid(f"{where}.content: expected a text, found {shown(value)}", param=where)
    return _checked(value, f"{where}.content")


def _ddl_in(text: str) -> list[str]:
    """The schema in a system message: what its code fences hold, if they hold DDL, else all of it."""
    if not _DDL.search(text):
        return []
    fenced = [block.text.strip() for block in blocks_in(text) if block.closed and _DDL.search(block.text)]
    return fenced or [text]


def _prompt(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise invalid(f"prompt: expected one question as text, found {shown(value)}", param="prompt")
    return _checked(value, "prompt")


def _text(values: dict[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise invalid(f"{key}: expected a text, found {shown(value)}", param=key)
    return _checked(value, key)


def _checked(text: str, where: str) -> str:
    """Raises ApiError for half a character, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(f"{where}: holds half of a surrogate pair, which is no text", param=where) from None
    return text


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{key}: expected true or false, found {shown(value)}", param=key)
    return bool(value)


def _max_tokens(values: dict[str, Any]) -> int | None:
    for key in ("max_completion_tokens", "max_tokens"):
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(f"{key}: expected a whole number of at least 1, found {shown(value)}", param=key)
        return value
    return None
