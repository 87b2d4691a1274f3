"""Check once whether the Hugging Face hub responds, instead of a minute of retries for each file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def hub_problem() -> str:
    """Why the hub does not respond; empty if it does. One request without retries, through the proxy if one is set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of a class of whichever HTTP library the hub's client is built on
        return re.sub(r"\[Errno -?\d+\] ", "", str(error)).strip() or type(error).__name__
    return ""


@contextmanager
def check_hub(source: str, fetches: bool = True) -> Iterator[str]:
    """Yield why the hub does not respond, and keep libraries offline inside if it does not.

    Empty if it responds, or if no request is needed: `source` is a local path, or nothing is fetched.
    """
    silence = hub_problem() if fetches and not Path(source).expanduser().exists() else ""
    if not silence:
        yield ""
        return
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield silence
    finally:
        constants.HF_HUB_OFFLINE = before
