"""Read a YAML file into a pydantic model and report every problem at once, each at its dotted path.

Reads one YAML file and overrides of the form ``a.b=value``; writes nothing; imports neither torch nor Prefect.
YAML here has no tags and no timestamps, and duplicate keys are refused.  What versions of YAML read in different ways
is text: only decimal numbers without leading zeros, ``_`` and ``:`` are numbers, and of words only ``true`` and
``false`` are truths.  So ``010``, ``0o10`` and ``1:30`` are refused where a number is asked for; ``yes``, ``no``,
``on`` and ``off`` are words, and truths where only those are asked for.
Anchors are counted as what they stand for before anything is built from them, so that no document is larger than it
looks.  In a value that is a path, ``~`` and ``$VAR`` mean what they mean in a shell.
Values are checked strictly: ``"5"`` is text and ``true`` is no number, wherever a number is asked for.
A problem names the path, the found value, what is allowed, and the nearest valid spelling.
"""

from __future__ import annotations

import copy
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from stages.contracts import expand_path, option_texts
from stages.errors import ConfigError, InputError

KeyPath = tuple[str | int, ...]
"""Keys and list positions from the top level to one value."""
Raw = Any
"""A value as YAML gives it."""
Form = Any
"""An annotation: a class, a union, a list of something."""
Model = TypeVar("Model", bound=BaseModel)

_MERGE_TAG = "tag:yaml.org,2002:merge"
_TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+
         |\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_TRUTH_WORDS = {"yes": True, "on": True, "no": False, "off": False}
"""What YAML 1.1 takes for truths everywhere."""

_MAX_CHARACTERS = 100_000
"""The shipped configs have 2,000.  All limits together keep the worst document under a second."""
_MAX_VALUES = 5_000
"""Values of a file and its overrides, each anchor counted as often as it is used."""
_MAX_DEPTH = 32
"""Sections and lists inside each other."""
_MAX_DIGITS = 100
"""Of a whole number."""
_SHOWN_CHARACTERS = 100
"""Of an override, a key or a tag in a message."""


class _Loader(yaml.SafeLoader):
    """SafeLoader without tags, with the numbers and truths that all versions of YAML share, and limits to its size."""

    def __init__(self, text: str, num_values: int = 0) -> None:
        """Read ``text``; ``num_values`` were composed before."""
        super().__init__(text)
        self.num_values = num_values
        self._depth = 0
        self._measures: dict[int, tuple[int, int]] = {}
        """Of each node that is whole, by id: the number of values in it, and how deep they go."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next node; an alias counts as all that its anchor holds.

        Raises:
            ComposerError: a tag, an anchor inside itself, or more or deeper values than any config has.
        """
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._measures:
                raise ComposerError(None, None, "an anchor contains itself", event.start_mark)
            num_inside, depth_inside = self._measures[id(node)]
            self._check(event, num_inside, depth_inside)
            return node
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tags are not read; remove {_printable(tag)} and quote the value where it is text"
            raise ComposerError(None, None, problem, event.start_mark)
        before = self.num_values
        self._check(event, 1, 1)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        inside = (item for child in children for item in (child if isinstance(child, tuple) else (child,)))
        depth = 1 + max((self._measures[id(item)][1] for item in inside), default=0)
        self._measures[id(node)] = self.num_values - before, depth
        return node

    def _check(self, event: yaml.Event, num_values: int, depth: int) -> None:
        self.num_values += num_values
        problem = None
        if self.num_values > _MAX_VALUES:
            problem = (
                f"more than {_MAX_VALUES:,} values, each anchor counted as often as it is used; shorten the config"
            )
        elif self._depth + depth > _MAX_DEPTH:
            problem = f"more than {_MAX_DEPTH} sections or lists inside each other; make it flatter"
        if problem is not None:
            raise ComposerError(None, None, problem, event.start_mark)

    def construct_number(self, node: yaml.ScalarNode) -> int:
        """A whole number of at most ``_MAX_DIGITS`` digits."""
        if len(node.value) > _MAX_DIGITS:
            problem = f"a whole number of {len(node.value):,} characters; write one of at most {_MAX_DIGITS}"
            raise ConstructorError(None, None, problem, node.start_mark)
        return int(node.value)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] in {"null", "merge"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _TRUTH, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)


