"""Conversations: messages of a user and an assistant, as chat tables contain them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANSWERING = "assistant"
# Names that other tools give to the fields of a message, and to the roles (ShareGPT's among them).
_ROLE_FIELDS, _CONTENT_FIELDS = ("role", "from"), ("content", "value")
_ROLES = {
    "system": "system", "user": "user", "human": "user", ANSWERING: ANSWERING, "gpt": ANSWERING, "bot": ANSWERING,
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each a role ("system", "user" or "assistant") and a text; at least one is an answer.

    `answers_only`: only the answers count in the loss, not every token.
    """

    messages: tuple[tuple[str, str], ...]
    answers_only: bool = True

    @property
    def plain(self) -> list[dict[str, str]]:
        """The messages in the form of chat templates."""
        return [{"role": role, "content": content} for role, content in self.messages]

    @property
    def key(self) -> str:
        """Everything before the first answer: conversations with the same key stay in one part of a split."""
        opening: list[str] = []
        for role, content in self.messages:
            if role == ANSWERING:
                break
            opening += content.split()
        return " ".join(opening).lower()


def read_messages(value: Any, answers_only: bool = True) -> Conversation:
    """The conversation in one cell of a table: a list of `{role, content}`, or the same as JSON text.

    ShareGPT's `{from, value}` and its role names work too, and a mapping of lists, in which some libraries return a
    list
    of mappings. Raises `ValueError` with the reason for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError("the messages are text that is not valid JSON") from error
    if isinstance(value, Mapping) and all(isinstance(each, Sequence) for each in value.values()):
        value = [dict(zip(value, each, strict=False)) for each in zip(*value.values(), strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"the messages are {type(value).__name__}, not a list of {{role, content}}")
    messages = [_message(number, each) for number, each in enumerate(value, start=1)]
    if not any(role == ANSWERING and content.strip() for role, content in messages):
        raise ValueError("there is no message of the assistant")
    return Conversation(tuple(messages), answers_only)


def _message(number: int, given: Any) -> tuple[str, str]:
    if not isinstance(given, Mapping):
        raise ValueError(f"message {number} is {type(given).__name__}, not {{role, content}}")
    role = next((given[name] for name in _ROLE_FIELDS if name in given), None)
    content = next((given[name] for name in _CONTENT_FIELDS if name in given), None)
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(f"message {number} has the role {role!r}, which is not system, user or assistant")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has {type(content).__name__} as its content, not a string")
    return _ROLES[role], content


def split_key(row: str | tuple[str, ...] | Conversation) -> str:
    """Equal for rows that must stay in one part of a split: copies of a text, conversations with the same start."""
    if isinstance(row, Conversation):
        return row.key
    return " ".join(row if isinstance(row, tuple) else row.split()).lower()


def is_messages(value: Any) -> bool:
    """Whether a row looks like a list of messages."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Mapping) for each in value)
