"""Read a YAML file into a pydantic model and report every problem at once, each at its dotted path.

Reads one YAML file and overrides of the form ``a.b=value``; writes nothing; imports neither torch nor Prefect.
YAML here is YAML 1.1 without tags, with ``1e-4`` as a number, without timestamps, and with duplicate keys refused.
Values are checked strictly: ``"5"`` is text and ``true`` is no number, wherever a number is asked for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.model_errors import KeyPath, dotted, explain, loose_values
from stages.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT = re.compile(
    r"""^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
         |\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's floats (1e-4) and without timestamps."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rsplit(":", 1)[-1] not in {"float", "timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass
class Document:
    """A mapping read from YAML, where each of its values stands, and what was wrong with its form."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Path to ``file:line`` or ``--set a.b=c``."""
    problems: list[str] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where ``path``, or else the nearest section around it, was written; empty when nowhere."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return ""


def load_model(model: type[Model], path: Path, overrides: Sequence[str] = ()) -> Model:
    """Read ``path``, apply ``overrides`` in order and validate the result against ``model``.

    Args:
        model: The class that describes the file.
        path: A YAML file whose top level is a mapping.
        overrides: ``dotted.path=value``; the value is YAML, so ``a=1e-4``, ``a=[1, 2]`` and ``a={name: x}`` work.

    Raises:
        ConfigError: with all problems: form, duplicate and unknown keys, wrong types, ranges and names.
    """
    return _build(model, read_document(path), str(path), overrides)


def load_values(model: type[Model], values: Mapping[str, Any], overrides: Sequence[str], source: str) -> Model:
    """As ``load_model``, from values that are read already.

    Args:
        model: The class that describes them.
        values: Plain values as JSON has them.
        overrides: As for ``load_model``.
        source: What the values are called in errors.

    Raises:
        ConfigError: with all problems.
    """
    return _build(model, Document(values=copy.deepcopy(dict(values))), source, overrides)


def _build(model: type[Model], document: Document, source: str, overrides: Sequence[str]) -> Model:
    for override in overrides:
        try:
            apply_override(document, override)
        except ConfigError as error:
            document.problems.append(error.message)
    problems = list(document.problems)
    found = dict(loose_values(model, document.values))
    validated: Model | None = None
    try:
        validated = model.model_validate(document.values)
    except ValidationError as error:
        found = dict(explain(error, model, document.values)) | found
    problems += [_located(text, at, document) for at, text in found.items()]
    if problems or validated is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{source} is not a valid config: {count}", problems)
    return validated


def read_document(path: Path) -> Document:
    """Read the YAML file ``path``; problems of its form are kept in the document.

    Raises:
        ConfigError: the file is missing, unreadable, no YAML, or no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable as UTF-8 text ({error}); name a YAML config") from error
    document = Document()
    values = _parse(text, str(path), document)
    if not isinstance(values, dict):
        found = "an empty file" if values is None else f"{type(values).__name__} at the top level"
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level, found {found}")
    document.values = values
    return document


def apply_override(document: Document, override: str) -> None:
    """Put one ``a.b=value`` into ``document``; sections that do not exist yet are made.

    Raises:
        ConfigError: ``override`` has no ``=``, an empty key, a value that is no YAML, or goes through a plain value.
    """
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected dotted.path=value, for instance make_masks.crf.iterations=5")
    form = Document()
    value = _parse(text, f"--set {override}", form)
    document.problems.extend(form.problems)
    section: dict[str, Any] = document.values
    for depth, key in enumerate(keys[:-1], start=1):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {dotted(keys[:depth])} is the value {section!r}, not a section")
    section[keys[-1]] = value
    document.origins = {at: text for at, text in document.origins.items() if at[: len(keys)] != keys}
    document.origins[keys] = f"--set {override}"


def _parse(text: str, source: str, document: Document) -> object:
    """The plain value of ``text``; lines and duplicate keys go to ``document``."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else _Reader(loader, source, document).value(node, ())
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = source if mark is None or source.startswith("--set") else f"{source}:{mark.line + 1}"
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}: not valid YAML: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: an anchor contains itself, or sections are nested too deeply") from error


@dataclass(frozen=True)
class _Reader:
    """Turns YAML nodes into plain values and remembers the line of each."""

    loader: _Loader
    source: str
    document: Document

    def value(self, node: yaml.Node, path: KeyPath) -> object:
        if not self.source.startswith("--set"):
            self.document.origins.setdefault(path, f"{self.source}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, number)) for number, item in enumerate(node.value)]
        return self.loader.construct_object(node, deep=True)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        self._report_duplicates(node, path)
        self.loader.flatten_mapping(node)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._problem(key_node, f"{dotted((*path, str(key)))}: expected text as a key, found {key!r}; quote it")
            values[str(key)] = self.value(value_node, (*path, str(key)))
        return values

    def _report_duplicates(self, node: yaml.MappingNode, path: KeyPath) -> None:
        lines: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG or not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                at = dotted((*path, key_node.value))
                self._problem(key_node, f"{at}: written twice, first on line {lines[key_node.value]}; keep one")
            lines.setdefault(key_node.value, line)

    def _problem(self, node: yaml.Node, text: str) -> None:
        where = self.source if self.source.startswith("--set") else f"{self.source}:{node.start_mark.line + 1}"
        self.document.problems.append(f"{text}  ({where})")


def _located(text: str, path: KeyPath, document: Document) -> str:
    where = document.origin(path)
    return f"{text}  ({where})" if where else text
