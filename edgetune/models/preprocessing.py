"""Describe a tokenizer for a program's metadata: what an app must do with a text."""

from __future__ import annotations

import json
from typing import Any

from edgetune.core.errors import EdgetuneError
from edgetune.program.carried import TextPreprocessing, WordPiece
from edgetune.program.tokenizer import backend, without_truncation


def text_preprocessing(tokenizer: Any, max_length: int, *, ending: str = "") -> TextPreprocessing:
    """The preprocessing of a fast tokenizer of transformers, or of a `tokenizers.Tokenizer`.

    Raises `EdgetuneError` for a tokenizer that cannot be written as a `tokenizer.json`.
    """
    plain = without_truncation(tokenizer)
    padding = backend(tokenizer).padding or {}  # of a `tokenizers.Tokenizer`, which has no token named so
    pad_id = getattr(tokenizer, "pad_token_id", padding.get("pad_id"))
    if pad_id is None:
        raise EdgetuneError("the tokenizer has no padding token", action="set tokenizer.pad_token")
    return TextPreprocessing(
        max_length=max_length,
        cut=getattr(tokenizer, "truncation_side", "right"),
        pad_id=pad_id,
        ending=ending,
        wordpiece=_wordpiece(json.loads(plain.to_str())),
        tokenizer_json=plain.to_str(),
    )


def _wordpiece(tokenizer: dict[str, Any]) -> WordPiece | None:
    """The settings of a BERT tokenizer; `None` if any part of it is of another kind."""
    parts = {name: tokenizer.get(name) or {} for name in ("model", "normalizer", "pre_tokenizer", "post_processor")}
    kinds = [parts[name].get("type") for name in ("model", "normalizer", "pre_tokenizer")]
    around = _special_tokens(parts["post_processor"])
    if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"] or around is None:
        return None
    model, normalizer = parts["model"], parts["normalizer"]
    accents = normalizer["strip_accents"]
    return WordPiece(
        lowercase=normalizer["lowercase"],
        strip_accents=normalizer["lowercase"] if accents is None else accents,
        clean=normalizer["clean_text"],
        chinese=normalizer["handle_chinese_chars"],
        prefix=model["continuing_subword_prefix"],
        longest_word=model["max_input_chars_per_word"],
        unknown_id=model["vocab"][model["unk_token"]],
        before=around[0],
        after=around[1],
    )


def _special_tokens(post: dict[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    if post.get("type") == "BertProcessing":
        return (post["cls"][1],), (post["sep"][1],)
    if post.get("type") != "TemplateProcessing":
        return None
    sides: tuple[list[int], list[int]] = ([], [])
    after = False
    for piece in post["single"]:
        if "Sequence" in piece:
            after = True
        else:
            sides[after].extend(post["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return tuple(sides[0]), tuple(sides[1])
