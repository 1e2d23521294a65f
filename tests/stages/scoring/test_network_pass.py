"""Images on their way through a network: read ahead, halved, refined, finished in order."""

from __future__ import annotations

import numpy as np
import pytest

from stages.errors import EnvironmentFailure
from stages.ops.crf.dense_crf import CrfConfig
from stages.scoring import network_pass
from stages.scoring.network_pass import Look, look_at_images, refine_prediction, refine_predictions

SMALL = CrfConfig(backend="torch", bilateral_sxy_px=20, bilateral_srgb=10, iterations=3)


def _batch(count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Images of two colours, and probabilities (B, C, H, W) of which the third class is never likely."""
    rng = np.random.default_rng(0)
    images = np.full((count, 24, 30, 3), 40, np.uint8)
    images[:, :, 15:] = 200
    probabilities = rng.dirichlet((3, 2, 0.001), (count, 24, 30)).astype(np.float32).transpose(0, 3, 1, 2)
    probabilities = np.minimum(probabilities, [[[[1]], [[1]], [[0.005]]]]).astype(np.float32)
    return images, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_a_batch_is_refined_as_each_image_alone() -> None:
    images, probabilities = _batch()
    probabilities[1] = np.array([0.001, 0.998, 0.001], np.float32)[:, None, None]  # one likely class: nothing to change
    together = refine_predictions([*images], [*probabilities], SMALL)
    for image, share, mask in zip(images, probabilities, together, strict=True):
        alone = refine_prediction(image, share, SMALL)
        assert mask.dtype == np.uint8
        assert (mask == alone).mean() > 0.999
    assert (together[1] == 1).all()
    assert (together[0] != probabilities[0].argmax(axis=0)).mean() > 0.1, "the CRF must have something to do"


def _run(
    groups: list[int], *, crf: CrfConfig | None, device: str, skipped: str = "", most: int = 8, processes: int = 1
) -> list[tuple[str, int, int]]:
    """Pass groups of tiny images through a network that says class ``number + 1`` of the image ``number``.

    Returns:
        Each image's name, number and class, as they were finished.
    """
    import torch

    names = iter("abcdefgh")
    batches = [[next(names) for _ in range(count)] for count in groups]

    def look(items: list[str], pixels: np.ndarray) -> list[Look[str]]:
        assert torch.is_inference_mode_enabled()
        assert len(items) == len(pixels)
        if len(items) > most:
            raise torch.OutOfMemoryError("too much")
        looks = []
        for name, image in zip(items, pixels, strict=True):
            probabilities = np.zeros((9, 2, 3), np.float32)
            probabilities[image[0, 0, 0] + 1] = 1
            looks.append(Look(name, image, None if name in skipped else probabilities))
        return looks

    found = look_at_images(
        batches,
        read=lambda name: (name, np.full((2, 3, 3), ord(name) - ord("a"), np.uint8)),
        look=look,
        finish=_finish,
        context=(crf, device),
        crf=crf,
        device=torch.device(device),
        processes=processes,
        remedy="take a larger one",
    )
    return list(found)


def _finish(context: tuple[CrfConfig | None, str], look: Look[str]) -> tuple[str, int, int]:
    crf, device = context
    mask = np.zeros((2, 3), np.uint8)
    if crf is not None and (look.probabilities is not None or look.refined is not None):
        mask = look.after_crf(crf, device)
    elif look.probabilities is not None:
        mask = look.probabilities.argmax(axis=0)
    assert len(np.unique(mask)) == 1
    return look.item, int(look.image[0, 0, 0]), int(mask[0, 0])


EXPECTED = [(name, number, number + 1) for number, name in enumerate("abcde")]


@pytest.mark.parametrize(
    ("crf", "device", "processes"),
    [
        (None, "cpu", 1),
        (CrfConfig(backend="torch"), "cpu", 1),
        (CrfConfig(backend="numba"), "cpu", 1),
        (CrfConfig(backend="numba"), "cpu", 2),
    ],
    ids=["no CRF", "torch", "numba", "processes"],
)
def test_images_are_finished_in_order_wherever_the_crf_works(
    crf: CrfConfig | None, device: str, processes: int
) -> None:
    assert _run([3, 2], crf=crf, device=device, processes=processes) == EXPECTED


def test_a_network_without_memory_gets_fewer_images_and_in_the_end_says_what_helps() -> None:
    assert _run([5], crf=None, device="cpu", most=1) == EXPECTED
    with pytest.raises(EnvironmentFailure, match="cpu does not hold one image of 2 × 3 pixels; take a larger one"):
        _run([5], crf=None, device="cpu", most=0)


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [1, 1, 1, 1, 1]), ("cuda:0", [3, 2])])
def test_a_gpu_gets_the_images_of_a_batch_at_once(
    monkeypatch: pytest.MonkeyPatch, device: str, sizes: list[int]
) -> None:
    assert _refined_sizes(monkeypatch, device=device) == sizes


def test_on_cuda_what_needs_a_crf_is_refined_at_once_or_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _refined_sizes(monkeypatch, device="cuda:0", skipped="b", most=1, groups=[4]) == [3, 1, 2, 1, 1]


def _refined_sizes(
    monkeypatch: pytest.MonkeyPatch,
    *,
    device: str,
    groups: list[int] | None = None,
    skipped: str = "",
    most: int = 8,
) -> list[int]:
    """How many images each CRF got."""
    import torch

    sizes: list[int] = []

    def refine(
        images: list[np.ndarray], probabilities: list[np.ndarray], config: CrfConfig, *, device: str
    ) -> list[np.ndarray]:
        assert device == wanted
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("too much")
        return [each.argmax(axis=0).astype(np.uint8) for each in probabilities]

    wanted, groups = device, groups or [3, 2]
    monkeypatch.setattr(network_pass, "refine_predictions", refine)
    found = _run(groups, crf=SMALL, device=device, skipped=skipped)
    names = [name for name, _, _ in found]
    assert names == list("abcdefgh"[: sum(groups)])
    assert [mask for _, _, mask in found] == [0 if name in skipped else ord(name) - ord("a") + 1 for name in names]
    return sizes


def test_images_that_cannot_be_read_are_left_out_and_sizes_are_kept_apart() -> None:
    import torch

    sizes = {"a": (2, 3), "b": (3, 2), "c": (2, 3)}
    seen: list[tuple[int, ...]] = []

    def look(items: list[str], pixels: np.ndarray) -> list[Look[str]]:
        seen.append(pixels.shape)
        return [Look(name, image, None) for name, image in zip(items, pixels, strict=True)]

    found = look_at_images(
        [["a", "b", "x", "c"], ["x"]],
        read=lambda name: (name, np.zeros((*sizes[name], 3), np.uint8)) if name in sizes else None,
        look=look,
        finish=_finish,
        context=(None, "cpu"),
        crf=None,
        device=torch.device("cpu"),
        processes=1,
        remedy="",
    )
    assert [name for name, _, _ in found] == ["a", "c", "b"]
    assert seen == [(2, 2, 3, 3), (1, 3, 2, 3)]


def test_only_a_little_is_read_and_seen_ahead_of_what_is_finished() -> None:
    """Two batches ahead of the network, and as many images behind it as the writers may hold."""
    import torch

    read: list[int] = []

    def note(number: int) -> tuple[int, np.ndarray]:
        read.append(number)
        return number, np.zeros((1, 1, 3), np.uint8)

    found = look_at_images(
        ([number] for number in range(100)),
        read=note,
        look=lambda items, pixels: [Look(items[0], pixels[0], None)],
        finish=lambda _, look: look.item,
        context=None,
        crf=None,
        device=torch.device("cpu"),
        processes=1,
        remedy="",
    )
    for number in range(60):
        assert next(found) == number
    assert 60 <= len(read) <= 60 + 8 + 2
    found.close()
