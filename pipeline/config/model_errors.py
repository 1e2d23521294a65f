"""Say what pydantic found wrong: dotted path, found value, what is allowed, and the nearest valid spelling.

Pure: reads a ValidationError, the model it came from and the raw values; writes nothing.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top level to one value."""


_PLAIN_WORDS: Mapping[str, str] = {
    "model_type": "expected a section",
    "model_attributes_type": "expected a section",
    "dict_type": "expected a section",
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "path_type": "expected a path",
    "string_type": "expected text",
    "int_from_float": "expected a whole number",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
}
"""What pydantic's error types mean to somebody who writes YAML."""


def dotted(path: KeyPath) -> str:
    """``("a", "b", 2)`` as ``a.b[2]``; the top level has a name of its own."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".") or "top level"


def nearest(word: str, allowed: Sequence[str]) -> str | None:
    """The one of ``allowed`` that ``word`` probably means, if any; case and ``-`` against ``_`` do not count."""
    folded = {name.lower().replace("-", "_"): name for name in reversed(allowed)}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def did_you_mean(word: object, allowed: Sequence[str]) -> str:
    """``; did you mean 'x'?`` or nothing."""
    guess = nearest(word, allowed) if isinstance(word, str) else None
    return f"; did you mean '{guess}'?" if guess else ""


def explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Each problem of ``error`` once, as (path, line of text), in the order of the model.

    Args:
        error: What validation raised.
        model: The class that was validated against.
        values: The raw values that were validated.
    """
    grouped: dict[KeyPath, list[tuple[str, str]]] = {}
    for detail in error.errors(include_url=False):
        path = _key_path(detail["loc"], values, is_missing=detail["type"] == "missing")
        path, expected, found = _sentence(detail, path, model, values)
        parts = grouped.setdefault(path, [])
        if (expected, found) not in parts:
            parts.append((expected, found))
    for path, parts in grouped.items():
        # a value that fits no branch of a plain union gives one error per branch: one line, joined by "or"
        expectations = " or ".join(dict.fromkeys(expected for expected, _ in parts))
        yield path, f"{dotted(path)}: {expectations}{parts[-1][1]}"


def loose_values(model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems that pydantic lets pass: text or true for a number, a number for true or false, nan and infinity.

    (Its strict mode refuses them too, but refuses lists for tuples behind any ``mode="before"`` validator.)
    """
    for path, value in _leaves(values, ()):
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"{dotted(path)}: expected a finite number, found {value}"
            continue
        kinds = set(_members(_annotation_at(model, values, path)))
        if not kinds or not kinds <= {int, float, bool}:
            continue
        is_truth = isinstance(value, bool)
        if isinstance(value, str) or (is_truth and bool not in kinds) or (not is_truth and kinds == {bool}):
            wanted = "true or false" if kinds == {bool} else "a number"
            yield path, f"{dotted(path)}: expected {wanted}, found {_show(value)}"


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:  # noqa: ANN401 - raw YAML
    """Every value that is neither a section nor a list nor null, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, (*path, number))
    elif value is not None:
        yield path, value


def _key_path(location: Sequence[str | int], values: Any, *, is_missing: bool) -> KeyPath:  # noqa: ANN401 - raw YAML
    """``location`` without the union tags and validator names that pydantic puts between the keys."""
    path: list[str | int] = []
    here: Any = values
    for number, key in enumerate(location):
        if _has(here, key):
            path.append(key)
            here = here[key]
        elif is_missing and number == len(location) - 1:
            path.append(key)
    return tuple(path)


def _sentence(
    detail: ErrorDetails, path: KeyPath, model: type[BaseModel], values: Mapping[str, Any]
) -> tuple[KeyPath, str, str]:
    """The problem's path, what was expected, and what was found with the remedy."""
    kind, context, found = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return path, "unknown key", _unknown_key(path, model, values)
    if kind == "missing":
        return path, "missing", _missing_key(path, model, values)
    if kind == "literal_error":
        allowed = _literals(context["expected"])
        return path, f"expected {_one_of(allowed)}", f", found {_show(found)}{did_you_mean(found, allowed)}"
    if kind == "union_tag_invalid":
        allowed = _literals(context["expected_tags"])
        tag = context["tag"]
        path = (*path, context["discriminator"].strip("'"))
        return path, f"expected {_one_of(allowed)}", f", found {_show(tag)}{did_you_mean(tag, allowed)}"
    if kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        allowed = _tags(_annotation_at(model, values, path), key)
        return (*path, key), "missing", f"; expected {_one_of(allowed)}"
    if kind in {"value_error", "assertion_error"}:
        return path, str(detail["msg"]).split(", ", 1)[-1], "" if isinstance(found, dict) else f", found {_show(found)}"
    if kind == "string_pattern_mismatch":
        return path, f"expected text of the form {context['pattern']}", f", found {_show(found)}"
    if kind in _PLAIN_WORDS:
        return path, _PLAIN_WORDS[kind], f", found {_show(found)}"
    message = str(detail["msg"]).replace("Input should", "should", 1)
    message = message.replace("should be ", "expected ", 1).replace("should have ", "expected ", 1)
    return path, message[:1].lower() + message[1:], f", found {_show(found)}"


