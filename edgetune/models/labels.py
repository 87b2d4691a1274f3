"""Match the classes of a checkpoint's trained head with those of the data by name, or refuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgetune.core.errors import EdgetuneError, truncate_list


def match_classes(source: str, own: Sequence[str], classes: Sequence[str], keep: bool) -> dict[str, str]:
    """The name of each output of a trained head, in its order, and the data's class that it is for.

    By name, if the two sets are the same up to case and surrounding spaces. Outputs called `LABEL_0`, `LABEL_1`,
    transformers' default names, are the data's classes `0`, `1`; other classes are taken in the data's order only with
    `keep`, since nothing determines their order. Raises `EdgetuneError` otherwise.

    >>> match_classes("hf:x", ["neutral", "bad", "good"], ["Bad", "Good", "Neutral"], keep=False)
    {'neutral': 'Neutral', 'bad': 'Bad', 'good': 'Good'}
    """
    new_head = f"write model: {{source: {source}, head: new}} in the recipe, to train a new head for them"
    if len(own) != len(classes):
        raise EdgetuneError(
            f"the head of {source} has {len(own)} classes ({truncate_list(own)}), the data {len(classes)}",
            got=truncate_list(classes),
            action=f"use data with the classes of the checkpoint, or {new_head}",
        )
    if all(name == f"LABEL_{index}" for index, name in enumerate(own)):
        return _match_by_number(source, own, classes, keep, new_head)
    by_name = {_normalize(name): name for name in classes}
    if len(by_name) == len(classes) and {_normalize(name) for name in own} == set(by_name):
        return {name: by_name[_normalize(name)] for name in own}
    raise EdgetuneError(
        f"the head of {source} has other classes than the data: {truncate_list(own)}",
        got=truncate_list(classes),
        action=f"rename the classes of the data to those of the checkpoint, or {new_head}",
    )


def _match_by_number(
    source: str, own: Sequence[str], classes: Sequence[str], keep: bool, new_head: str
) -> dict[str, str]:
    numbers = [str(index) for index in range(len(own))]
    if set(classes) == set(numbers):
        return {number: number for number in numbers}
    if set(classes) == set(own):
        return {name: name for name in own}
    if keep:
        return {name: name for name in classes}
    raise EdgetuneError(
        f"the head of {source} does not name its classes: they are called {truncate_list(own, 2)}",
        got=truncate_list(classes),
        action=f"name them in its config (id2label), set head: keep if their order is {truncate_list(classes)}, "
        f"or {new_head}",
    )


def _normalize(name: str) -> str:
    return name.strip().casefold()


def output_names(config: Any) -> tuple[str, ...]:
    """The names of a transformers classifier's outputs, in order."""
    named: Mapping[Any, str] = config.id2label
    return tuple(str(name) for _, name in sorted(named.items(), key=lambda item: int(item[0])))
