"""The class of every pixel of an image of any size: at once where it fits, else in overlapping windows.

Reads and writes no file.
Shapes: B images of one size, C classes with background, N a window's side, H W image pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from stages.contracts import Progress
from stages.errors import EnvironmentFailure
from stages.ops.crf.dense_crf import CrfConfig, dense_crf
from stages.ops.devices import ForwardConfig
from stages.scoring.network_pass import likely_classes
from stages.scoring.prediction import PredictionConfig, Scales

if TYPE_CHECKING:
    import torch

LARGE_PX = 2048
"""An image with a longer side is seen in windows, where nobody says otherwise."""

WINDOW_PX = 1024
"""Side of those windows."""

LEAST_WINDOW_PX = 128
"""Windows no smaller than this: a network needs surroundings."""

_FALLBACK_PX = (1024, 512, 256)
"""Windows that are tried in turn when the accelerator does not hold an image."""

Predicted = tuple[NDArray[np.uint8] | None, NDArray[np.float32] | None]
"""Class indices (H, W), or probabilities (C, H, W) from which a CRF is still to make them."""


class PredictOptions(ForwardConfig):
    """How images are looked at."""

    short_side_px: int | None = Field(default=None, ge=16, le=4096)
    """The shorter side of what the network sees; None keeps the image's."""
    scales: Scales = (1.0,)
    """Factors on the network's input size; probabilities are averaged."""
    flip: bool = False
    """Whether each scale also sees the mirror image."""
    crf: CrfConfig | None = None
    """A dense CRF on the probabilities; None for none."""
    window_px: int | None = None
    """Side of the windows of an image with a longer side; None: 1,024 for those above 2,048; 0: never windows."""

    @field_validator("window_px")
    @classmethod
    def _check_window(cls, value: int | None) -> int | None:
        if value not in (None, 0) and not LEAST_WINDOW_PX <= value <= 8192:
            raise ValueError(f"expected 0 or {LEAST_WINDOW_PX} … 8192 pixels")
        return value

    @classmethod
    def of(cls, config: PredictionConfig) -> Self:
        """What a config's evaluate section does for its best score: all scales and the CRF where it asks for them."""
        return cls(
            short_side_px=config.short_side_px,
            scales=config.scales if config.multi_scale else (1.0,),
            flip=config.flip and config.multi_scale,
            crf=config.crf_config if config.crf else None,
            precision=config.precision,
        )

    def resolved(self, device: str) -> Self:
        """The same with the CRF's backend by name."""
        return self if self.crf is None else self.model_copy(update={"crf": self.crf.resolved(device)})

    def window_for(self, size: tuple[int, int]) -> int | None:
        """The window for an image of ``size`` (height, width); None where it is seen at once."""
        if self.window_px == 0:
            return None
        largest, window = (LARGE_PX, WINDOW_PX) if self.window_px is None else (self.window_px, self.window_px)
        return window if max(size) > largest else None


