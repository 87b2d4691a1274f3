"""The kit of a program that talks: its tokenizer, what its chat format puts around a message, and a sample."""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.core.files import write_whole
from edgetune.core.numbers import size
from edgetune.export.kit.platforms import Platform
from edgetune.program.card import card_path, write_card
from edgetune.program.language import LanguageArtifact, TokenizerSpec
from edgetune.program.tokenizer import chat_text

_MESSAGE = "EDGETUNE-MESSAGE"  # stands for the user's while the template is rendered
CHAT = "chat.json"


def beside(artifact: LanguageArtifact) -> list[str]:
    """Write what lies beside a program that talks, as far as it does not yet; the names of all."""
    path, known = artifact.path, artifact.manifest
    if not card_path(path).is_file():
        write_card(path, known.plain())
    before, after = chat_around(known.tokenizer)
    write_whole(path.with_name(CHAT), json.dumps({"before": before, "after": after}, ensure_ascii=False, indent=1))
    return [path.name, f"{path.stem}.json", known.tokenizer.file, CHAT, card_path(path).name]


def chat_around(spec: TokenizerSpec) -> tuple[str, str]:
    """What the chat format puts before and after one message of a user; nothing for a model of plain text."""
    if spec.chat_template is None:
        return "", ""
    before, _, after = chat_text(spec, _MESSAGE).partition(_MESSAGE)
    return before, after


def fields(platform: Platform, artifact: LanguageArtifact, files: list[str]) -> dict[str, str]:
    """The values of the templates."""
    known = artifact.manifest
    made_from = known.carried.model if known.carried is not None else ""
    parity = known.parity
    told = {
        "json": "its metadata: cache, end tokens, versions, checksums",
        "md": "the model card",
        "pte": "the program",
    }
    what = {known.tokenizer.file: "the tokenizer", CHAT: "what the chat format puts around a message"}
    return {
        "title": f"{made_from or known.architecture} for {platform.title}",
        "target": known.target,
        "size": size(known.size_bytes),
        "executorch": known.versions["executorch"],
        "torch": known.versions["torch"].partition("+")[0],
        "cache": str(known.max_tokens),
        "memory": size(known.plan_bytes),
        "files": "\n".join(f"- `{name}`: {what.get(name) or told[Path(name).suffix[1:]]}" for name in files),
        "library": "tokenizers>=0.21",
        "package": platform.packages.get("", ""),
        "products": "\n".join(
            f'        .product(name: "{name}", package: "executorch"),'
            for name in (
                "executorch", "executorch_llm", "backend_xnnpack", "kernels_llm", "kernels_optimized",
                "kernels_quantized",
            )
        ),
        "resources": ",\n".join(f'        .copy("Resources/{name}")' for name in files),
        "parity": f"The program ran on the machine that exported it: of {parity.tokens} greedy tokens, "
        f"{parity.same_tokens} are the same as those of the model."
        if parity is not None
        else f"The program was {known.note}.",
    }  # fmt: skip
