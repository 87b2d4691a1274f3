"""Conversations: read from tables of several shapes, written by chat templates, with the loss on the answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgetune.core.errors import EdgetuneError, Exit
from edgetune.core.quiet import silence_libraries
from edgetune.data.chat import Conversation, read_messages
from edgetune.data.dataset import Dataset, Split
from edgetune.data.own import own_splits
from edgetune.data.rows import IGNORED_LABEL, Rows
from edgetune.data.settings import DataSettings
from edgetune.data.tables import from_csv, from_jsonl, from_splits
from edgetune.models.chat import chat_tokens, drop_truncated_answers
from edgetune.models.text import TextEncoder
from edgetune.run.exportable import prompts_from_texts
from edgetune.tasks.causal_lm import CausalLM

with silence_libraries():
    import transformers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# an earlier answer loses what it thought, the last one gets an empty thought, as Qwen 3 does it
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# no word of a role, a space before the answer, and no system message
BRACKETS = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
UPPER = CHATML.replace("m.content | trim", "m.content | upper")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
TWICE = [("user", "Is 4 even?"), ("assistant", "Yes"), ("user", "Yes or no: is 5?"), ("assistant", "no  ")]


def tokenizer(template: str | None = CHATML) -> Any:
    """Bytes as tokens, so that every character counts; five special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={char: n for n, char in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens(SPECIAL)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "</s>"],
    )
    fast.chat_template = template
    return fast


def learned(template: str, *messages: tuple[str, str], **options: Any) -> str:
    """The part of a conversation that counts in the loss."""
    fast = tokenizer(template)
    ids, labels = chat_tokens(fast, Conversation(messages, **options))
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
    return str(fast.decode([label for label in labels if label != IGNORED_LABEL]))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (CHATML, "Yes<|im_end|>no<|im_end|>"),
        (THINKING, "Yes<|im_end|><think>\n\n</think>\n\nno  <|im_end|>"),
        (BRACKETS, " Yes</s> no  </s>"),
    ],
)
def test_answers_count_with_the_token_that_ends_them(template: str, text: str) -> None:
    assert learned(template, *TWICE) == text


def test_all_tokens_count_where_that_is_wished() -> None:
    fast = tokenizer()
    assert learned(CHATML, *TWICE, answers_only=False) == fast.apply_chat_template(
        Conversation(tuple(TWICE)).plain, tokenize=False
    )


def test_the_answer_is_not_looked_for_in_the_question() -> None:
    assert learned(CHATML, ("user", "Say no."), ("assistant", "no")) == "no<|im_end|>"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (UPPER, TWICE, "changes message 2"),
        (BRACKETS, [("system", "Be short."), *TWICE], "the chat template refuses it: no system message"),
    ],
)
def test_a_template_that_writes_something_else(template: str, messages: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        learned(template, *messages)


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"What is {number} and 1?"},
        {"role": "assistant", "content": f"It is {number + 1}."},
    ]


@pytest.mark.parametrize(
    "value",
    [
        chat(1),
        json.dumps(chat(1)),
        [{"from": "human", "value": "What is 1 and 1?"}, {"from": "gpt", "value": "It is 2."}],
        {"role": ["user", "assistant"], "content": ["What is 1 and 1?", "It is 2."]},
    ],
)
def test_conversations_in_the_shapes_that_tables_have(value: Any) -> None:
    assert read_messages(value).plain == chat(1)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Hello", "text that is not valid JSON"),
        ([], "list, not a list of"),
        (7, "int, not a list of"),
        (["Hello"], "message 1 is str"),
        ([{"role": "user", "content": "Hello"}], "there is no message of the assistant"),
        ([{"role": "assistant", "content": "  "}], "there is no message of the assistant"),
        ([{"role": "tool", "content": "2"}], "the role 'tool'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "message 1 has list as its content"),
        ([{"content": "Hello"}], "the role None"),
    ],
)
def test_what_is_no_conversation(value: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_messages(value)


def chats(folder: Path, rows: int = 60) -> Path:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat(n)}) for n in range(rows)), encoding="utf-8")
    return path


def read(path: Path, **changes: Any) -> Dataset:
    return from_jsonl(str(path), DataSettings.model_validate({"source": "x", "messages": "messages", **changes}))


def test_a_table_of_conversations(tmp_path: Path) -> None:
    data = read(chats(tmp_path))
    assert data.task == CausalLM()
    assert sum(len(rows) for rows in data.parts) == 60
    assert isinstance(data.train.inputs[0], Conversation)
    assert data.fingerprint == read(chats(tmp_path)).fingerprint != read(chats(tmp_path), loss_on="all").fingerprint


