"""Pixel-adaptive refinement (PAR): probabilities flow between a pixel and its dilated neighbours of like colour.

Reads and writes no file; torch is imported inside functions, so that the options are checked without it.  It is one
weighted mean over the neighbours, repeated; it knows neither labels nor the rest of the image, so it is batched freely,
and quicker than a CRF's mean field.
Shapes: B images, L labels (background first), H W pixels, N = 8 · dilations neighbours of a pixel.
Source: Ru et al., "Learning Affinity from Attention" (AFA), CVPR 2022, §3.4, and its code (rulixiang/afa b174069,
``wetr/PAR.py``, ``utils/camutils.py``); it adds the position term to PAMR (Araslanov and Roth, CVPR 2020, §4.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import StageConfig

if TYPE_CHECKING:
    from torch import Tensor

_AROUND = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0))
"""The eight neighbours, row by row."""

_EPS = 1e-8
"""What AFA adds to a deviation before it divides by it."""


class ParConfig(StageConfig):
    """Whose neighbours a pixel listens to, how much, and how often."""

    dilations: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        default=(1, 2, 4, 8, 12, 24), min_length=1, max_length=16
    )
    """Distances of the eight neighbours in pixels (of the image divided by ``shrink``).  Source: AFA, scripts."""
    iterations: int = Field(default=10, ge=0, le=1000)
    """How often probabilities are passed on; 0 leaves them.  Source: AFA, scripts."""
    colour_width: float = Field(default=0.3, gt=0, le=100)
    """Difference of colour, in deviations of the neighbourhood, at which a neighbour's weight falls to 1/e; of distance
    too.  Source: AFA, ``w1``."""
    position_weight: float = Field(default=0.01, ge=0, le=100)
    """Weight of the near neighbours whatever their colour, beside 1 for those of like colour.  Source: AFA, ``w2``."""
    shrink: Literal[1, 2, 4] = 2
    """Pixels of the image per pixel that is refined, along each side.  Source: AFA, ``down_scale``."""


def neighbour_offsets(dilations: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(rows, columns) from a pixel to its N neighbours, dilation by dilation."""
    return tuple((row * step, column * step) for step in dilations for row, column in _AROUND)


class PixelAffinity:
    """The weights of the neighbours of every pixel of B images, computed once and used with any probabilities."""

    def __init__(self, images: Tensor, config: ParConfig) -> None:
        """Compute the weights.

        Args:
            images: Float (B, 3, H, W) of any range: a neighbourhood's own deviation is the measure of its colours.
            config: Dilations and widths; ``shrink`` is not applied here.

        Source:
            AFA, ``wetr/PAR.py``.  Differs: AFA's weights sum to 1 + ``position_weight``, so that its maps grow by 1 %
            an iteration; here they are divided by that and probabilities stay so.  A border pixel's missing neighbours
            are the nearest pixels of the border, as there.
        """
        import torch

        self._offsets = neighbour_offsets(config.dilations)
        self._margin = max(config.dilations)
        self._size = (int(images.shape[2]), int(images.shape[3]))
        deviation = self._deviation(images)
        logits = [
            -((difference / (deviation + _EPS) / config.colour_width) ** 2).mean(dim=1)
            for difference in self._differences(images)
        ]
        weights = torch.softmax(torch.stack(logits), dim=0)
        near = self._position_weights(config, images)[:, None, None, None]
        self._weights = (weights + config.position_weight * near) / (1 + config.position_weight)

    def _differences(self, images: Tensor) -> Iterator[Tensor]:
        """Per neighbour its colour less the pixel's."""
        for neighbour in self._neighbours(images):
            yield neighbour - images

    def _deviation(self, images: Tensor) -> Tensor:
        """Standard deviation (B, 3, H, W) of the N neighbours' colours, in two passes for precision."""
        import torch

        total = torch.zeros_like(images)
        for difference in self._differences(images):
            total += difference
        mean, squares = total / len(self._offsets), torch.zeros_like(images)
        for difference in self._differences(images):
            squares += (difference - mean) ** 2
        return (squares / (len(self._offsets) - 1)).sqrt()

    def _position_weights(self, config: ParConfig, like: Tensor) -> Tensor:
        """Weights (N,) by distance alone: the same at every pixel."""
        import torch

        distance = torch.tensor([float(np.hypot(*offset)) for offset in self._offsets], device=like.device)
        return torch.softmax(-((distance / (distance.std() + _EPS) / config.colour_width) ** 2), dim=0)

    def _neighbours(self, values: Tensor) -> Iterator[Tensor]:
        """Per neighbour its values (B, ·, H, W), as views of one padded copy."""
        from torch.nn import functional

        margin, (height, width) = self._margin, self._size
        padded = functional.pad(values, [margin] * 4, mode="replicate")
        for rows, columns in self._offsets:
            top, left = margin + rows, margin + columns
            yield padded[..., top : top + height, left : left + width]

    def spread(self, values: Tensor, iterations: int) -> Tensor:
        """Pass values (B, L, H, W) on ``iterations`` times; each channel by itself, so that B images may share an L."""
        import torch

        for _ in range(iterations):
            mean = torch.zeros_like(values)
            for weight, neighbour in zip(self._weights, self._neighbours(values), strict=True):
                mean.addcmul_(neighbour, weight[:, None])
            values = mean
        return values


