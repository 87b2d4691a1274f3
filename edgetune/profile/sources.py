"""Sources that several facts share: `from: KEY` in a fact stands for the source and trust under `sources`."""

from __future__ import annotations

from pydantic import ValidationError

from edgetune.core.validated import list_faults
from edgetune.profile.facts import FactSource


def resolve_sources(content: dict[object, object]) -> tuple[dict[object, object], list[str]]:
    """Replace each `from` by the source that it names. Returns the content without `sources`, and all faults by path.

    >>> sources = {"spec": {"source": "a page", "trust": "low"}}
    >>> resolve_sources({"sources": sources, "ghz": {"value": 2.0, "from": "spec"}})
    ({'ghz': {'value': 2.0, 'source': 'a page', 'trust': 'low'}}, [])
    """
    faults: list[str] = []
    sources = _parse_sources(content.get("sources", {}), faults)
    used: set[str] = set()
    rest = {key: item for key, item in content.items() if key != "sources"}
    facts = {key: _resolve(item, str(key), sources, used, faults) for key, item in rest.items()}
    faults += [f"sources.{key}: nothing is from it" for key in sources if key not in used]
    return facts, faults


def _parse_sources(sources: object, faults: list[str]) -> dict[str, FactSource | None]:
    """The sources by key; `None` for one with a fault, which is then reported only once."""
    if not isinstance(sources, dict):
        faults.append("sources: must be a mapping of keys to source and trust")
        return {}
    parsed: dict[str, FactSource | None] = {}
    for key, item in sources.items():
        parsed[str(key)] = None
        try:
            parsed[str(key)] = FactSource.model_validate(item)
        except ValidationError as error:
            faults += list_faults(FactSource, error, ("sources", str(key)))
    return parsed


def _resolve(
    value: object, path: str, sources: dict[str, FactSource | None], used: set[str], faults: list[str]
) -> object:
    if isinstance(value, list):
        return [_resolve(item, f"{path}.{number}", sources, used, faults) for number, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "from" not in value:
        return {key: _resolve(item, f"{path}.{key}", sources, used, faults) for key, item in value.items()}
    rest, key = {name: item for name, item in value.items() if name != "from"}, value["from"]
    if not isinstance(key, str) or key not in sources:
        faults.append(f"{path}.from: {key!r} is not under sources ({', '.join(sources) or 'there are none'})")
        return {"source": "?", "trust": "low", **rest}
    used.add(key)
    given = sources[key]
    if "source" in rest or "trust" in rest:
        faults.append(f"{path}.from: the source is given twice")
        return {"source": "?", "trust": "low", **rest}
    return {**rest, "source": given.source, "trust": given.trust} if given else {**rest, "source": "?", "trust": "low"}
