"""The kit of a text-generation program: its tokenizer, its chat format and a sample."""

from __future__ import annotations

import json

from edgetune.core.files import write_atomically
from edgetune.core.numbers import format_size
from edgetune.export.kit.fields import common_fields
from edgetune.export.kit.platforms import Platform
from edgetune.program.artifact import Artifact
from edgetune.program.card import card_path, write_card
from edgetune.program.manifest import TokenizerSpec
from edgetune.program.tokenizer import chat_text

_MESSAGE = "EDGETUNE-MESSAGE"  # a placeholder while the chat template is rendered
CHAT = "chat.json"


def split_chat(spec: TokenizerSpec) -> tuple[str, str]:
    """The text that the chat format puts before and after a user's message; empty for a model without one."""
    if spec.chat_template is None:
        return "", ""
    before, _, after = chat_text(spec, _MESSAGE).partition(_MESSAGE)
    return before, after


def fields(platform: Platform, artifact: Artifact) -> dict[str, str]:
    """The values for the templates. Writes the card and the chat format next to the program."""
    path, manifest, language = artifact.path, artifact.manifest, artifact.language
    if not card_path(path).is_file():
        write_card(path, manifest)
    before, after = split_chat(language.tokenizer)
    write_atomically(path.with_name(CHAT), json.dumps({"before": before, "after": after}, ensure_ascii=False, indent=1))
    model = manifest.carried.model if manifest.carried is not None else ""
    parity, products = "", ["executorch", "executorch_llm", "backend_xnnpack", "kernels_llm"]
    if (result := manifest.main.parity) is not None:
        parity = (
            f"The program ran on the machine that exported it: of {result.rows} greedy tokens, "
            f"{result.same_prediction_pct:g} % are the same as those of the model."
        )
    files = {
        path.name: "the program",
        f"{path.stem}.json": "its metadata: cache, end tokens, versions, checksums",
        language.tokenizer.file: "the tokenizer",
        CHAT: "the text that the chat format puts around a message",
        card_path(path).name: "the model card",
    }
    products += ["kernels_optimized", "kernels_quantized"]
    return {
        **common_fields(platform, manifest, model or language.architecture, files, products, parity),
        "cache": str(language.max_tokens),
        "memory": format_size(manifest.main.plan_bytes),
        "library": "tokenizers>=0.21",
    }
