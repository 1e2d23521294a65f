"""Random rescale, crop and flip of a training image with its mask, and the way into a network.

Everything random is a pure function of the seed that the caller passes: neither the worker nor the call order matters.
Importing this module loads neither torch nor albumentations; the first call of an Augmenter loads albumentations (about
3 s).
Shapes: B images, H W image pixels, c the crop's side.  Images are uint8 RGB, masks uint8 class indices with 255.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from stages.contracts import IGNORE_INDEX, StageConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's R, G, B in [0, 1]; what every public weight file of ours was trained with."""

IMAGE_STD = (0.229, 0.224, 0.225)
"""Standard deviation of ImageNet's R, G, B in [0, 1]."""

PADDING_COLOUR = (124, 116, 104)
"""IMAGE_MEAN in 0 … 255: a padded pixel is (nearly) zero after normalising."""


class AugmentConfig(StageConfig):
    """How a training image becomes a square crop."""

    crop_px: int = Field(default=321, ge=16, le=2048)
    """Side of the square crop in pixels; a smaller image is padded (mean colour, mask 255)."""
    scale: tuple[float, float] = (0.5, 1.5)
    """Smallest and largest random rescale of the image, before the crop; (1, 1) keeps its size."""
    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """Resize the image's shorter side to this before anything else; None keeps the file's size."""
    flip: bool = True
    """Mirror left-right with probability one half."""
    color_jitter: float = Field(default=0.0, ge=0.0, le=1.0)
    """Strength of random brightness, contrast and saturation (0.3 = up to ±30 %); 0 is off."""
    resize: Literal["crop", "squash"] = "crop"
    """crop cuts a square out; squash brings the whole image to ``crop_px`` × ``crop_px`` and loses its aspect (SEC)."""

    @model_validator(mode="after")
    def _check_scale(self) -> AugmentConfig:
        low, high = self.scale
        if not 0.05 <= low <= high <= 10:
            raise ValueError(f"scale must be (smallest, largest) within 0.05 … 10, got ({low}, {high})")
        if self.is_whole and (self.scale != (1.0, 1.0) or self.short_side_px is not None):
            raise ValueError(
                "resize: squash brings the whole image to crop_px × crop_px: set scale: [1, 1] and leave short_side_px "
                f"out, found scale ({low}, {high}) and short_side_px {self.short_side_px}"
            )
        return self

    @property
    def is_whole(self) -> bool:
        """Whether a sample always shows the whole image."""
        return self.resize == "squash"

    @property
    def seen_short_side_px(self) -> int | None:
        """The shorter side at which a whole image looks most like what was trained on; None for its own size."""
        return self.crop_px if self.is_whole else self.short_side_px