def test_a_question_and_its_answer_in_two_columns(tmp_path: Path) -> None:
    lines = ["question,answer", *(f"What is {n} and 1?,It is {n + 1}." for n in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    settings = DataSettings.model_validate({"source": "x", "messages": ["question", "answer"]})
    rows = from_csv(str(tmp_path / "rows.csv"), settings).train.inputs
    assert [content for _, content in rows[0].messages][1].startswith("It is")


def test_conversations_of_the_datasets_library_and_of_own_code(tmp_path: Path) -> None:
    from datasets import Dataset as Table

    settings = DataSettings.model_validate({"source": "x", "messages": "messages"})
    table = Table.from_list([{"messages": chat(n)} for n in range(40)])
    assert from_splits("chats", {"train": table}, settings).train.inputs[0].plain[0]["role"] == "user"
    code = "def rows():\n    return [[{'role': 'user', 'content': f'{n}?'}, {'role': 'assistant', 'content': 'No.'}]"
    (tmp_path / "own.py").write_text(f"{code} for n in range(40)]\n", encoding="utf-8")
    data = own_splits(f"{tmp_path / 'own.py'}:rows", DataSettings(source="x"))
    assert data.task == CausalLM()
    assert isinstance(data.test.inputs[0], Conversation)


def test_conversations_that_begin_alike_stay_together(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Number {n // 2}?"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(80)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = read(tmp_path / "rows.jsonl")
    parts = [{row.key for row in rows.inputs} for rows in data.parts]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 40
    assert "40 conversations start like another one" in data.notes[0]


def test_settings_that_exclude_each_other() -> None:
    for changes, reason in (
        ({"messages": "messages", "label": "label"}, "replaces text and label"),
        ({"loss_on": "all"}, "loss_on is for conversations"),
        ({"source": "tweets", "label_names": {"a": "b"}}, "tweets does not read label_names"),
        ({"source": "imagefolder:x", "messages": "messages"}, "imagefolder does not read"),
        ({"source": "hf:x", "test_file": "test.csv"}, "hf does not read test_file"),
    ):
        with pytest.raises(ValueError, match=reason):
            DataSettings.model_validate({"source": "x", **changes})
    DataSettings.model_validate({"source": "py:own.py:rows", "loss_on": "all"})


def test_a_batch_has_labels_on_the_answers_alone(tmp_path: Path) -> None:
    fast = tokenizer()
    data = read(chats(tmp_path))
    split = Split(data.task, data.train, TextEncoder(fast, 128))
    inputs, labels = split.batch([0, 1])
    assert isinstance(inputs, dict)
    assert set(inputs) == {"input_ids", "attention_mask"}
    for row in range(2):
        answer = data.train.inputs[row].messages[1][1]
        assert fast.decode(labels[row][labels[row] != IGNORED_LABEL]) == f"{answer}<|im_end|>"
    # the prompt that a program continues ends where the answer begins
    assert fast.decode(prompts_from_texts(split, 1)[0]).endswith("<|im_start|>assistant\n")
    (unigram,) = data.task.baselines(data.parts, split.encode)
    every = read(chats(tmp_path), loss_on="all")
    prompts_too = every.task.baselines(every.parts, split.encode)[0]
    assert unigram.value != prompts_too.value


def test_rows_whose_answers_are_cut_off_are_left_out_and_named(tmp_path: Path) -> None:
    fast = tokenizer()
    data = read(chats(tmp_path))
    # one character is one token here; a long question pushes its answer out
    long = Conversation((("user", "x" * 200), ("assistant", "No.")))
    more = data.with_parts({"train": Rows([*data.train.inputs, long])})
    with pytest.raises(EdgetuneError, match="have nothing to learn") as caught:
        drop_truncated_answers(more, TextEncoder(fast, 100), "m", max_bad_rows_pct=1)
    assert caught.value.exit_code == Exit.DATA
    needed = len(fast.apply_chat_template(long.plain[:1], add_generation_prompt=True, tokenize=False))
    assert "raise model.max_length" in str(caught.value.action)
    kept = drop_truncated_answers(more, TextEncoder(fast, 100), "m", max_bad_rows_pct=10)
    assert kept.train.inputs == data.train.inputs
    assert f"train conversation {len(more.train)}: its first answer begins at token" in kept.notes[-1]
    assert needed > 100
    assert (
        drop_truncated_answers(more, TextEncoder(fast, 512), "m", max_bad_rows_pct=0).train.inputs == more.train.inputs
    )


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    data = read(chats(tmp_path))
    with pytest.raises(EdgetuneError, match="has no chat template"):
        drop_truncated_answers(data, TextEncoder(tokenizer(None), 100), "m", 1)
    with pytest.raises(EdgetuneError, match="does not take conversations"):
        drop_truncated_answers(data, lambda inputs, pad_to=None: torch.zeros(1), "m", 1)
