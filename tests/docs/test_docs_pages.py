"""What the README and the pages say exists: commands, options, configs, values, warnings, methods, links."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from pipeline.cli.main import app
from pipeline.config.run_config import RunConfig, load_config, shipped_configs
from stages.methods import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
SHIPPED = {path.stem: path for path in shipped_configs()}
COMMANDS: Any = typer.main.get_command(app)


def shown(page: Path) -> list[str]:
    """Every command of ours on a page: lines of code blocks, joined where they go on, and code in the text."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(?:sh)?\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return [line.strip() for line in lines + spans if re.match(r"\s*(wsss [a-z]|--set )", line)]


def words_of(line: str) -> list[str]:
    """The words of a command without its comment; brackets of a synopsis are no words."""
    line = re.split(r"\s#|  +(?=[a-zA-Z(])", line)[0]
    try:
        return shlex.split(line)
    except ValueError:  # an apostrophe in a remark
        return line.split()


def faults_of(line: str) -> list[str]:
    words = words_of(line)
    if words[0] == "--set":
        return faults_of_values("custom", words)
    command, rest = COMMANDS, words[1:]
    while hasattr(command, "commands") and rest and re.fullmatch(r"[a-z]+", rest[0]):
        if rest[0] not in command.commands:
            return [f"no command {rest[0]}"]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    faults = [f"no option {name}" for name in re.findall(r"--[a-z][a-z-]*", " ".join(rest)) if name not in known]
    config = next((word for word in rest if word in SHIPPED), None)
    return faults + (faults_of_values(config, rest) if config else [])


def faults_of_values(config: str, words: list[str]) -> list[str]:
    """What is wrong with the values that ``--set`` gives; names in capitals and … stand for values of the reader's."""
    given = [after for word, after in itertools.pairwise(words) if word == "--set"]
    try:
        load_config(SHIPPED[config], [value for value in given if "…" not in value and "a.b=c" not in value])
    except Exception as error:  # every kind is a fault of the page
        return [str(error)]
    return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    faults = [f"{line}: {fault}" for line in shown(page) for fault in faults_of(line)]
    assert not faults, "\n".join(faults)


def test_a_wrong_command_would_be_found() -> None:
    assert faults_of("wsss predikt custom") == ["no command predikt"]
    assert faults_of("wsss run demo --sett a=b   # what it does") == ["no option --sett"]
    assert "did you mean" in faults_of("wsss run demo --set make_masks.treshold=0.1")[0]
    assert "unknown key" in faults_of("--set make_masks.crf.unary=labels")[0]
    assert faults_of("wsss run demo --set make_masks.threshold=0.1  (--hopeless)") == []
    assert len([line for page in PAGES for line in shown(page)]) > 100


def test_a_readme_of_under_a_thousand_words() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def texts() -> str:
    """Every text in the code, numbers and names as …"""
    found = []
    for file in (path for top in ("stages", "pipeline") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_recipes_quote_warnings_that_exist() -> None:
    quoted = re.findall(r"^> `(.+)`$", (DOCS / "recipes.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    known = texts()
    parts = [part.strip(" ()") for text in quoted for part in text.split("…")]
    assert [part for part in parts if part not in known] == []
    assert len(quoted) > 15


def test_every_method_has_its_page() -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md")}
    assert set(pages) == set(METHODS)
    assert all(f"<!-- method: {name} -->" in text and "## When to use it" in text for name, text in pages.items())


def test_the_generated_parts_say_what_the_code_says() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec
    assert spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.on_page_markdown("<!-- configuration -->")
    assert "| `threshold` | number ≥ 0, < 1 | `0.3` |" in page
    assert "| `seed` | whole number ≥ 0, < 2147483648 | `0` | Seed of both trainings. |" in page
    sections = re.findall(r"^## (\w+)", page, flags=re.MULTILINE)
    assert sections == [name for name in RunConfig.model_fields if name not in ("name", "seed", "weights", "track")]
    assert set(re.findall(r"\(configuration\.md#(\w+)\)", page)) <= set(re.findall(r"\{ #(\w+) \}", page))
    adl = hooks.on_page_markdown("# x\n\n<!-- method: adl -->\n")
    assert "Choe and Shim" in adl
    assert "Differs from the paper" in adl
    assert "`demo_adl`" in adl
    assert "`voc_animals_gain`" not in adl


def test_every_page_stands_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/]+\.md", str(site["nav"])))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