def _unknown_key(path: KeyPath, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    key = str(path[-1])
    section = _annotation_at(model, values, path[:-1])
    allowed = _fields(section, _value_at(values, path[:-1]))
    owners = _owners(section, key)
    if owners:
        return f"; it is an option of {', '.join(owners)}: remove it. Allowed here: {', '.join(allowed)}"
    guess = did_you_mean(key, allowed)
    if not guess:
        elsewhere = [at for at in _all_paths(model) if at.rsplit(".", 1)[-1] == key]
        guess = f"; did you mean '{elsewhere[0]}'?" if elsewhere else ""
    return f"{guess or '; remove it.'} Allowed here: {', '.join(allowed)}"


def _owners(section: Any, key: str) -> list[str]:  # noqa: ANN401 - a type form
    """Names of the alternatives of ``section`` that do have the option ``key`` (another method's option)."""
    fields = [member.model_fields for member in _models(section, None) if key in member.model_fields]
    tags = [field[tag].annotation for field in fields for tag in ("name", "format") if tag in field]
    return [str(choice) for tag in tags if get_origin(tag) is Literal for choice in get_args(tag)]


def _missing_key(path: KeyPath, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    section = _annotation_at(model, values, path[:-1])
    for member in _models(section, _value_at(values, path[:-1])):
        field = member.model_fields.get(str(path[-1]))
        if field is not None and field.description:
            return f"; {' '.join(field.description.split())}"
    return "; it has no default"


def _show(value: object) -> str:
    """``value`` as a person would name it, short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section with " + ", ".join(map(str, value)) if value else "an empty section"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_of(allowed: Sequence[str]) -> str:
    return "one of " + ", ".join(allowed) if len(allowed) > 1 else "".join(allowed)


def _literals(text: str) -> list[str]:
    """Pydantic's ``'a', 'b' or 'c'`` as a list."""
    return [part.strip().strip("'") for part in text.replace(" or ", ", ").split(",")]


# ---------------------------------------------------------------------------------------------------------------------
# Which model stands at a path
# ---------------------------------------------------------------------------------------------------------------------


def _members(annotation: Any) -> list[Any]:  # noqa: ANN401 - a type form
    """The alternatives of ``annotation`` without Annotated, unions and None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) else [annotation]


def _models(annotation: Any, value: object) -> list[type[BaseModel]]:  # noqa: ANN401 - a type form
    """The model classes that may describe ``value``: those whose literal fields do not contradict it."""
    models = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]
    if not isinstance(value, dict):
        return models
    return [member for member in models if _fits(member, value)] or models


def _fits(model: type[BaseModel], value: Mapping[str, Any]) -> bool:
    """Whether the discriminators that ``value`` has are the model's own."""
    for tag in ("name", "format"):
        field = model.model_fields.get(tag)
        if field is not None and get_origin(field.annotation) is Literal and tag in value:
            return value[tag] in get_args(field.annotation)
    return True


def _annotation_at(model: type[BaseModel], values: Mapping[str, Any], path: KeyPath) -> Any:  # noqa: ANN401 - a type form
    """The annotation of the value at ``path``."""
    annotation: Any = model
    here: Any = values
    for key in path:
        inner = [m.model_fields[str(key)].annotation for m in _models(annotation, here) if str(key) in m.model_fields]
        containers = [get_args(m)[-1] for m in _members(annotation) if get_args(m) and get_args(m)[-1] is not Ellipsis]
        annotation = inner[0] if inner else containers[0] if containers else None
        here = _value_at(here, (key,))
    return annotation


def _value_at(values: Any, path: KeyPath) -> Any:  # noqa: ANN401 - raw YAML
    for key in path:
        values = values[key] if _has(values, key) else None
    return values


def _has(container: Any, key: str | int) -> bool:  # noqa: ANN401 - raw YAML
    """Whether ``key`` is a key of this section or a position of this list."""
    if isinstance(container, dict):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)


def _fields(annotation: Any, value: object) -> list[str]:  # noqa: ANN401 - a type form
    return list(dict.fromkeys(name for member in _models(annotation, value) for name in member.model_fields))


def _tags(annotation: Any, key: str) -> list[str]:  # noqa: ANN401 - a type form
    """The values that the discriminator ``key`` may have."""
    fields = [member.model_fields[key] for member in _models(annotation, None) if key in member.model_fields]
    return [str(choice) for field in fields for choice in get_args(field.annotation)]


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every field of ``model`` and of the models inside it."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for member in _models(field.annotation, None):
            yield from _all_paths(member, f"{prefix}{name}.")
