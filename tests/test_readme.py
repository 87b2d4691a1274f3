from __future__ import annotations

import importlib
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import peft_table
import pytest
import readme
import recipe_page

import edgetune as et
from edgetune.core.ledger import Ledger
from edgetune.core.registry import PEFT_FAMILIES
from edgetune.core.traits import Trait
from edgetune.recipe import recipe
from edgetune.recipe.document import read
from edgetune.recipe.schema import EDITOR_LINE, add_editor_line


def test_the_generated_parts_are_what_the_code_makes() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.written(text) == text, "run: make docs"
    for name in readme.SCRIPTS:
        assert (readme.ROOT / "tests" / "support" / f"examples_{name}.py").read_text(encoding="utf-8").strip() in text


def test_the_ledger_shown_is_of_a_finished_run_that_holds() -> None:
    ledger = Ledger.read(readme.ROOT / "docs" / "demo.json")
    assert ledger.finished
    again = recipe.from_plain(ledger.settings)  # a field that came later has its default
    assert again == recipe.load("text-minilm"), "run make demo and make docs"
    assert all(verdict.holds for verdict in ledger.verdicts)
    last = ledger.rows[-1].quality
    assert last is not None
    assert all(last.value > baseline.value for baseline in ledger.baselines)


def test_every_command_is_run_or_known_to_be_run_elsewhere() -> None:
    commands = readme.commands()
    assert commands[:2] == ["make demo", "make test"]
    assert [c for c in commands if readme.instead(c) is None] == ["make test"]


def test_the_page_on_recipes_and_the_schema_file_are_what_the_code_makes() -> None:
    assert recipe_page.PAGE.read_text(encoding="utf-8") == recipe_page.page(), "run: make pages"
    assert recipe_page.SCHEMA.read_text(encoding="utf-8") == recipe_page.schema_text(), "run: make pages"


@pytest.mark.parametrize("name", recipe_page.EXAMPLES)
def test_every_example_of_the_page_is_a_recipe(name: str) -> None:
    whole = read(recipe_page.WHOLE, "whole").value
    del whole["variants"]
    added = read(recipe_page.EXAMPLES[name], name).value
    if isinstance(added, list):
        opened = [{"lora": {"targets": ["*"]}}] if name == "finalize" else []
        names = [step if isinstance(step, str) else next(iter(step)) for step in added]
        trained = [] if any(recipe.settings_class(each).leaves & Trait.INTEGER for each in names) else ["train"]
        added = {"steps": [*opened, *added, *trained], "budget": []}
    assert recipe.from_plain({**whole, **added}).steps


def test_the_whole_recipe_of_the_page_is_one() -> None:
    assert recipe.parse(recipe_page.WHOLE, "reviews.yaml", {"variant": "smoke"}).data.train_rows == 64


@pytest.mark.parametrize("name", recipe.packaged_recipes())
def test_every_packaged_recipe_and_its_copy_name_a_schema_that_is_there(name: str) -> None:
    text = recipe.read_recipe_text(name)[0]
    first = text.splitlines()[0]
    assert (readme.ROOT / "recipes" / first.removeprefix(EDITOR_LINE)) == recipe_page.SCHEMA
    copied, _, rest = add_editor_line(text).partition("\n")
    assert rest == text.partition("\n")[2]
    assert Path(url2pathname(urlsplit(copied.removeprefix(EDITOR_LINE)).path)).samefile(recipe_page.SCHEMA)
    assert add_editor_line("name: mine\n") == f"{copied}\nname: mine\n"


def test_the_site_has_every_page_and_every_public_name() -> None:
    pages = {path.name for path in (readme.ROOT / "docs").glob("*.md")}
    named = re.findall(r"([\w-]+\.md)$", (readme.ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(pages)
    listed = re.findall(r"^::: edgetune\.(.*)\.(\w+)$", (readme.ROOT / "docs" / "api.md").read_text("utf-8"), re.M)
    families = set(PEFT_FAMILIES.values())  # made from peft's configs; docs/families.md lists them
    assert {name for _, name in listed} == set(et.__all__) - {"TECHNIQUES"} - families
    for home, name in listed:
        assert getattr(importlib.import_module(f"edgetune.{home}"), name) is getattr(et, name)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_what_a_page_links_to_is_there(page: str) -> None:
    """`make site` checks the links of the pages under docs/."""
    for link in re.findall(r"\]\(([^)#]+)", (readme.ROOT / page).read_text(encoding="utf-8")):
        assert "://" in link or (readme.ROOT / link).exists(), link


def test_the_page_on_adapter_families_has_the_facts_of_the_code() -> None:
    """Without the sizes of files, which a slow test makes again."""
    page = (readme.ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    made = peft_table.families_page(sizes=False)
    assert re.sub(r" [\d.]+ \|$", "  |", page, flags=re.M) == made, "run: make tables"


@pytest.mark.slow
def test_the_page_on_adapter_families_is_what_the_code_makes() -> None:
    page = (readme.ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert page == peft_table.families_page(), "run: make tables"
