"""YAML -> a frozen `Recipe`: every error at once with its line, and the order of steps checked before any work."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from edgetune.core import registry
from edgetune.core.errors import EdgetuneError
from edgetune.core.order import plan_steps
from edgetune.core.other_names import nearest, nearest_file
from edgetune.core.places import Errors, KeyPath, format_path, raise_all
from edgetune.core.technique import Settings, StepSettings, adapt_defaults
from edgetune.core.validated import Problem, setting_names, validate
from edgetune.data.settings import DataSettings
from edgetune.models.loaded import ModelSettings
from edgetune.recipe.document import Document, read, read_yaml_text
from edgetune.recipe.located import resolve_paths
from edgetune.recipe.names import HOST, SUFFIX, TARGET_NAMES, device_ids, unknown_target
from edgetune.recipe.overrides import VARIANT, apply_overrides
from edgetune.recipe.sections import Budget, ExportSettings, ProfileSettings, Step

NOT_LANGUAGE = frozenset({"minilm", "effnet-lite0", "timm"})  # models of the registry that cannot generate text

_ROWS = "write a recipe for it: edgetune recipes new --model minilm --data csv:{0}"
NO_RECIPES = {  # by suffix, with the advice
    ".pte": "a program is asked: edgetune predict {0} TEXT, or profile, inspect, generate",
    ".pt2": "a saved model is exported: edgetune export {0}",
    **dict.fromkeys((".csv", ".tsv"), _ROWS),
    ".jsonl": _ROWS.replace("csv:", "jsonl:"),
    ".py": "write a recipe for your model: edgetune recipes new --model py:{0}:build --data csv:FILE",
    ".json": "a recipe is YAML: save it as a file that ends in .yaml",
}


class Recipe(Settings):
    """A whole job: model, data, ordered steps, and what to do with the result."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the recipe and of its runs: letters, digits, `.`, `_` and `-`. Default: the name of the file."""
    description: str = ""
    """Purpose of the recipe, in one line; `edgetune recipes list` prints it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the row order and of all random numbers: the same seed gives the same run."""
    model: ModelSettings
    """The model to start from. A plain name is short for `{source: NAME}`."""
    data: DataSettings
    """The rows for training and testing. A plain name is short for `{source: NAME}`."""
    steps: tuple[Step, ...]
    """The steps that are applied to the model, in this order. A step is a name, or a name with settings."""
    export: ExportSettings | None = None
    """How to export the model; without it, nothing is exported."""
    profile: ProfileSettings | None = None
    """Devices to predict for; without it, nothing is predicted or measured."""
    budget: tuple[Budget, ...] = ()
    """Limits that the run must meet, for one device or a list of devices. If it does not, the exit code is 4."""
    variants: dict[str, dict[str, Any]] = {}  # noqa: RUF012  pydantic copies it
    """Named sets of overrides; `variant=NAME` on the command line selects one."""

    def resolve(self) -> dict[str, Any]:
        """Plain values with every default written out; reading them returns an equal recipe."""
        plain = self.model_dump(mode="json")
        plain["steps"] = [{s["name"]: s["settings"]} for s in plain["steps"]]
        return plain

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolve(), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """SHA-256 of the settings that affect the result (not the description, nor variants that are not selected)."""
        plain = {k: v for k, v in self.resolve().items() if k not in ("description", "variants")}
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def packaged_recipes() -> tuple[str, ...]:
    """The names of the recipes in the package."""
    files = resources.files("edgetune.recipes").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def read_recipe_text(recipe: str | Path) -> tuple[str, str]:
    """The YAML text of a recipe, and its name for errors. A path ends in .yaml; else it is a packaged recipe."""
    if isinstance(recipe, Path) or recipe.endswith((".yaml", ".yml")):
        place = Path(recipe)
        if not place.exists():
            other = place.with_suffix(".yml" if place.suffix == ".yaml" else ".yaml")
            near = other.name if other.is_file() else nearest_file(place) or nearest(place.stem, packaged_recipes())
            action = "`edgetune recipes list` prints those of the package"
            raise EdgetuneError("no such recipe", got=str(recipe), near=near, action=action)
        return read_yaml_text(place), str(recipe)
    if recipe not in packaged_recipes():
        place = Path(recipe)
        action = NO_RECIPES.get(place.suffix.lower(), "a path must end in .yaml").format(recipe)
        if place.is_dir():
            inside = next(
                (each for each in (place / "recipe.yaml", *sorted(place.glob("*.y*ml"))) if each.is_file()), ""
            )
            action = f"write {inside}" if inside else "this is a folder: write the path of a file that ends in .yaml"
        raise EdgetuneError("no such recipe in the package", got=recipe, allowed=packaged_recipes(), action=action)
    return resources.files("edgetune.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8"), f"{recipe}.yaml"


