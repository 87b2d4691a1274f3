"""Something that may crash, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 240  # on a machine that does other things as well


def ask_fork(function: Callable[[], Any], seconds: int = SECONDS) -> Any:
    """What the function returns in a forked process; in words how that ended, where it returned nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child starts none
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_send, args=(sender, function))
        child.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(seconds) else f"no answer in {seconds} s"
    except EOFError:
        child.join()
        return f"the process ended with code {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _send(sender: Any, function: Callable[[], Any]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for stream in (1, 2):  # libraries tell the terminal about the processor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    try:
        sender.send(function())
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        sender.send(f"raised {type(error).__name__} in {place.filename}:{place.lineno}: {error}")
    sys.stdout.flush()