class ParRefinement:
    """PAR of one image or of several of one size; the weights serve any number of probabilities."""

    def __init__(self, images: Tensor, config: ParConfig) -> None:
        """Take images (B, 3, H, W), on the device that works."""
        from torch.nn import functional

        self._config = config
        self._full = (int(images.shape[2]), int(images.shape[3]))
        self._size = tuple(-(-side // config.shrink) for side in self._full)
        small = (
            images.float() if config.shrink == 1 else functional.interpolate(images.float(), self._size, mode="area")
        )
        self._affinity = PixelAffinity(small, config)

    def refine(self, probabilities: Tensor) -> Tensor:
        """Probabilities (B, L, H, W), refined; they sum to 1 over L as they did."""
        from torch.nn import functional

        if self._config.shrink == 1:
            return self._affinity.spread(probabilities, self._config.iterations)
        small = functional.interpolate(probabilities, self._size, mode="area")
        refined = self._affinity.spread(small, self._config.iterations)
        return functional.interpolate(refined, self._full, mode="bilinear", align_corners=False)


class ParBatch:
    """PAR of images of any sizes with numpy at both ends; those of one size are refined together."""

    def __init__(self, images: Sequence[NDArray[np.uint8]], config: ParConfig, *, device: str = "cpu") -> None:
        """Compute the weights.

        Args:
            images: RGB, uint8 (H, W, 3) each.
            config: The options.
            device: Where torch works.
        """
        import torch

        self._device = torch.device(device)
        self._groups: list[tuple[list[int], ParRefinement]] = []
        sizes = [image.shape for image in images]
        with torch.inference_mode():
            for size in dict.fromkeys(sizes):
                positions = [position for position, found in enumerate(sizes) if found == size]
                pixels = torch.tensor(np.stack([images[position] for position in positions])).to(self._device)
                stack = pixels.permute(0, 3, 1, 2).float().contiguous()
                self._groups.append((positions, ParRefinement(stack, config)))

    def refine(self, probabilities: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Probabilities (L, H, W) of each image, refined, float32."""
        import torch

        refined = list(probabilities)
        with torch.inference_mode():
            for positions, par in self._groups:
                # a channel is refined by itself, so images with fewer labels are filled up
                most = max(len(probabilities[position]) for position in positions)
                stack = np.zeros((len(positions), most, *probabilities[positions[0]].shape[1:]), dtype=np.float32)
                for target, position in zip(stack, positions, strict=True):
                    target[: len(probabilities[position])] = probabilities[position]
                found = par.refine(torch.tensor(stack).to(self._device)).cpu().numpy()
                for row, position in zip(found, positions, strict=True):
                    refined[position] = row[: len(probabilities[position])].copy()
        return refined