def load_model(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read the YAML file ``path``, apply ``overrides`` in order and validate the result against ``model``.

    The file's top level is a mapping.  An override is ``dotted.path=value``; the value is YAML, so ``a=1e-4``,
    ``a=[1, 2]`` and ``a={name: x}`` work.

    Raises:
        ConfigError: with all problems: form, duplicate and unknown keys, wrong types, ranges and names.
    """
    document = _Document()
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable as UTF-8 text ({error}); name a YAML config") from error
    values = document.parse(text, str(path))
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"{type(values).__name__} at the top level"
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level, found {found}")
    document.values = values
    return document.build(model, overrides, str(path))


def load_values(model: type[Model], values: Mapping[str, Any], overrides: Sequence[str], source: str) -> Model:
    """As ``load_model``, from plain values as JSON has them, which errors call ``source``."""
    return _Document(copy.deepcopy(dict(values))).build(model, overrides, source)


@dataclass
class _Document:
    """A mapping read from YAML, where each of its values stands, and what was wrong with its form."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Path to ``file:line`` or ``--set a.b=c``."""
    problems: list[str] = field(default_factory=list)
    written: dict[KeyPath, str] = field(default_factory=dict)
    """Path of each true, false and number to its text."""
    num_values: int = 0
    """Of the file and the overrides."""

    def build(self, model: type[Model], overrides: Sequence[str], source: str) -> Model:
        for text in overrides:
            try:
                self.override(text)
            except ConfigError as error:
                self.problems.append(error.message)
        self._read_as_meant(model)
        found = dict(_loose_values(model, self.values)) | dict(_expand_paths(model, self.values))
        validated: Model | None = None
        try:
            validated = model.model_validate(self.values)
        except ValidationError as error:
            found = dict(explain(error, model, self.values)) | found
        problems = list(self.problems)
        for path, text in found.items():
            # where the value, or else the nearest section around it, was written
            places = [self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins]
            problems.append(f"{text}  ({places[0]})" if places else text)
        if problems or validated is None:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise ConfigError(f"{source} is not a valid config: {count}", problems)
        return validated

    def _read_as_meant(self, model: type[BaseModel]) -> None:
        """Take words for words and truths for truths, by what the model asks for.

        An item of a list of texts is as it is written (``[true, 1.50]`` are names there), and a number where a text or
        a path is wanted too; ``yes``, ``no``, ``on`` and ``off`` are truths where nothing else is wanted.
        """
        for path, value in list(_leaves(self.values, ())):
            *_, place = path
            around = _value_at(self.values, path[:-1])
            kinds = set(_members(_annotation_at(model, self.values, path)))
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if kinds == {bool} and isinstance(value, str):
                around[place] = _TRUTH_WORDS.get(value.lower(), value)
            elif kinds in ({str}, {Path}) and (is_number or (isinstance(value, bool) and isinstance(place, int))):
                written = str(value) if isinstance(value, int) and is_number else value
                around[place] = self.written.get(path, written)

    def override(self, override: str) -> None:
        """Put in one ``a.b=value``; sections that do not exist yet are made."""
        name, equals, text = override.partition("=")
        keys = tuple(name.strip().split("."))
        source = f"--set {_printable(override)}"
        if not equals or not all(keys) or len(keys) > _MAX_DEPTH:
            raise ConfigError(f"{source}: expected dotted.path=value, for instance make_masks.crf.iterations=5")
        self.written = {at: word for at, word in self.written.items() if at[: len(keys)] != keys}
        value = self.parse(text, source, keys)
        section: dict[str, Any] = self.values
        for depth, key in enumerate(keys[:-1], start=1):
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"{source}: {dotted(keys[:depth])} is the value {section!r}, not a section")
        section[keys[-1]] = value
        self.origins = {at: text for at, text in self.origins.items() if at[: len(keys)] != keys} | {keys: source}

    def parse(self, text: str, source: str, path: KeyPath = ()) -> object:
        """The plain value of ``text``, which will stand at ``path``.

        The lines of a file's values are kept, and what is wrong with its form.
        """
        if len(text) > _MAX_CHARACTERS:
            raise ConfigError(
                f"{source}: expected a config of at most {_MAX_CHARACTERS:,} characters; name a YAML config"
            )
        try:
            loader = _Loader(text, self.num_values)
            node = loader.get_single_node()
            self.num_values = loader.num_values
            return None if node is None else self._plain(loader, node, path, source)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = source if mark is None else _place(source, mark)
            reason = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise ConfigError(f"{where}: not valid YAML: {_printable(reason)}") from error

    def _plain(self, loader: _Loader, node: yaml.Node, path: KeyPath, source: str) -> object:
        if not source.startswith("--set"):
            self.origins.setdefault(path, _place(source, node.start_mark))
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*path, number), source) for number, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            value = loader.construct_object(node, deep=True)
            if isinstance(value, bool | int | float):
                self.written[path] = str(node.value)
            return value
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE_TAG:
                key = key_node.value
                if key in lines:
                    text = f"{dotted((*path, key))}: written twice, first on line {lines[key]}; keep one"
                    self.problems.append(f"{text}  ({_place(source, key_node.start_mark)})")
                lines.setdefault(key, key_node.start_mark.line + 1)
        loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            at = (*path, str(key))
            if not isinstance(key, str):
                text = f"{dotted(at)}: expected text as a key, found {key!r}; quote it"
                self.problems.append(f"{text}  ({_place(source, key_node.start_mark)})")
            values[str(key)] = self._plain(loader, value_node, at, source)
        return values