def load(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and check a recipe, by name or path.

    Paths in it are relative to the recipe, those in overrides to the current folder.

    Raises:
        EdgetuneError: a single error as it is; several as `places.Errors`.
    """
    if not isinstance(overrides or {}, Mapping):
        raise EdgetuneError("overrides are a mapping", got=overrides, action='write {"train.epochs": 2}')
    text, name = read_recipe_text(recipe)
    document = read(text, name)
    if name == str(recipe) and isinstance(document.value, dict):  # a file, not one of the package
        document = Document(name, resolve_paths(document.value, Path(name).parent), document.places)
    return from_document(document, resolve_paths(overrides or {}, Path()))


def parse(text: str, name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read, override and check the text of a recipe; errors call it `name`."""
    return from_document(read(text, name), overrides)


def from_plain(plain: Mapping[str, Any], name: str = "recipe", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from plain values, such as those of `Recipe.resolve`."""
    return from_document(Document(name, dict(plain)), overrides)


def from_document(document: Document, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Override and check plain values with their line numbers."""
    if not isinstance(document.value, dict):
        message = "a recipe is a mapping"
        raise EdgetuneError(message, where=document.name, got=document.value, allowed=Recipe.model_fields)
    document, errors = apply_overrides(_expand_shorthands(document), overrides or {}, list(Recipe.model_fields))
    document = _expand_shorthands(document)
    checking = _Checker(document)
    recipe = checking.recipe()
    raise_all(document.name, [*errors, *checking.errors])
    if recipe is None:
        raise AssertionError("a recipe without an error must exist")
    return recipe


def _expand_shorthands(document: Document) -> Document:
    """Write shorthands out: `model: minilm`, one budget, a step that is only a name."""
    values = dict(document.value)
    values.setdefault("name", Path(document.name).stem)
    for key in ("model", "data"):
        if isinstance(values.get(key), str):
            values[key] = {"source": values[key]}
    if isinstance(values.get("budget"), dict):
        values["budget"] = [values["budget"]]
    values.setdefault("steps", [])
    if isinstance(values["steps"], list):
        values["steps"] = [_expand_step(step) for step in values["steps"]]
    return Document(document.name, values, document.places)


def _expand_step(step: Any) -> Any:
    if isinstance(step, str):
        return {step: {}}
    if isinstance(step, dict) and len(step) == 1:
        return {name: {} if settings is None else settings for name, settings in step.items()}
    return step


def step_names() -> list[str]:
    """The names of all steps."""
    return [*registry.TECHNIQUES, *registry.STEPS]


def _suggest_indent(got: Any) -> str:
    """What to do about a step whose settings are not indented below its name; empty for any other mistake."""
    names = [name for name in got if name in step_names()] if isinstance(got, list) else []
    settings = [name for name in got if name not in names] if names else []
    if len(names) != 1 or not set(settings) & set(setting_names(settings_class(names[0]))):
        return ""
    return f"indent {', '.join(settings)} further than {names[0]}"


def _suggest_place(problem: Problem, values: Mapping[str, Any]) -> str:
    """How to write `data: {csv: rows.csv}`, or where `epochs: 3` belongs; empty for any other mistake."""
    section, *rest = problem.path
    if problem.what == "unknown field" and not rest:
        steps = [name for name in step_names() if name not in registry.PEFT_FAMILIES]  # whose classes need peft
        holder = next((name for name in steps if section in setting_names(settings_class(name))), "")
        return f"it belongs in a step: - {holder}: {{{section}: ...}}" if holder else ""
    table = {"model": registry.MODELS, "data": registry.DATASETS}.get(str(section), {})
    if problem.what != "unknown field" or len(rest) != 1 or rest[0] not in table:
        return ""
    return f"write source: {rest[0]}:{values[str(section)][rest[0]]}"


class _Checker:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.errors: list[EdgetuneError] = []

    def add(self, where: str | KeyPath, problem: str, **details: Any) -> None:
        """Note an error; `details` are those of an `EdgetuneError`."""
        location = where if isinstance(where, str) else self.where(where)
        self.errors.append(EdgetuneError(problem, where=location, **details))

    def recipe(self) -> Recipe | None:
        values = self.document.value
        steps = self.steps(values["steps"])
        head = {key: value for key, value in values.items() if key != "steps"}
        recipe, problems = validate(Recipe, {**head, "steps": []})
        for problem in problems:
            error = problem.at(self.where(problem.path))
            error.action = error.action or _suggest_place(problem, values)
            self.errors.append(error)
        self.order(steps)
        self.sources(values)
        self.devices(values)
        self.reachable(recipe, steps)
        self.variants(values.get("variants"))
        self.errors.sort(key=lambda error: _line(error.where))
        complete = [step for _, _, step in steps if step is not None]
        settings = adapt_defaults([step.settings for step in complete])
        fitting = tuple(Step(name=step.name, settings=each) for step, each in zip(complete, settings, strict=True))
        return None if recipe is None else recipe.model_copy(update={"steps": fitting})

    def where(self, path: KeyPath) -> str:
        """`recipe.yaml, line 4, data.train_rows`."""
        place, located_path = self.document.place(path)
        named = [key for key in path if isinstance(key, str)]
        shown = located_path if list(located_path) == named else path
        return ", ".join(part for part in (self.document.name, place, format_path(shown)) if part)

    def where_step(self, index: int, name: str = "", path: KeyPath = ()) -> str:
        """`recipe.yaml, step 3 (line 12), lora.rank`."""
        place, _ = self.document.place(("steps", index, *([name] if name else []), *path))
        at = f"step {index + 1} ({place})" if place else f"step {index + 1}"
        return ", ".join(part for part in (self.document.name, at, format_path((name, *path)) if name else "") if part)

    def steps(self, plain: Any) -> list[tuple[int, str, Step | None]]:
        """Index, name and step of every step with a valid name; the step is `None` if its settings are wrong."""
        if not isinstance(plain, list) or not plain:
            problem = "must be a list of steps" if plain else "a recipe needs at least one step"
            action = "begin each step with a dash, as in `- train`"
            self.add(("steps",), problem, got=plain or None, allowed=step_names(), action=action, near="")
            return []
        steps = []
        for index, step in enumerate(plain):
            if not isinstance(step, dict) or len(step) != 1 or not isinstance(next(iter(step)), str):
                got = list(step) if isinstance(step, dict) else step
                form = "write `- name`, or `- name: {setting: value}`; a dash before every step"
                action = _suggest_indent(got) or form
                self.add(self.where_step(index), "a step is one name with its settings", got=got, action=action)
                continue
            name, settings = next(iter(step.items()))
            if name not in step_names():
                self.add(self.where_step(index), "unknown step", got=name, allowed=step_names())
                continue
            steps.append((index, name, self.step(index, name, settings)))
        return steps

    def step(self, index: int, name: str, settings: Any) -> Step | None:
        kind = settings_class(name)
        if not isinstance(settings, dict):
            action = f"write `- {name}: {{{next(iter(kind.model_fields), 'setting')}: ...}}`"
            problems = [Problem((), "settings must be a mapping", settings, tuple(kind.model_fields), action)]
        else:
            made, problems = validate(kind, settings)
            if made is not None:
                return Step(name=name, settings=made)
        self.errors += [problem.at(self.where_step(index, name, problem.path)) for problem in problems]
        return None

    def order(self, steps: list[tuple[int, str, Step | None]]) -> None:
        """Check the order by the classes alone, so that it is reported together with wrong settings."""
        kinds = [settings_class(name) for _, name, _ in steps]
        try:
            plan_steps(kinds, place=lambda n: self.where_step(*steps[n][:2]))
        except EdgetuneError as error:
            self.errors += error.errors if isinstance(error, Errors) else [error]
        for n, (index, name, step) in enumerate(steps):
            self.teacher(self.where_step(index, name), step, [earlier for _, earlier, _ in steps[:n]])

    def teacher(self, where: str, step: Step | None, earlier: list[str]) -> None:
        """`distill.teacher` names an earlier step: the model as it was just before that step."""
        distill = getattr(step.settings, "distill", None) if step is not None else None
        name = getattr(distill, "teacher", None)
        if isinstance(name, str) and name not in earlier:
            problem = "the teacher is the model just before an earlier step"
            self.add(f"{where}.distill.teacher", problem, got=name, allowed=list(dict.fromkeys(earlier)))

    def sources(self, values: dict[str, Any]) -> None:
        """Model and data are names in the registry, with an argument after the first colon."""
        for key, table in (("model", registry.MODELS), ("data", registry.DATASETS)):
            source = values[key].get("source") if isinstance(values.get(key), dict) else None
            if isinstance(source, str) and source.partition(":")[0] not in table:
                error = registry.unknown_source_error(table, key, source)
                self.errors.append(error.within(self.where((key, "source"))))

    def devices(self, values: dict[str, Any]) -> None:
        """Every device is a known id, `host`, or the path of a descriptor."""
        profile, budgets = values.get("profile"), values.get("budget")
        named = profile.get("devices") if isinstance(profile, dict) else None
        named_devices: list[tuple[KeyPath, Any]] = [
            (("profile", "devices", i), d) for i, d in enumerate(named if isinstance(named, list) else [])
        ]
        for index, budget in enumerate(budgets if isinstance(budgets, list) else []):
            named_devices += [(("budget", index, "device"), budget.get("device"))] if isinstance(budget, dict) else []
        allowed = dict.fromkeys([*device_ids(), HOST])
        for path, name in named_devices:
            if isinstance(name, str) and name not in allowed and not name.endswith(SUFFIX):
                self.add(path, "unknown device", got=name, allowed=allowed)

    def reachable(self, recipe: Recipe | None, steps: list[tuple[int, str, Step | None]]) -> None:
        """The target exists, and something in the recipe provides each budgeted value."""
        if recipe is None:
            return
        if recipe.export is not None and recipe.export.target not in TARGET_NAMES:
            self.add(("export", "target"), "unknown target", **unknown_target(recipe.export.target))
        self.generation(recipe)
        if recipe.export is not None and recipe.export.dtype != "fp32" and any(name == "int8" for _, name, _ in steps):
            problem = "the layers of an int8 model pass integers on, and leave no floats to write in 16 bits"
            action = "leave export.dtype out, or the step int8"
            self.add(("export", "dtype"), problem, got=recipe.export.dtype, action=action)
        profiled = set(recipe.profile.devices) if recipe.profile and recipe.export else set()
        for index, budget in enumerate(recipe.budget):
            prediction = (budget.device in profiled, f"add export, and {budget.device} under profile.devices")
            needs = {
                "latency_ms": prediction,
                "peak_memory_mib": prediction,
                "size_mib": (recipe.export is not None, "add export"),
                "train_memory_mib": (any(name == "train" for _, name, _ in steps), "add a train step"),
            }
            for limit, (provided, action) in needs.items():
                if getattr(budget, limit) is not None and not provided:
                    self.add(("budget", index, limit), "nothing in the recipe provides this value", action=action)

    def generation(self, recipe: Recipe) -> None:
        """Whether the model can generate text, as far as its name shows; the rest is checked when it is loaded."""
        if recipe.export is None or not recipe.export.language:
            return
        if recipe.model.source.partition(":")[0] in NOT_LANGUAGE:
            problem = f"{recipe.model.source} is not a causal language model, so its program cannot generate text"
            action = "leave export.language out, or choose the model smollm2 or hf:PATH"
            self.add(("export", "language"), problem, action=action)

    def variants(self, plain: Any) -> None:
        """Every key of every variant must refer to something, even if the variant is not selected."""
        if not isinstance(plain, dict):
            return
        for name, overrides in plain.items():
            if not isinstance(overrides, dict):
                continue
            where = self.where(("variants", name))
            if VARIANT in overrides:
                self.add(where, "a variant cannot choose a variant")
            _, errors = apply_overrides(self.document, overrides, list(Recipe.model_fields))
            self.errors += [error.within(where) for error in errors if VARIANT not in overrides]


def settings_class(name: str) -> type[StepSettings]:
    """The settings class of a step; imports only its own module."""
    kind: type[StepSettings] = registry.load({**registry.TECHNIQUES, **registry.STEPS}[name])
    return kind


def _line(where: str) -> int:
    """The line number in an error's location, for sorting; 0 for an override."""
    match = re.search(r"\bline (\d+)", where)
    return int(match[1]) if match else 0
