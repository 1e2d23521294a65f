"""Stages that do nothing but files: the runner, the child and the store are tested with them, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent / "engine")
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture(autouse=True)
def _children_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", HERE)


@pytest.fixture(autouse=True)
def _auto_means_the_same_crf_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a CUDA device ``auto`` means torch, and keys and warnings say so."""
    monkeypatch.setattr("stages.ops.crf.dense_crf.has_cuda", lambda: False)
