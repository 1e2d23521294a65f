"""Half resolution, the early stop, batches, what is refused, and what of it enters a key."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stages.ops.crf import dense_crf as crf
from stages.ops.crf.dense_crf import (
    CrfConfig,
    CrfNumbers,
    dense_crf,
    label_unary,
    open_crf,
    open_crf_batch,
    probability_unary,
    resolve_crf_backend,
)

HAS_NATIVE = importlib.util.find_spec("pydensecrf") is not None
BACKENDS = [
    "torch",
    pytest.param("pydensecrf", marks=pytest.mark.skipif(not HAS_NATIVE, reason="no pydensecrf2")),
    "numba",
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny images gain nothing from threads, and lose where cores are shared."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _scene(seed: int = 0, num_labels: int = 3, height: int = 61, width: int = 83) -> tuple[np.ndarray, ...]:
    """A noisy image of tilted, coloured bands; the bands; blocky, partly wrong labels of them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    truth = np.clip((columns + rows // 3) * num_labels // (width + height // 3), 0, num_labels - 1)
    colours = rng.permutation(np.linspace(30, 220, num_labels))[:, None] + rng.uniform(-20, 20, (num_labels, 3))
    image = np.clip(colours[truth] + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)
    labels = truth[(rows // 8 * 8 + 5).clip(0, height - 1), (columns // 8 * 8 + 3).clip(0, width - 1)]
    return image, truth, labels


def _refine(config: CrfConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image, truth, labels = _scene(seed)
    return open_crf(image, 3, config).infer(label_unary(labels, 3, 0.7), config.iterations), truth


@pytest.mark.parametrize("backend", BACKENDS)
class TestHalfResolution:
    def test_it_finds_what_full_resolution_finds(self, backend: Any) -> None:
        _, truth, labels = _scene()
        full, _ = _refine(CrfConfig(backend=backend))
        half, _ = _refine(CrfConfig(backend=backend, resolution="half"))
        before = (labels != truth).mean()
        assert before > 0.05, "the scene must give the CRF something to do"
        assert (half.argmax(0) != truth).mean() < 0.2 * before
        assert (half.argmax(0) != full.argmax(0)).mean() < 0.01

    def test_it_gives_probabilities_of_the_images_size(self, backend: Any) -> None:
        half, truth = _refine(CrfConfig(backend=backend, resolution="half"))
        assert half.shape == (3, *truth.shape)
        assert half.dtype == np.float32
        assert half.min() >= 0
        np.testing.assert_allclose(half.sum(axis=0), 1, atol=1e-5)

    def test_no_iterations_give_the_probabilities_back(self, backend: Any) -> None:
        image, _, _ = _scene()
        probabilities = np.random.default_rng(1).dirichlet(np.ones(3), image.shape[:2]).astype(np.float32)
        probabilities = np.clip(np.moveaxis(probabilities, -1, 0), 1e-4, 1)
        probabilities /= probabilities.sum(axis=0)
        config = CrfConfig(iterations=0, backend=backend, resolution="half")
        np.testing.assert_allclose(dense_crf(image, probabilities, config), probabilities, atol=1e-5)

    def test_one_pixel_and_one_row_are_images_too(self, backend: Any) -> None:
        for size in ((1, 1), (1, 9)):
            unary = label_unary(np.ones(size, np.uint8), 2, 0.7)
            marginals = open_crf(np.full((*size, 3), 9, np.uint8), 2, CrfConfig(backend=backend, resolution="half"))
            assert (marginals.infer(unary, 5).argmax(0) == 1).all()

    def test_kernels_keep_their_width_on_the_image(self, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = []
        classes = {
            "torch": "torch_backend.TorchCrf",
            "pydensecrf": "native.PydenseCrf",
            "numba": "numba_backend.NumbaCrf",
        }
        monkeypatch.setattr(f"stages.ops.crf.{classes[backend]}", lambda *arguments, **_: seen.extend(arguments))
        open_crf(_scene()[0], 3, CrfConfig(preset="sec", backend=backend, resolution="half"))
        assert seen[0][0].shape == (31, 42, 3)
        assert seen[-1] == CrfNumbers(10, 40, 13, 3, 1.5)


@pytest.mark.parametrize("backend", BACKENDS)
class TestTolerance:
    def _open(self, backend: Any, tolerance: float | None) -> Any:
        image, _, labels = _scene()
        config = CrfConfig(backend=backend, tolerance=tolerance)
        batch = crf._open_unchecked([image], [3], config, config.numbers(), "cpu")
        return batch, [label_unary(labels, 3, 0.7)]

    def test_it_stops_early_near_where_all_steps_end(self, backend: Any) -> None:
        batch, unaries = self._open(backend, 1e-3)
        stopped = batch.infer(unaries, 200)[0]
        assert 2 < batch.steps[0] < 100
        every_step, _ = self._open(backend, None)
        assert np.abs(stopped - every_step.infer(unaries, 200)[0]).max() < 0.02
        assert every_step.steps == [200]

    def test_its_steps_are_the_ones_of_the_plain_way(self, backend: Any) -> None:
        batch, unaries = self._open(backend, 1e-3)
        stopped = batch.infer(unaries, 200)[0]
        every_step, _ = self._open(backend, None)
        np.testing.assert_array_equal(stopped, every_step.infer(unaries, batch.steps[0])[0])
        before = every_step.infer(unaries, batch.steps[0] - 1)[0]
        assert (
            np.abs(stopped - before).max()
            < 1e-3
            <= np.abs(before - every_step.infer(unaries, batch.steps[0] - 2)[0]).max()
        )

    def test_it_never_makes_more_steps_than_asked(self, backend: Any) -> None:
        batch, unaries = self._open(backend, 1e-12)
        batch.infer(unaries, 3)
        assert batch.steps == [3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resolution", ["full", "half"])
@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_a_batch_gives_each_image_what_it_gets_alone(backend: Any, resolution: Any, tolerance: float | None) -> None:
    config = CrfConfig(backend=backend, resolution=resolution, tolerance=tolerance)
    scenes = [_scene(0, 3), _scene(1, 2, 40, 30), _scene(2, 5, 33, 71)]
    counts = [3, 2, 5]
    unaries = [label_unary(labels, count, 0.7) for (_, _, labels), count in zip(scenes, counts, strict=True)]
    together = open_crf_batch([image for image, *_ in scenes], counts, config).infer(unaries, 10)
    for (image, *_), count, unary, marginals in zip(scenes, counts, unaries, together, strict=True):
        alone = open_crf(image, count, config).infer(unary, 10)
        assert marginals.shape == alone.shape
        np.testing.assert_allclose(marginals, alone, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("resolution", ["full", "half"])
@pytest.mark.parametrize("tolerance", [None, 1e-2])
def test_labellings_that_go_together_get_what_each_gets_alone(
    backend: Any, resolution: Any, tolerance: float | None
) -> None:
    config = CrfConfig(backend=backend, resolution=resolution, tolerance=tolerance)
    scenes, counts = [_scene(0, 3), _scene(1, 2, 40, 30)], [3, 2]
    sets = [
        [label_unary(change(labels, count), count, 0.7) for (_, _, labels), count in zip(scenes, counts, strict=True)]
        for change in (lambda labels, _: labels, lambda labels, count: count - 1 - labels // 2)
    ]
    batch = open_crf_batch([image for image, *_ in scenes], counts, config)
    together = batch.infer_sets(sets, 10)
    for unaries, found in zip(sets, together, strict=True):
        for marginals, alone in zip(found, batch.infer(unaries, 10), strict=True):
            np.testing.assert_array_equal(marginals, alone)
    assert (together[0][0].argmax(0) != together[1][0].argmax(0)).mean() > 0.1


def test_every_labelling_is_checked() -> None:
    image, _, labels = _scene()
    good = label_unary(labels, 3, 0.7)
    batch = open_crf_batch([image], [3], CrfConfig(backend="torch"))
    with pytest.raises(ValueError, match="expected a unary"):
        batch.infer_sets([[good], [good[:2]]], 1)


def test_equal_images_of_a_batch_do_not_see_each_other() -> None:
    """One lattice without the image's number would mix them."""
    image, _, labels = _scene()
    unaries = [label_unary(labels, 3, 0.7), label_unary(2 - labels, 3, 0.7)]
    first, second = open_crf_batch([image, image], [3, 3], CrfConfig(backend="torch")).infer(unaries, 10)
    np.testing.assert_allclose(first, second[::-1], atol=1e-5)
    assert (first.argmax(0) != second.argmax(0)).mean() > 0.5


@pytest.mark.gpu
@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="no CUDA device")
def test_cuda_gives_what_the_cpu_gives() -> None:
    scenes = [_scene(0), _scene(1, 3, 40, 30)]
    images, unaries = [scene[0] for scene in scenes], [label_unary(scene[2], 3, 0.7) for scene in scenes]
    config = CrfConfig(backend="torch")
    on_cuda = open_crf_batch(images, [3, 3], config, device="cuda").infer(unaries, 10)
    for image, unary, marginals in zip(images, unaries, on_cuda, strict=True):
        assert np.abs(marginals - open_crf(image, 3, config).infer(unary, 10)).max() <= 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_unary_that_is_not_finite_is_refused(bad: float) -> None:
    image, _, labels = _scene()
    unary = label_unary(labels, 3, 0.7)
    unary[1, 4, 5:7] = bad
    with pytest.raises(ValueError, match="found NaN or infinity in 2 of 5063 pixels"):
        open_crf(image, 3, CrfConfig(backend="torch")).infer(unary, 1)
    probabilities = np.full((3, *image.shape[:2]), np.nan, np.float32)
    with pytest.raises(ValueError, match="found NaN or infinity in 5063 of 5063 pixels"):
        open_crf(image, 3, CrfConfig(backend="torch")).infer(probability_unary(probabilities), 1)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 5, 3), np.float32), np.zeros((4, 5), np.uint8), np.zeros((0, 5, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected an RGB image"):
        open_crf(image, 2, CrfConfig())


@pytest.mark.parametrize("num_labels", [[], [1], [2, 2]])
def test_counts_of_labels_must_fit_the_images(num_labels: list[int]) -> None:
    with pytest.raises(ValueError, match="L >= 2 for each"):
        open_crf_batch([np.zeros((4, 5, 3), np.uint8)], num_labels, CrfConfig())


@pytest.mark.parametrize("wrong", [{"resolution": "quarter"}, {"tolerance": 0}, {"tolerance": 1}])
def test_wrong_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        CrfConfig.model_validate(wrong)


@pytest.mark.parametrize(
    ("device", "has_cuda", "expected"),
    [
        ("cpu", True, "numba"),
        ("mps", True, "numba"),
        ("auto", False, "numba"),
        ("auto", True, "torch"),
        ("cuda", False, "torch"),
        ("cuda:1", True, "torch"),
    ],
)
def test_auto_is_torch_on_a_cuda_device_alone(
    device: str, has_cuda: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crf, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(crf, "_has_pydensecrf", lambda: True)
    monkeypatch.setattr(crf, "_has_numba", lambda: True)
    assert resolve_crf_backend("auto", device) == expected
    assert resolve_crf_backend("pydensecrf", device) == "pydensecrf", "what is named is taken"
    config = CrfConfig()
    assert config.key_content(device)["backend"] == expected
    assert config.resolved(device).backend == expected
