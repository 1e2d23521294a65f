"""The numba CRF: its lattice is the one of the definition, its bytes are the same, its code is compiled once."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from stages.ops.crf.dense_crf import CrfConfig, CrfNumbers, open_crf, probability_unary
from stages.ops.crf.numba_backend import NumbaCrf
from stages.ops.crf.numba_lattice import build_lattice

NUMBERS = CrfConfig(preset="irn").numbers()
needs_native = pytest.mark.skipif(importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed")


def _scene(seed: int, num_labels: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image of smooth colours, and energies that go with them a little."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([np.sin(rows / 9 + phase) + np.cos(columns / 7 - phase) for phase in rng.uniform(0, 6, 3)], -1)
    image = np.clip(128 + 55 * waves + rng.normal(0, 5, waves.shape), 0, 255).astype(np.uint8)
    logits = (
        rng.normal(0, 1, (num_labels, height, width)) + waves[..., 0] * np.linspace(-1, 1, num_labels)[:, None, None]
    )
    shares = np.exp(logits)
    return image, probability_unary((shares / shares.sum(0)).astype(np.float32))


@needs_native
@pytest.mark.parametrize(("num_labels", "size"), [(2, (75, 130)), (3, (128, 64)), (5, (61, 3)), (21, (50, 70))])
def test_it_equals_pydensecrf_on_images_of_any_size(num_labels: int, size: tuple[int, int]) -> None:
    image, unary = _scene(num_labels, num_labels, *size)
    ours, theirs = (open_crf(image, num_labels, CrfConfig(backend=b)).infer(unary, 10) for b in ("numba", "pydensecrf"))
    assert np.abs(ours - theirs).max() <= 1e-3
    assert (ours.argmax(0) == theirs.argmax(0)).mean() >= 0.999
    assert (ours.argmax(0) != unary.argmin(0)).mean() > 0.05, "the scene must give the CRF something to do"


@needs_native
@pytest.mark.parametrize(
    "numbers",
    [
        CrfNumbers(10, 0.1, 0.1, 3, 0.1),  # the least widths: no vertex is shared, the vertices' numbers wrap
        CrfNumbers(0, 50, 5, 3, 3),
        CrfNumbers(10, 50, 5, 0, 3),
        CrfNumbers(4, 10_000, 1000, 3, 10_000),
    ],
)
def test_it_equals_pydensecrf_with_extreme_numbers(numbers: CrfNumbers) -> None:
    from stages.ops.crf.native import PydenseCrf

    image, unary = _scene(1, 3, 60, 80)
    ours = NumbaCrf([image], numbers).infer([unary], 5)[0]
    theirs = PydenseCrf([image], [3], numbers).infer([unary], 5)[0]
    assert np.abs(ours - theirs).max() <= 1e-3


@pytest.mark.parametrize("d", [2, 5])
def test_splatting_and_slicing_a_constant_is_the_identity_of_the_normalisation(d: int) -> None:
    """The symmetric normalisation D^-1/2 K D^-1/2 has eigenvalue 1 for the vector D^1/2."""
    from stages.ops.crf.numba_steps import blur

    features = np.random.default_rng(0).normal(0, 1, (d, 500)).astype(np.float32)
    corners, weights, neighbours = build_lattice(features, 2.0)
    num_vertices = neighbours.shape[1]
    assert d + 1 < num_vertices < 500 * (d + 1)
    # the normalisation is folded into the weights: barycentric ones sum to 1, these to the factor
    root = 1 / weights.sum(axis=1)
    rows = np.zeros((num_vertices + 1, 4), np.float32)
    np.add.at(rows, corners, (weights * root[:, None])[:, :, None])
    blurred, _ = blur(rows, np.zeros_like(rows), neighbours)
    sliced = (weights[:, :, None] * blurred[corners]).sum(axis=1)
    np.testing.assert_allclose(sliced, np.repeat(2 * root[:, None], 4, axis=1), rtol=1e-4)


def test_neighbours_are_mutual_and_one_step_apart() -> None:
    features = np.random.default_rng(0).normal(0, 1, (5, 400)).astype(np.float32)
    _, _, neighbours = build_lattice(features, 1.0)
    num_vertices = neighbours.shape[1]
    found = 0
    for axis in neighbours.astype(np.int64):
        vertices = np.flatnonzero(axis[:, 0] < num_vertices)
        np.testing.assert_array_equal(axis[axis[vertices, 0], 1], vertices)
        assert (np.diff(axis[vertices, 0]) > 0).all(), "a blur walks through memory in one direction"
        found += len(vertices)
    assert found > num_vertices


def test_the_same_input_gives_the_same_bytes_whatever_went_before() -> None:
    image, unary = _scene(0, 3, 70, 90)
    first = NumbaCrf([image], NUMBERS).infer([unary], 10)[0]
    other = NumbaCrf([image[::-1]], NUMBERS)
    other.infer([unary], 3)
    again = NumbaCrf([image[::-1], image], NUMBERS).infer([unary, unary], 10)[1]
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.infer([unary], 10)[0].tobytes()


_INFER = """if True:
    import numpy as np, sys
    from stages.ops.crf.numba_backend import NumbaCrf
    from stages.ops.crf.numba_lattice import _find_simplices
    from stages.ops.crf.numba_steps import blur, sweep
    from stages.ops.crf.presets import PRESETS
    image = np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)
    crf = NumbaCrf([image], PRESETS["irn"])
    marginals = crf.infer([np.linspace(0, 1, 144, dtype=np.float32).reshape(2, 8, 9)], 2)[0]
    assert "torch" not in sys.modules
    misses = [sum(f.stats.cache_misses.values()) for f in (_find_simplices, blur, sweep)]
    print(sum(misses), repr(float(marginals.sum(axis=(1, 2))[0])))
"""


def _infer_in_a_process(**environment: str) -> tuple[int, str]:
    """Number of compiled functions, and a number of the result."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _INFER],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    misses, result = done.stdout.split()
    return int(misses), result


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    first = _infer_in_a_process(NUMBA_CACHE_DIR=str(tmp_path))
    second = _infer_in_a_process(NUMBA_CACHE_DIR=str(tmp_path))
    assert first[0] >= 3, "an empty cache has nothing to load"
    assert second == (0, first[1])


def test_without_a_folder_for_its_cache_a_function_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import CacheImpl

    from stages.ops.crf.numba_compiled import compiled

    def double(number: int) -> int:
        return 2 * number

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert compiled(double)(21) == 42
