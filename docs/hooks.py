"""Fills the pages of the documentation site with what the code says of itself; mkdocs calls it.

``<!-- configuration -->`` becomes the tables of every section of a config, ``<!-- method: NAME -->`` the source, the
differences, the options and the shipped configs of an attention method.  All of it is read from the config classes and
the docstrings, so a page cannot say something else than ``wsss config check`` does.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Collection
from typing import Any

import yaml

from pipeline.config.run_config import RunConfig, shipped_configs
from stages.methods import METHODS

_REFERENCE = "#/$defs/"


def on_page_markdown(markdown: str, **_: Any) -> str:  # noqa: ANN401 - mkdocs gives page, config and files too
    """The page with its markers replaced.

    Raises:
        KeyError: a page asks for a method that is not in METHODS.
    """
    markdown = re.sub(r"<!-- method: (\w+) -->", lambda match: _method(match[1]), markdown)
    return re.sub(r"<!-- configuration -->", lambda _: _configuration(), markdown)


def _method(name: str) -> str:
    """What the code says of a method."""
    config = METHODS[name]
    module = importlib.import_module(config.__module__)
    lead, _, source = inspect.cleandoc(module.__doc__ or "").partition("Source:")
    built = next(member for member in vars(module).values() if _builds(member, config))
    differs = inspect.cleandoc(built.__doc__ or "").partition("Differs:")[2]
    schema = config.model_json_schema()
    rows = _table(schema, schema.get("$defs", {}), without=("name",))
    configs = [f"`{path.stem}`" for path in shipped_configs() if _method_of(path.read_text("utf-8")) == name]
    parts = [
        f"**In short.** {_line(lead.partition('Shapes:')[0])}",
        f"**Source.** {_line(source)}",
        f"**Differs from the paper.** {_line(differs)}" if differs else "",
        "## Options\n\nUnder `train_classifier.method`:\n\n" + rows if rows else "## Options\n\nIt has none.",
        f"## Shipped configs\n\n{', '.join(configs)}",
    ]
    return "\n\n".join(filter(None, parts))


def _builds(member: object, config: type) -> bool:
    """Whether ``member`` is the class that ``config`` builds: the one whose name it has, without ``Config``."""
    return inspect.isclass(member) and member.__name__ == config.__name__.removesuffix("Config")


def _method_of(text: str) -> str | None:
    return yaml.safe_load(text).get("train_classifier", {}).get("method", {}).get("name")


def _configuration() -> str:
    """A table for each section, in the order of a config, each followed by the sections inside it."""
    schema = RunConfig.model_json_schema()
    kinds: dict[str, Any] = schema["$defs"]
    parts = [_table(schema, kinds)]
    seen: set[str] = set()
    for name, option in schema["properties"].items():
        fresh = [kind for kind in _inside(option, kinds) if kind not in seen]
        seen.update(fresh)
        own = _kinds(option)[0] if len(_kinds(option)) == 1 else name
        if fresh:
            parts += [f"## {name} {{ #{own.lower()} }}", _line(option.get("description", ""))]
        for kind in fresh:
            if kind != own:
                title = f"### {_title(kind, kinds[kind])} {{ #{kind.lower()} }}"
                parts += [title, _line(kinds[kind].get("description", ""))]
            parts.append(_table(kinds[kind], kinds) or "It has no options.")
    return "\n\n".join(filter(None, parts))


def _title(kind: str, schema: dict[str, Any]) -> str:
    """``cam`` where the section says its own name, else the class's name without ``Config``."""
    properties = schema.get("properties", {})
    chosen = next((properties[key]["const"] for key in ("name", "format") if "const" in properties.get(key, {})), None)
    return f"`{chosen}`" if chosen else kind.removesuffix("Config")


def _kinds(option: Any) -> list[str]:  # noqa: ANN401 - any JSON schema
    """The sections that an option may hold, in its order."""
    if isinstance(option, dict):
        own = [option["$ref"].removeprefix(_REFERENCE)] if "$ref" in option else []
        inner = (value for key, value in option.items() if key not in ("discriminator", "default"))
        return own + [kind for value in inner for kind in _kinds(value)]
    return [kind for value in option for kind in _kinds(value)] if isinstance(option, list) else []


def _inside(option: dict[str, Any], kinds: dict[str, Any]) -> list[str]:
    """The sections that an option may hold, each followed by those inside it."""
    found: list[str] = []
    for kind in _kinds(option):
        found.append(kind)
        for inner in kinds[kind].get("properties", {}).values():
            found += _inside(inner, kinds)
    return list(dict.fromkeys(found))


def _table(schema: dict[str, Any], kinds: dict[str, Any], without: tuple[str, ...] = ()) -> str:
    """Name, values, default and meaning of each option; empty where there is none."""
    rows = []
    for name, option in schema.get("properties", {}).items():
        default = _default(name, option, schema.get("required", ()))
        cells = (f"`{name}`", _values(option, kinds), default, _line(option.get("description", "")))
        rows += [f"| {' | '.join(cells)} |"] if name not in without else []
    head = "| option | values | default | what it does |\n|---|---|---|---|\n"
    return head + "\n".join(rows) if rows else ""


def _default(name: str, option: dict[str, Any], required: Collection[str]) -> str:
    if name in required:
        return "required"
    value = option.get("default", {} if option.get("type") == "object" else None)
    if "$ref" in option or (isinstance(value, dict) and value):
        return "its own defaults"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _values(option: dict[str, Any], kinds: dict[str, Any]) -> str:
    """What an option may be, in a few words."""
    if "$ref" in option:
        kind = option["$ref"].removeprefix(_REFERENCE)
        return f"[{_title(kind, kinds[kind])}](configuration.md#{kind.lower()})"
    choices = option.get("anyOf") or option.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_values(choice, kinds) for choice in choices))
    if "enum" in option or "const" in option:
        return ", ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if option.get("type") == "array":
        items = option.get("items") or next(iter(option.get("prefixItems", ())), {})
        return f"list of {_values(items, kinds)}"
    if option.get("type") == "object":
        return f"names with {_values(option['additionalProperties'], kinds)}"
    words = {"string": "text", "boolean": "true or false", "integer": "whole number"}
    word = "path" if option.get("format") == "path" else words.get(option["type"], option["type"])
    return f"{word}{_bounds(option)}"


def _bounds(option: dict[str, Any]) -> str:
    marks = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{mark} {option[key]}" for key, mark in marks.items() if key in option]
    return " " + ", ".join(bounds) if bounds else ""


def _line(text: str) -> str:
    """One line for a table's cell: Markdown's code, no bars."""
    return " ".join(text.replace("``", "`").replace("|", "\\|").split())
