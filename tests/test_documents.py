"""Tests of the documentation: commands use existing flags, links lead to files, and recipes are documented."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from config import RECIPES, ROOT, ExperimentConfig
from train import open_recipe
from utils.options import parse_flags
from utils.runtime.experiment import load_recipe

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md"), *ROOT.glob("experiments/*/README.md")]
)
# The changelog names flags that were dropped.
WITH_COMMANDS = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
_COMMAND = re.compile(r"(?:python|torchrun .*?) (train|test|inference|export)\.py(.*)")


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """Return the script and the arguments of every command in the code blocks of a document."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [_COMMAND.search(line.split("#")[0]) for line in lines]
    return [(match[1], [word for word in shlex.split(match[2]) if word != "..."]) for match in found if match]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_use_existing_flags(path: Path) -> None:
    for script, argv in commands(path):
        parse_flags("", importlib.import_module(script).GROUPS, argv)
        for recipe in [word.partition("=")[2] for word in argv if word.startswith("--recipe=")]:
            open_recipe(recipe)  # raises an error if there is none


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(path)) for path in WITH_COMMANDS) > 20


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def section_of_recipe(name: str) -> str:
    """Return the sections of docs/recipes.md that describe a recipe."""
    sections = re.split(r"^## ", (ROOT / "docs/recipes.md").read_text(), flags=re.MULTILINE)
    described = "".join(part for part in sections if name in part.splitlines()[0].replace(" ", "").split(","))
    other = re.search(r"as `(\w+)` \|", described)
    return described + (section_of_recipe(other[1]) if other else "")


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.json"))])
def test_every_value_of_a_recipe_is_documented(name: str) -> None:
    """Every value that differs from the default is in the table of the recipe."""
    recipe, usual = load_recipe(name, RECIPES).experiment, ExperimentConfig()
    section = section_of_recipe(name)
    differing = [part for part in ("evaluation", "inference") if getattr(recipe, part) != getattr(usual, part)]
    for part in ("model", "loss", "data", "train", "protocol"):
        values, defaults = getattr(recipe, part), getattr(usual, part)
        names = [field.name for field in dataclasses.fields(values) if field.name != "stages"]
        differing += [field for field in names if getattr(values, field) != getattr(defaults, field)]
    assert len(differing) > 5
    assert not [field for field in differing if f"`{field}`" not in section]
