"""The kit of a program that talks: its tokenizer, what its chat format puts around a message, and a sample."""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.core.files import write_atomically
from edgetune.core.numbers import format_size
from edgetune.export.kit.platforms import Platform
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path, write_card
from edgetune.program.manifest import TokenizerSpec
from edgetune.program.tokenizer import chat_text

_MESSAGE = "EDGETUNE-MESSAGE"  # stands for the user's while the template is rendered
CHAT = "chat.json"


def beside(artifact: Artifact) -> list[str]:
    """Write what lies beside a program that talks, as far as it does not yet; the names of all."""
    path, tokenizer = artifact.path, artifact.language.tokenizer
    if not card_path(path).is_file():
        write_card(path, artifact.manifest)
    before, after = chat_around(tokenizer)
    write_atomically(path.with_name(CHAT), json.dumps({"before": before, "after": after}, ensure_ascii=False, indent=1))
    return [path.name, f"{path.stem}.json", tokenizer.file, CHAT, card_path(path).name]


def chat_around(spec: TokenizerSpec) -> tuple[str, str]:
    """What the chat format puts before and after one message of a user; nothing for a model of plain text."""
    if spec.chat_template is None:
        return "", ""
    before, _, after = chat_text(spec, _MESSAGE).partition(_MESSAGE)
    return before, after


def fields(platform: Platform, artifact: Artifact, files: list[str]) -> dict[str, str]:
    """The values of the templates."""
    manifest, language = artifact.manifest, artifact.language
    made_from = manifest.carried.model if manifest.carried is not None else ""
    parity = manifest.main.parity
    contents = {
        "json": "its metadata: cache, end tokens, versions, checksums",
        "md": "the model card",
        "pte": "the program",
    }
    contents |= {language.tokenizer.file: "the tokenizer", CHAT: "what the chat format puts around a message"}
    return {
        "title": f"{made_from or language.architecture} for {platform.title}",
        "target": manifest.target,
        "size": format_size(manifest.size_bytes),
        "executorch": manifest.versions["executorch"],
        "torch": manifest.versions["torch"].partition("+")[0],
        "cache": str(language.max_tokens),
        "memory": format_size(manifest.main.plan_bytes),
        "files": "\n".join(f"- `{name}`: {contents.get(name) or contents[Path(name).suffix[1:]]}" for name in files),
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
        "parity": f"The program ran on the machine that exported it: of {parity.rows} greedy tokens, "
        f"{parity.same_prediction_pct:g} % are the same as those of the model."
        if parity is not None
        else f"The program was {manifest.note}.",
    }  # fmt: skip
