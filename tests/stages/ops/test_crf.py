"""The CRF backends agree, and unaries, presets and backend choice do what they say."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from stages.errors import ConfigError
from stages.ops.crf import dense_crf as crf
from stages.ops.crf.dense_crf import (
    PRESETS,
    CrfConfig,
    CrfPreset,
    dense_crf,
    label_unary,
    open_crf,
    probability_unary,
    resolve_crf_backend,
)

HAS_NATIVE = importlib.util.find_spec("pydensecrf") is not None
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="pydensecrf2 is not installed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny images gain nothing from threads, and lose where cores are shared."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _scene(num_labels: int, height: int = 40, width: int = 56) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image of coloured bands and blurred, noisy probabilities of the bands."""
    rng = np.random.default_rng(num_labels)
    band = np.arange(width) * num_labels // width
    truth = np.broadcast_to(band, (height, width))
    colours = rng.integers(0, 256, (num_labels, 3))
    image = np.clip(colours[truth] + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    logits = rng.normal(0, 1, (num_labels, height, width)) + 1.5 * (truth == np.arange(num_labels)[:, None, None])
    probabilities = np.exp(logits) / np.exp(logits).sum(0)
    return image, probabilities.astype(np.float32)


@needs_native
@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize(
    ("num_labels", "preset"), [(2, "irn"), (3, "sec"), (3, "toco"), (7, "deeplab_v2_resnet101"), (21, "irn")]
)
def test_our_mean_fields_equal_pydensecrfs(num_labels: int, preset: CrfPreset, backend: Any) -> None:
    image, probabilities = _scene(num_labels)
    native = dense_crf(image, probabilities, CrfConfig(preset=preset, backend="pydensecrf"))
    ours = dense_crf(image, probabilities, CrfConfig(preset=preset, backend=backend))
    assert np.abs(native - ours).max() <= 1e-3
    assert (native.argmax(0) == ours.argmax(0)).mean() >= 0.999
    assert (native.argmax(0) != probabilities.argmax(0)).mean() > 0.01, "the scene must give the CRF something to do"


@needs_native
def test_label_unary_is_pydensecrfs_without_an_unsure_label() -> None:
    from pydensecrf.utils import unary_from_labels

    labels = np.random.default_rng(0).integers(0, 3, (5, 7))
    expected = unary_from_labels(labels, 3, gt_prob=0.7, zero_unsure=False).reshape(3, 5, 7)
    np.testing.assert_allclose(label_unary(labels, 3, 0.7), expected, rtol=1e-6)


def test_label_unary_shares_the_rest_among_the_other_labels() -> None:
    unary = label_unary(np.array([[0, 2]]), 3, 0.7)
    np.testing.assert_allclose(np.exp(-unary[:, 0, 0]), [0.7, 0.15, 0.15], rtol=1e-6)
    np.testing.assert_allclose(np.exp(-unary[:, 0, 1]), [0.15, 0.15, 0.7], rtol=1e-6)


@pytest.mark.parametrize(("num_labels", "confidence"), [(1, 0.7), (2, 0.5), (3, 0.2), (2, 1.0)])
def test_label_unary_refuses_what_would_say_the_opposite(num_labels: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="expected L >= 2 and confidence"):
        label_unary(np.zeros((2, 2), np.uint8), num_labels, confidence)


def test_probability_unary_clips_zero() -> None:
    np.testing.assert_allclose(
        probability_unary(np.array([[[0.0, 1.0]]], np.float32)), [[[-np.log(1e-5), 0.0]]], rtol=1e-5
    )


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("pydensecrf", marks=needs_native), "numba"],
)
class TestEveryBackend:
    def test_no_iterations_give_the_probabilities_back(self, backend: str) -> None:
        image, probabilities = _scene(3)
        result = dense_crf(image, probabilities, CrfConfig(iterations=0, backend=backend))
        np.testing.assert_allclose(result, probabilities, atol=1e-5)

    def test_a_second_unary_on_the_same_kernels_is_as_good_as_new(self, backend: str) -> None:
        image, probabilities = _scene(3)
        config = CrfConfig(backend=backend)
        kernels = open_crf(image, 3, config)
        kernels.infer(probability_unary(probabilities[::-1].copy()), 10)
        again = kernels.infer(probability_unary(probabilities), 10)
        np.testing.assert_array_equal(again, dense_crf(image, probabilities, config))

    def test_arrays_may_be_read_only_and_strided(self, backend: str) -> None:
        image, probabilities = _scene(3)
        config = CrfConfig(backend=backend)
        expected = dense_crf(image, probabilities, config)
        image, probabilities = np.asfortranarray(image), np.asfortranarray(probabilities)
        image.flags.writeable = probabilities.flags.writeable = False
        np.testing.assert_array_equal(dense_crf(image, probabilities, config), expected)

    def test_wrong_unary_is_refused(self, backend: str) -> None:
        image, probabilities = _scene(3)
        with pytest.raises(ValueError, match="expected a unary"):
            open_crf(image, 3, CrfConfig(backend=backend)).infer(probability_unary(probabilities[:, :-1]), 1)

    def test_a_speck_in_a_flat_image_is_smoothed_away(self, backend: str) -> None:
        image = np.full((20, 24, 3), 90, np.uint8)
        labels = np.zeros((20, 24), np.uint8)
        labels[9:11, 9:11] = 1
        marginals = open_crf(image, 2, CrfConfig(backend=backend)).infer(label_unary(labels, 2, 0.7), 10)
        assert (marginals.argmax(0) == 0).all()


