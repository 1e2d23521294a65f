"""``wsss.run``: the whole pipeline from Python, with the cache and the process of its own for every stage."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from pipeline.engine.outcomes import RunOutcome


def run(
    config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    artifacts: str | os.PathLike[str] = "artifacts",
    from_: str | None = None,
    until: str | None = None,
    force: Collection[str] = (),
    quiet: bool = False,
    **overrides: Any,  # noqa: ANN401 - of any field
) -> RunOutcome:
    """Run a config to its mIoU; what is in the store is reused.

    Args:
        config: A YAML file, the name of a shipped config or of a run, or the values.
        artifacts: The artifact store: a folder or a URL.
        from_: First stage to run; the stages before it must be cached.
        until: Last stage to run.
        force: Stages to rebuild, each with all after it.
        quiet: Print nothing.
        overrides: Values of the config by section: ``seed=1``, ``make_masks={"threshold": 0.2}``.  A mapping changes
            what it names and leaves the rest of its section.

    Returns:
        The run: ``.metrics``, and ``.stages`` with key, path and metrics of each.

    Raises:
        WsssError: as ``wsss run`` says it; the message has every problem.
    """
    from pipeline.cli.console import ConsoleListener, make_console
    from pipeline.config.run_config import RunConfig
    from pipeline.config.yaml_models import load_values
    from pipeline.engine.records import load_named
    from pipeline.engine.run import Run
    from pipeline.engine.stage_table import TABLE
    from pipeline.store.artifacts import open_store

    words = [f"{name}={json.dumps(value, default=str)}" for name, value in _flatten(overrides)]
    if isinstance(config, Mapping):
        described = load_values(RunConfig, config, words, "the config")
    else:
        described = load_named(os.fspath(config), words, str(artifacts))
    listener = None if quiet else ConsoleListener(make_console(is_json=False), TABLE.names)
    try:
        bound = Run(described, open_store(str(artifacts)), listener=listener, invocation=f"{config}")
        return bound.run_pipeline(from_=from_, until=until, force=force)
    finally:
        if listener is not None:
            listener.close()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names of the values in nested mappings; an empty mapping is a value."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flatten(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found
