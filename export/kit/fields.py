"""Values for the templates of every kit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.core.numbers import format_size
from edgetune.export.kit.platforms import Platform
from edgetune.program.manifest import Manifest


def common_fields(
    platform: Platform, manifest: Manifest, name: str, files: Mapping[str, str], products: Sequence[str], parity: str
) -> dict[str, str]:
    """The values for the kit of a program called `name`, with a description of each of its files.

    `products` are those of ExecuTorch's Swift package; `parity` describes the comparison, if there was one.
    """
    return {
        "title": f"{name} for {platform.title}",
        "target": manifest.target,
        "size": format_size(manifest.size_bytes),
        "executorch": manifest.versions["executorch"],
        "torch": manifest.versions["torch"].partition("+")[0],
        "files": format_bullets([f"`{file}`: {description}" for file, description in files.items()]),
        "package": platform.packages.get(manifest.target, platform.packages.get("", "")),
        "products": "\n".join(f'        .product(name: "{name}", package: "executorch"),' for name in products),
        "resources": ",\n".join(f'        .copy("Resources/{file}")' for file in files),
        "parity": parity if manifest.main.parity is not None else f"The program was {manifest.note}.",
    }


def format_bullets(lines: Sequence[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
