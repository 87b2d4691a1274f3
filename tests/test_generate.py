"""`edgetune generate`: a program talks, token by token, and stops where it must."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgetune.cli import generate as cli_generate
from edgetune.cli.main import main
from edgetune.core.errors import EdgetuneError, Exit
from edgetune.program.artifact import Artifact
from edgetune.runtime.generating import generate
from support.decoders import CACHE, llama, tokenizer

PROMPT = "a small model talks"


def test_the_answer_is_the_models_and_comes_in_pieces(talking: Artifact) -> None:
    pieces: list[str] = []
    found = generate(talking.path, PROMPT, max_tokens=12, threads=1, on_text=pieces.append)
    fast = tokenizer()
    text = fast.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, tokenize=False)
    ids = fast(text, add_special_tokens=False)["input_ids"]
    assert found.prompt_tokens == len(ids)
    model: Any = llama()
    with torch.no_grad():
        wanted = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
    assert list(found.tokens) == wanted[0, len(ids) :].tolist()
    assert found.text == fast.decode(found.tokens, skip_special_tokens=True)
    assert found.text.startswith("".join(pieces)), "the text heard, but for a character whose bytes never came"
    assert len(pieces) > 1
    assert found.stopped == ("end" if found.tokens[-1] == 1 else "length")
    assert found.threads == 1
    assert found.prefill_tokens_per_s > 0
    assert found.peak_memory_mib > 50


def test_temperature_draws_and_the_seed_repeats_them(talking: Artifact) -> None:
    def drawn(seed: int) -> tuple[int, ...]:
        return generate(talking.path, PROMPT, max_tokens=8, temperature=5.0, seed=seed, raw=True).tokens

    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first


def test_a_full_cache_ends_the_answer_and_a_longer_prompt_is_refused(talking: Artifact) -> None:
    found = generate(talking.path, "b" * (CACHE - 3), max_tokens=100, raw=True)
    assert (found.stopped, len(found.tokens)) == ("cache", 4) or found.stopped == "end"
    with pytest.raises(EdgetuneError) as caught:
        generate(talking.path, "b" * (CACHE + 1), raw=True)
    error = caught.value
    assert (error.got, error.allowed, error.exit_code) == (CACHE + 1, (f"at most {CACHE}",), Exit.USAGE)
    assert "larger max_tokens" in error.action


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"temperature": -1.0}, {"threads": 0}, {"seed": -1}])
def test_settings_without_sense_are_refused(settings: dict[str, Any], talking: Artifact) -> None:
    with pytest.raises(EdgetuneError):
        generate(talking.path, PROMPT, **settings)


def test_the_verb_prints_the_text_and_tells_what_it_cost(talking: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generate(talking.path, PROMPT, max_tokens=6, raw=True)
    assert cli_generate.generate(talking.path, PROMPT, max_tokens=6, raw=True) == 0
    printed = capsys.readouterr()
    assert expected.text.startswith(printed.out.rstrip("\n"))
    assert "tokens/s; decode 6 tokens" in printed.err
    assert "peak memory" in printed.err


def test_a_dash_reads_the_prompt_from_stdin(
    talking: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["generate", str(talking.path), "--max-tokens", "6", "--raw"]
    assert main([*given, PROMPT]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert main([*given, "-"]) == 0
    assert capsys.readouterr().out == expected


def test_importing_it_stays_light() -> None:
    heavy = "{'executorch', 'transformers'} & set(sys.modules)"
    code = f"import sys, edgetune.runtime.generating, edgetune.cli.generate; print({heavy})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="no such program") as caught:
        generate(tmp_path / "model.pte", PROMPT)
    assert caught.value.exit_code == Exit.USAGE