class PicturePredictor:
    """A segmenter on a device, with the ways to look at images."""

    def __init__(
        self,
        model: torch.nn.Module,
        num_classes: int,
        options: PredictOptions,
        device: torch.device,
        progress: Progress,
    ) -> None:
        """Take a net in evaluation mode that is on ``device``; ``progress`` hears of a lack of memory."""
        self._model, self._num_classes, self._options = model, num_classes, options
        self._device, self._progress = device, progress
        self.num_windowed = 0
        """Images that were seen in windows."""

    def predict(self, pixels: NDArray[np.uint8]) -> list[Predicted]:
        """Predict images of one size; called in inference mode.

        Args:
            pixels: RGB, uint8 (B, H, W, 3).

        Returns:
            One entry for each image; with a CRF the probabilities, unless windows were used: these have it in them.

        Raises:
            torch.OutOfMemoryError: the device does not hold so many images at once; a single one is seen in windows.
            EnvironmentFailure: the device does not even hold the smallest window.
        """
        import torch

        window = self._options.window_for((pixels.shape[1], pixels.shape[2]))
        if window is None:
            try:
                return self._at_once(torch.from_numpy(pixels))
            except torch.OutOfMemoryError:
                if len(pixels) > 1:
                    raise
            torch.cuda.empty_cache()  # here, where what the failed call held is free
        return [(self._in_fitting_windows(image, window), None) for image in pixels]

    def _at_once(self, pixels: torch.Tensor) -> list[Predicted]:
        import torch

        from stages.data.transforms import to_network_input
        from stages.ops.multi_scale import predict_logits

        options = self._options
        if options.crf is not None:
            return [(None, found) for found in self._probabilities(pixels, options.short_side_px).cpu().numpy()]
        if options.scales == (1.0,) and not options.flip:  # of one view the likeliest class needs no probabilities
            images = to_network_input(pixels, self._device)
            scores = predict_logits(
                self._model, images, short_side_px=options.short_side_px, precision=options.precision
            )
        else:
            scores = self._probabilities(pixels, options.short_side_px)
        return [(mask, None) for mask in scores.argmax(dim=1).to(torch.uint8).cpu().numpy()]

    def _probabilities(self, batch: torch.Tensor, short_side_px: int | None) -> torch.Tensor:
        """Mean probabilities (B, C, H, W) of uint8 images (B, H, W, 3), on the device."""
        from stages.data.transforms import to_network_input
        from stages.ops.multi_scale import multi_scale_probabilities

        images = to_network_input(batch, self._device)
        options = self._options
        return multi_scale_probabilities(
            self._model,
            images,
            scales=options.scales,
            flip=options.flip,
            short_side_px=short_side_px,
            precision=options.precision,
        )

    def _in_fitting_windows(self, image: NDArray[np.uint8], wanted_px: int | None) -> NDArray[np.uint8]:
        """Windows that shrink until one fits, from those that are wanted on; None: at once did not fit."""
        import torch

        size = f"{image.shape[0]} × {image.shape[1]} pixels"
        smaller = [window for window in _FALLBACK_PX if wanted_px is None or window < wanted_px]
        windows = smaller if wanted_px is None else [wanted_px, *smaller]
        for window in windows:
            try:
                mask = self._in_windows(image, window)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            if window != wanted_px:
                whole = "at once" if wanted_px is None else f"in windows of {wanted_px}"
                self._progress.warn(
                    f"the device does not hold an image of {size} {whole}: it was seen in windows of {window}"
                )
            return mask
        raise EnvironmentFailure(
            f"{self._device} does not hold a window of {windows[-1]} pixels of an image of {size}; free memory on "
            "it, take fewer or smaller --scales, or use --device cpu"
        )

    def _in_windows(self, image: NDArray[np.uint8], window_px: int) -> NDArray[np.uint8]:
        """Class indices (H, W); the image is first brought to the size that the network sees at scale 1."""
        import torch

        from stages.ops.multi_scale import in_fitting_batches, network_size
        from stages.ops.windows import predict_in_windows

        def score(windows: NDArray[np.uint8]) -> torch.Tensor:
            (found,) = in_fitting_batches(lambda batch: (self._probabilities(batch, None),), torch.from_numpy(windows))
            return found if self._options.crf is None else self._refine_windows(windows, found)

        height, width = image.shape[:2]
        seen = network_size((height, width), self._options.short_side_px)
        if seen != (height, width):  # an antialiased bilinear filter as torch's, in bytes: a quarter of the memory
            image = np.asarray(Image.fromarray(image).resize((seen[1], seen[0]), Image.Resampling.BILINEAR))
        mask = predict_in_windows(
            score, image, num_classes=self._num_classes, window_px=window_px, mask_size=(height, width)
        )
        self.num_windowed += 1
        return mask

    def _refine_windows(self, windows: NDArray[np.uint8], probabilities: torch.Tensor) -> torch.Tensor:
        """Marginals of the CRF of each window, (B, C, N, N)."""
        import torch

        assert self._options.crf is not None
        refined = torch.zeros_like(probabilities)
        for position, window in enumerate(windows):
            likely = torch.from_numpy(likely_classes(probabilities[position].numpy()))
            chosen = probabilities[position, likely]
            marginals = dense_crf(
                np.ascontiguousarray(window),
                (chosen / chosen.sum(dim=0)).numpy(),
                self._options.crf,
                device=str(self._device),
            )
            refined[position, likely] = torch.from_numpy(marginals)
        return refined
