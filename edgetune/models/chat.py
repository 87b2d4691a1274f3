"""Conversations as tokens, formatted by the model's chat template, with the answers marked for the loss."""

from __future__ import annotations

from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.data.chat import ANSWERING, Conversation
from edgetune.data.dataset import BadRows, Dataset, data_error
from edgetune.data.rows import IGNORED_LABEL, Encode, Rows


def chat_tokens(tokenizer: Any, conversation: Conversation) -> tuple[list[int], list[int]]:
    """Token ids of a conversation, and their labels: -100 outside of the answers.

    An answer begins after the template's generation prompt, and ends with the special token that closes its turn.
    Raises
    `ValueError` if the template refuses the messages, or changes an answer.
    """
    text, spans = _render_with_spans(tokenizer, conversation)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoding["input_ids"])
    if not conversation.answers_only:
        return ids, list(ids)
    offsets, special = encoding["offset_mapping"], set(tokenizer.all_special_ids)
    labels = [IGNORED_LABEL] * len(ids)
    for start, end in spans:
        inside = [n for n, (begins, ends) in enumerate(offsets) if start <= begins < end and ends > begins]
        closing = inside[-1] + 1 if inside else len(ids)
        while closing < len(ids) and ids[closing] not in special and not text[slice(*offsets[closing])].strip():
            closing += 1
        if closing < len(ids) and ids[closing] in special:
            inside += range(inside[-1] + 1, closing + 1)
        for n in inside:
            labels[n] = ids[n]
    return ids, labels


def _render_with_spans(tokenizer: Any, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the start and end of each answer in it."""
    messages = conversation.plain
    text = _render(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    if not conversation.answers_only:
        return text, spans
    for index, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != ANSWERING or not content:
            continue
        before = _render(tokenizer, messages[:index], prompt=True)
        begins = text.find(content, len(before)) if text.startswith(before) else -1
        if begins < 0:
            raise ValueError(f"the chat template changes message {index + 1}")
        spans.append((len(before), begins + len(content)))
    return text, spans


def _render(tokenizer: Any, messages: list[dict[str, str]], prompt: bool = False) -> str:
    from jinja2.exceptions import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def check_chat(name: str, tokenizer: Any) -> None:
    """Raise unless the tokenizer has a chat template and maps its tokens to characters."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise EdgetuneError(
            f"{name} has no chat template, so it cannot take conversations",
            action="choose a model trained for conversations, or data.text with ready-made texts",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise EdgetuneError(
            f"the tokenizer of {name} does not map tokens to characters, so answers cannot be marked",
            got=type(tokenizer).__name__,
            action="load a fast tokenizer, or choose another model",
        )


def drop_truncated_answers(dataset: Dataset, encode: Encode, name: str, max_bad_rows_pct: float) -> Dataset:
    """The data without conversations whose answers all begin after `max_length`, so that nothing is left to learn.

    Other data are returned unchanged. Raises `EdgetuneError` for a model that does not take conversations, and if such
    rows exceed `max_bad_rows_pct`.
    """
    if not any(isinstance(row, Conversation) for rows in dataset.parts for row in rows.inputs[:1]):
        return dataset
    tokenizer, longest = getattr(encode, "tokenizer", None), getattr(encode, "max_length", 0)
    if tokenizer is None:
        raise data_error(
            f"{name} has its own input function, which does not take conversations",
            action="return a transformers tokenizer with the module",
        )
    check_chat(name, tokenizer)
    bad, needed = BadRows(max_bad_rows_pct), 0
    kept: dict[str, Rows] = {}
    for part, rows in dataset.parts._asdict().items():
        indices = []
        for index, row in enumerate(rows.inputs):
            try:
                _, labels = chat_tokens(tokenizer, row)
            except ValueError as error:
                bad.add(f"{part} conversation {index + 1}", str(error))
                continue
            first = next((n for n, label in enumerate(labels) if n and label != IGNORED_LABEL), len(labels))
            if first < longest:
                indices.append(index)
                continue
            needed = max(needed, first + 1)
            bad.add(f"{part} conversation {index + 1}", f"its first answer begins at token {first + 1} of {longest}")
        kept[part] = rows if len(indices) == len(rows) else rows.subset(indices)
    try:
        notes = bad.notes(sum(map(len, dataset.parts)), dataset.name, "have nothing to learn")
    except EdgetuneError as error:
        if needed:
            error.action = f"raise model.max_length (at least {needed} for all), or data.max_bad_rows_pct"
        raise
    for part, rows in kept.items():
        if len(getattr(dataset, part)) and not len(rows):
            raise data_error(f"{dataset.name}: no {part} conversation is left", action="raise model.max_length")
    return dataset.with_parts(kept, notes)