def test_one_label_has_nothing_to_change() -> None:
    image, _ = _scene(2)
    assert (dense_crf(image, np.ones((1, 40, 56), np.float32), CrfConfig()) == 1).all()


def test_another_size_is_refused() -> None:
    image, probabilities = _scene(2)
    with pytest.raises(ValueError, match="expected probabilities"):
        dense_crf(image[:-1], probabilities, CrfConfig())


def test_torch_backend_filters_a_constant_to_itself_times_norm() -> None:
    """The symmetric normalisation D^-1/2 K D^-1/2 has eigenvalue 1 for the vector D^1/2."""
    import torch

    from stages.ops.crf.torch_backend import PermutohedralFilter

    features = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (60, 3)).astype(np.float32))
    kernel = PermutohedralFilter(features)
    root = 1 / kernel._norm
    torch.testing.assert_close(kernel(root), root, rtol=1e-4, atol=1e-5)
    assert kernel.num_vertices > 4


def test_every_preset_has_its_numbers() -> None:
    assert set(PRESETS) == set(get_args(CrfPreset))
    assert PRESETS["irn"] == crf.CrfNumbers(10, 50, 5, 3, 3)
    assert PRESETS["deeplab_v2_resnet101"] == crf.CrfNumbers(4, 67, 3, 3, 1)


def test_a_number_replaces_the_presets() -> None:
    numbers = CrfConfig(preset="psa", bilateral_srgb=5, gaussian_weight=0).numbers()
    assert numbers == crf.CrfNumbers(10, 80, 5, 0, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"preset": "irm"},
        {"iterations": -1},
        {"bilateral_sxy_px": 0.09},
        {"bilateral_srgb": 1e-9},
        {"gaussian_sxy_px": 0},
        {"sxy": 3},
    ],
)
def test_wrong_config_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CrfConfig.model_validate(wrong)


def test_without_pydensecrf_auto_takes_torch_and_an_explicit_wish_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf.importlib.util, "find_spec", lambda _: None)
    assert resolve_crf_backend("auto") == "torch"
    with pytest.raises(ConfigError, match="pydensecrf is not installed"):
        resolve_crf_backend("pydensecrf")
    with pytest.raises(ConfigError, match=r"numba is not installed; .* pip install --upgrade numba"):
        resolve_crf_backend("numba")


def test_doctor_lets_the_backend_of_this_machine_refine(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.cli.doctor import check_crf

    monkeypatch.setattr(crf, "has_cuda", lambda: False)
    found = check_crf()
    assert (found.status, found.found, found.remedy) == ("ok", "numba", "")
    monkeypatch.setattr(crf, "_has_numba", lambda: False)
    monkeypatch.setattr(crf, "_has_pydensecrf", lambda: False)
    found = check_crf()
    assert (found.status, found.found) == ("ok", "torch")
    assert "pip install --upgrade numba" in found.remedy
    monkeypatch.setattr("stages.ops.crf.torch_backend.TorchCrf.infer", lambda self, unaries, _: unaries)
    assert check_crf().status == "failed"


def test_auto_is_numba_then_pydensecrf_then_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_crf_backend("auto") == resolve_crf_backend("auto", "mps") == "numba"
    assert resolve_crf_backend("auto", "cuda") == "torch"
    monkeypatch.setattr(crf, "_has_numba", lambda: False)
    monkeypatch.setattr(crf, "_has_pydensecrf", lambda: True)
    assert resolve_crf_backend("auto") == "pydensecrf"
    monkeypatch.setattr(crf, "_has_pydensecrf", lambda: False)
    assert resolve_crf_backend("auto") == "torch"


def test_what_does_not_import_counts_as_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 1 or less')", encoding="utf-8")
    package = tmp_path / "pydensecrf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "densecrf.py").write_text("raise ImportError('GLIBCXX_3.4.99 not found')", encoding="utf-8")
    code = """if True:
        import sys
        from stages.errors import ConfigError
        from stages.ops.crf.dense_crf import resolve_crf_backend
        assert resolve_crf_backend("auto") == resolve_crf_backend("torch") == "torch"
        for backend in ("pydensecrf", "numba"):
            try:
                resolve_crf_backend(backend)
            except ConfigError as error:
                print(error.message)
    """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    native, compiled = done.stdout.splitlines()
    assert native.startswith(
        "crf.backend: pydensecrf is installed but cannot be imported (ImportError: GLIBCXX_3.4.99 not found); "
        "set it to auto, which is equal in result, or build it again: "
    )
    assert compiled.startswith("crf.backend: numba cannot be imported (ImportError: Numba needs NumPy 1 or less); ")


def test_choosing_a_backend_imports_no_torch() -> None:
    code = (
        "import sys; from stages.ops.crf.dense_crf import CrfConfig, resolve_crf_backend; CrfConfig().numbers(); "
        "resolve_crf_backend('auto'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