class Augmenter:
    """Turns an image with its mask into a crop that depends on nothing but the seed.

    Picklable, and safe to share between threads: each thread builds its own pipeline.
    """

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])

    def __call__(
        self, image: NDArray[np.uint8], mask: NDArray[np.uint8] | None = None, *, seed: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """Cut one random crop.

        Args:
            image: RGB, uint8 (H, W, 3).
            mask: Class indices with 255, uint8 (H, W), or None.
            seed: 0 … 2**32 - 1; equal seeds give equal crops.

        Returns:
            The crop, uint8 (c, c, 3), and the mask's, uint8 (c, c) or None; both contiguous.
        """
        if mask is not None and mask.shape != image.shape[:2]:
            raise ValueError(f"mask must have the image's size {image.shape[:2]}, got {mask.shape}")
        pipeline = self._seeded_pipeline(seed)
        if mask is None:
            return np.ascontiguousarray(pipeline(image=image)["image"]), None
        done = pipeline(image=image, mask=mask)
        return np.ascontiguousarray(done["image"]), np.ascontiguousarray(done["mask"])

    def crop_aligned(
        self, image: NDArray[np.uint8], masks: Sequence[NDArray[np.uint8]], *, seed: int
    ) -> tuple[NDArray[np.uint8], list[NDArray[np.uint8]]]:
        """Cut the crop of ``__call__`` with the same seed from the image and several masks that lie on it.

        Args:
            image: RGB, uint8 (H, W, 3).
            masks: uint8 (H, W) each; values are kept (nearest), padding is 255.
            seed: 0 … 2**32 - 1.

        Returns:
            The crop, uint8 (c, c, 3), and the masks', uint8 (c, c); all contiguous.
        """
        sizes = [mask.shape for mask in masks]
        if any(size != image.shape[:2] for size in sizes):
            raise ValueError(f"masks must have the image's size {image.shape[:2]}, got {sizes}")
        done = self._seeded_pipeline(seed)(image=image, masks=list(masks))
        return np.ascontiguousarray(done["image"]), [np.ascontiguousarray(mask) for mask in done["masks"]]

    def _seeded_pipeline(self, seed: int) -> Any:  # noqa: ANN401 - see build_pipeline
        """This thread's pipeline, about to draw what ``seed`` says."""
        pipeline = getattr(self._local, "pipeline", None)
        if pipeline is None:
            pipeline = self._local.pipeline = build_pipeline(self.config)
        seed_pipeline(pipeline, seed)
        return pipeline


def build_pipeline(config: AugmentConfig) -> Any:  # noqa: ANN401 - albumentations is not imported at the top
    """Build the albumentations pipeline of ``config``: resize, rescale, crop (with padding) or squash, flip, jitter.

    Images are averaged over areas when they shrink and interpolated linearly when they grow; masks keep their values
    (nearest).  Seed it with ``seed_pipeline``.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for a newer version
    import albumentations
    import cv2

    # OpenCV's own threads would compete with torch's for the cores; crops this small are quicker without them.
    cv2.setNumThreads(0)
    steps: list[Any] = [_squash(config.crop_px)] if config.is_whole else _crop_steps(config)
    if config.flip:
        steps.append(albumentations.HorizontalFlip(p=0.5))
    if config.color_jitter > 0:
        spread = (max(0.0, 1 - config.color_jitter), 1 + config.color_jitter)
        steps.append(
            albumentations.ColorJitter(brightness=spread, contrast=spread, saturation=spread, hue=(0.0, 0.0), p=1.0)
        )
    return albumentations.Compose(steps)


def _squash(side_px: int) -> Any:  # noqa: ANN401 - see build_pipeline
    import albumentations

    return albumentations.Resize(height=side_px, width=side_px, area_for_downscale="image", p=1.0)


def _crop_steps(config: AugmentConfig) -> list[Any]:
    """Resize, rescale, crop with padding."""
    import albumentations

    steps: list[Any] = []
    if config.short_side_px is not None:
        steps.append(albumentations.SmallestMaxSize(max_size=config.short_side_px, area_for_downscale="image", p=1.0))
    if config.scale != (1.0, 1.0):
        limits = (config.scale[0] - 1, config.scale[1] - 1)
        steps.append(albumentations.RandomScale(scale_limit=limits, area_for_downscale="image", p=1.0))
    steps.append(
        albumentations.RandomCrop(
            height=config.crop_px,
            width=config.crop_px,
            pad_if_needed=True,
            pad_position="random",
            fill=PADDING_COLOUR,
            fill_mask=IGNORE_INDEX,
            p=1.0,
        )
    )
    return steps


def seed_pipeline(pipeline: Any, seed: int) -> None:  # noqa: ANN401 - see build_pipeline
    """Seed an albumentations pipeline so that its transforms draw independently of each other.

    ``Compose.set_random_seed`` of albumentations 2.0.8 hands the same seed to every transform, and so the rescale
    factor, the crop's corner and the flip would all come from the same first random numbers: enlarged images would
    always be cut near their lower right corner.
    """
    pipeline.set_random_seed(seed)
    for position, transform in enumerate(pipeline.transforms):
        # An odd multiplier keeps the map one-to-one in 32 bits; Random and Generator hash their seed themselves.
        transform.set_random_seed((seed * 0x9E3779B1 + (position + 1) * 0x85EBCA6B) % 2**32)


def to_network_input(images: Tensor, device: torch.device) -> Tensor:
    """Move a batch of images to ``device`` and normalise it by ImageNet's mean and standard deviation.

    Args:
        images: RGB, uint8 (B, H, W, 3), on the CPU; bytes travel to the device, a quarter of what floats would.
        device: Where the network is.

    Returns:
        float32 (B, 3, H, W); in memory the channels stay innermost, where convolutions are quicker (not on mps).
    """
    import torch

    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    mean = torch.tensor(IMAGE_MEAN, device=device).mul_(255).view(1, 3, 1, 1)
    scale = torch.tensor(IMAGE_STD, device=device).mul_(255).reciprocal_().view(1, 3, 1, 1)
    moved = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    return moved.to(torch.float32, memory_format=layout).sub_(mean).mul_(scale)


def to_pixels(images: Tensor) -> Tensor:
    """The bytes that ``to_network_input`` was given, exactly, on the device of ``images``.

    Args:
        images: float32 (B, 3, H, W), as it returned them.

    Returns:
        RGB, uint8 (B, H, W, 3).
    """
    import torch

    mean = torch.tensor(IMAGE_MEAN, device=images.device).mul_(255).view(1, 3, 1, 1)
    scale = torch.tensor(IMAGE_STD, device=images.device).mul_(255).view(1, 3, 1, 1)
    return (images * scale + mean).round_().to(torch.uint8).permute(0, 2, 3, 1)