def _place(source: str, mark: yaml.Mark) -> str:
    return source if source.startswith("--set") else f"{source}:{mark.line + 1}"


_PLAIN_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "expected a section"),
    **dict.fromkeys(("tuple_type", "list_type"), "expected a list"),
    "path_type": "expected a path",
    "string_type": "expected text",
    **dict.fromkeys(("int_from_float", "int_type"), "expected a whole number"),
    "float_type": "expected a number",
    "bool_type": "expected true or false",
}
"""What pydantic's error types mean to somebody who writes YAML."""


def dotted(path: KeyPath) -> str:
    """``("a", "b", 2)`` as ``a.b[2]``; the top level has a name of its own."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{_printable(key)}" for key in path)
    return text.removeprefix(".") or "top level"


def _printable(text: str) -> str:
    """``text`` for a message: short, and with control characters spelled out, which a terminal would obey."""
    text = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def did_you_mean(word: object, allowed: Sequence[str]) -> str:
    """``; did you mean 'x'?`` or nothing; case and ``-`` against ``_`` do not count."""
    folded = {name.lower().replace("-", "_"): name for name in reversed(allowed)}
    word = word.lower().replace("-", "_") if isinstance(word, str) else ""
    found = difflib.get_close_matches(word, folded, n=1, cutoff=0.6)
    return f"; did you mean '{folded[found[0]]}'?" if found else ""


def explain(error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Each problem that validating ``values`` against ``model`` raised once, as (path, line of text), in its order."""
    grouped: dict[KeyPath, list[tuple[str, str]]] = {}
    for detail in error.errors(include_url=False):
        # pydantic puts union tags and validator names between the keys
        path: KeyPath = ()
        for key in detail["loc"]:
            path = (*path, key) if _has(_value_at(values, path), key) else path
        if detail["type"] == "missing" and not _has(_value_at(values, path), detail["loc"][-1]):
            path = (*path, detail["loc"][-1])
        path, expected, found = _sentence(detail, path, model, values)
        parts = grouped.setdefault(path, [])
        if (expected, found) not in parts:
            parts.append((expected, found))
    for path, parts in grouped.items():
        # a value that fits no branch of a plain union gives one error per branch: one line, joined by "or"
        expectations = " or ".join(dict.fromkeys(expected for expected, _ in parts))
        yield path, f"{dotted(path)}: {expectations}{parts[-1][1]}"


