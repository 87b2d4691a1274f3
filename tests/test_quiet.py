"""What libraries say on their own stays off the terminal; a hub that does not answer is asked once."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgetune.cli.progress import show_progress
from edgetune.core.quiet import silence_command, silence_libraries

pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of texts as transformers saves one, and rows for it."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("quiet")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    with silence_libraries():
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "tiny")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = BertConfig(vocab_size=len(WORDS), id2label={0: "no", 1: "yes"}, **sizes)
        BertForSequenceClassification(config).save_pretrained(folder / "tiny")
    rows = [f"{'good' if n % 2 else 'bad'} film {n},{'yes' if n % 2 else 'no'}" for n in range(100)]
    (folder / "rows.csv").write_text("\n".join(["text,label", *rows]))
    return folder


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_a_model_of_the_hub_loads_without_a_word(folder: Path) -> None:
    code = "from edgetune.run.exporting import load_exportable as load; "
    code += "print(load('hf:tiny', 'csv:rows.csv').model.training)"
    done = run(folder, "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


@pytest.fixture
def hub() -> Iterator[tuple[str, list[int]]]:
    """A hub that closes every connection before it answers; its address, and a list that grows with each."""
    asked: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def close_all() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # the test is over
                    return
                asked.append(1)
                connection.close()

        threading.Thread(target=close_all, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked


def test_a_hub_that_does_not_answer_is_asked_once(folder: Path, hub: tuple[str, list[int]]) -> None:
    address, asked = hub
    given = ["-m", "edgetune", "export", "hf:nobody/nothing", "--data", "csv:rows.csv"]
    done = run(folder, *given, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", NO_PROXY="*", HF_HOME=str(folder / "cache"))
    assert (done.returncode, done.stdout) == (2, "")
    first, second = done.stderr.splitlines()
    assert first.startswith(
        "edgetune: the model hf:nobody/nothing could not be loaded: it is not on this disk, "
        "and the Hugging Face hub does not respond ("
    )
    assert second == "  next: check the id and the network, or give the path of a local folder"
    assert len(asked) == 1


def test_a_command_keeps_what_the_users_own_code_warns_of() -> None:
    def warn(module: str) -> None:
        warnings.warn_explicit("look", UserWarning, f"{module}.py", 1, module=module)

    with warnings.catch_warnings(record=True) as caught, silence_command():
        warnings.simplefilter("default")  # as Python begins
        with silence_command():
            for module in ("torch.utils._pytree", "torchao", "transformers.models.bert", "my_model", "torchy"):
                warn(module)
            assert not logging.getLogger("torch").isEnabledFor(logging.WARNING)
            assert logging.getLogger("torch").isEnabledFor(logging.ERROR)
    assert {warning.filename for warning in caught} == {"my_model.py", "torchy.py"}
    assert logging.getLogger("torch").isEnabledFor(logging.WARNING)


def test_quiet_puts_bars_back() -> None:
    from transformers.utils import logging as bars

    level = bars.get_verbosity()
    with silence_libraries():
        assert not bars.is_progress_bar_enabled()
    assert (bars.is_progress_bar_enabled(), bars.get_verbosity()) == (True, level)


def test_progress_without_a_terminal_takes_few_lines(capfd: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        for done in range(8):
            progress("profile", done, 7, f"device {done}")
        for done in range(1, 41):
            progress("train", done, 40, f"loss {done}")
        progress("export", 0, 1, "xnnpack")
        progress("export", 1, 1, "")
    assert capfd.readouterr().err.splitlines() == [
        "profile 0/7 device 0", "profile 7/7 device 7", "train 1/40 loss 1", "train 10/40 loss 10",
        "train 20/40 loss 20", "train 30/40 loss 30", "train 40/40 loss 40", "export",
    ]  # fmt: skip