_STARTS_AS_NUMBER = re.compile(r"\s*[-+]?\.?\d").match
_PLAIN_NUMBER = "write it in plain decimal digits, without leading zeros, '_', ':' or a prefix such as 0x"
"""Programs read 010 as 10 or as 8, and 1:30 as a text or as 90."""


def _loose_values(model: type[BaseModel], values: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Problems that pydantic lets pass: text or true for a number, a number for true or false, nan and infinity.

    (Its strict mode refuses them too, but refuses lists for tuples behind any ``mode="before"`` validator.)
    """
    for path, value in _leaves(values, ()):
        if isinstance(value, float) and not math.isfinite(value):
            yield path, f"{dotted(path)}: expected a finite number, found {value}"
            continue
        kinds = set(_members(_annotation_at(model, values, path)))
        if isinstance(value, str) and kinds & {int, float} and not kinds & {str, Path} and _STARTS_AS_NUMBER(value):
            remedy = "write it without quotes" if _INT.match(value) or _FLOAT.match(value) else _PLAIN_NUMBER
            yield path, f"{dotted(path)}: expected a number, found {_show(value)}; {remedy}"
            continue
        if not kinds or not kinds <= {int, float, bool}:
            continue
        is_truth = isinstance(value, bool)
        if isinstance(value, str) or (is_truth and bool not in kinds) or (not is_truth and kinds == {bool}):
            wanted = "true or false" if kinds == {bool} else "a number"
            yield path, f"{dotted(path)}: expected {wanted}, found {_show(value)}"


def _expand_paths(model: type[BaseModel], values: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Put the meant path in place of each path of ``values``; where it means none, say so."""
    for path, value in list(_leaves(values, ())):
        if isinstance(value, str) and set(_members(_annotation_at(model, values, path))) == {Path}:
            try:
                _value_at(values, path[:-1])[path[-1]] = str(expand_path(value))
            except InputError as error:
                yield path, f"{dotted(path)}: {error.message}"


def _leaves(value: Raw, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    """Every value that is neither a section nor a list nor null, with its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))
    elif value is not None:
        yield path, value


def _sentence(
    detail: ErrorDetails, path: KeyPath, model: type[BaseModel], values: Mapping[str, Any]
) -> tuple[KeyPath, str, str]:
    """The problem's path, what was expected, and what was found with the remedy."""
    kind, context, found = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return path, "unknown key", _unknown_key(path, model, values)
    if kind == "missing":
        members = _models(_annotation_at(model, values, path[:-1]), _value_at(values, path[:-1]))
        texts = [" ".join(text.split()) for member in members if (text := option_texts(member).get(str(path[-1])))]
        return path, "missing", f"; {texts[0] if texts else 'it has no default'}"
    if kind in {"literal_error", "union_tag_invalid"}:
        if kind == "union_tag_invalid":
            path, found = (*path, context["discriminator"].strip("'")), context["tag"]
        # 'a', 'b' or 'c'
        texts = context["expected" if kind == "literal_error" else "expected_tags"].replace(" or ", ", ").split(",")
        allowed = [text.strip().strip("'") for text in texts]
        return path, f"expected {_one_of(allowed)}", f", found {_show(found)}{did_you_mean(found, allowed)}"
    if kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        members = _models(_annotation_at(model, values, path), None)
        tags = [get_args(member.model_fields[key].annotation) for member in members if key in member.model_fields]
        return (*path, key), "missing", f"; expected {_one_of([str(tag) for choices in tags for tag in choices])}"
    if kind in {"value_error", "assertion_error"}:
        return path, str(detail["msg"]).split(", ", 1)[-1], "" if isinstance(found, dict) else f", found {_show(found)}"
    if kind == "string_pattern_mismatch":
        return path, f"expected text of the form {context['pattern']}", f", found {_show(found)}"
    if kind in _PLAIN_WORDS:
        is_bare = kind == "string_type" and not isinstance(found, dict | list)
        remedy = "; write it in quotes if it is a word" if is_bare and isinstance(detail["loc"][-1], int) else ""
        return path, _PLAIN_WORDS[kind], f", found {_show(found)}{remedy}"
    message = str(detail["msg"]).replace("Input should", "should", 1)
    message = message.replace("should be ", "expected ", 1).replace("should have ", "expected ", 1)
    return path, message[:1].lower() + message[1:], f", found {_show(found)}"


def _unknown_key(path: KeyPath, model: type[BaseModel], values: Mapping[str, Any]) -> str:
    key = str(path[-1])
    section = _annotation_at(model, values, path[:-1])
    allowed = list(dict.fromkeys(n for m in _models(section, _value_at(values, path[:-1])) for n in m.model_fields))
    # other alternatives of this section that have the option, such as another method
    others = [member.model_fields for member in _models(section, None) if key in member.model_fields]
    tags = [fields[tag].annotation for fields in others for tag in ("name", "format") if tag in fields]
    owners = [str(choice) for tag in tags if get_origin(tag) is Literal for choice in get_args(tag)]
    hint = f"; it is an option of {', '.join(owners)}: remove it." if owners else did_you_mean(key, allowed)
    if not hint:
        elsewhere = [at for at in _all_paths(model) if at.rsplit(".", 1)[-1] == key]
        hint = f"; did you mean '{elsewhere[0]}'?" if elsewhere else "; remove it."
    return f"{hint} Allowed here: {', '.join(allowed)}"


def _show(value: object) -> str:
    """``value`` as a person would name it, short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section with " + _printable(", ".join(map(str, value))) if value else "an empty section"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _one_of(allowed: Sequence[str]) -> str:
    return "one of " + ", ".join(allowed) if len(allowed) > 1 else "".join(allowed)


def _members(annotation: Form) -> list[Form]:
    """The alternatives of ``annotation`` without Annotated, unions and None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) else [annotation]


def _models(annotation: Form, value: Raw) -> list[type[BaseModel]]:
    """The model classes that may describe ``value``: those whose literal fields do not contradict it."""
    models = [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)]
    fitting = []
    for model in models if isinstance(value, dict) else ():
        fields = {tag: model.model_fields[tag].annotation for tag in ("name", "format") if tag in model.model_fields}
        tags = [tag for tag, kind in fields.items() if get_origin(kind) is Literal and tag in value]
        if all(value[tag] in get_args(fields[tag]) for tag in tags):
            fitting.append(model)
    return fitting or models


def _annotation_at(model: type[BaseModel], values: Mapping[str, Any], path: KeyPath) -> Form:
    """The annotation of the value at ``path``."""
    annotation: Form = model
    here: Raw = values
    for key in path:
        inner = [m.model_fields[str(key)].annotation for m in _models(annotation, here) if str(key) in m.model_fields]
        arguments = [arguments for m in _members(annotation) if (arguments := get_args(m))]
        containers = [each[0] if each[-1] is Ellipsis else each[-1] for each in arguments]
        annotation = inner[0] if inner else containers[0] if containers else None
        here = _value_at(here, (key,))
    return annotation


def _value_at(values: Raw, path: KeyPath) -> Raw:
    for key in path:
        values = values[key] if _has(values, key) else None
    return values


def _has(container: Raw, key: str | int) -> bool:
    """Whether ``key`` is a key of this section or a position of this list."""
    if isinstance(container, dict):
        return key in container
    return isinstance(container, list) and isinstance(key, int) and key < len(container)


def _all_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted path of every field of ``model`` and of the models inside it."""
    for name, option in model.model_fields.items():
        yield prefix + name
        for member in _models(option.annotation, None):
            yield from _all_paths(member, f"{prefix}{name}.")
