"""Let the attention maps of images walk over the features of the trained classifier that made them.

Reads images and the classifier; writes nothing.  On a CPU images go through the network one by one; on a GPU in batches
that are planned over whole windows of the list of images, whichever of them are wanted, so that a run that was stopped,
or that makes a part, sees each image in the same company and gives the same maps.
Shapes: B images, n labels of one image, D channels, H W pixels of a padded input, h w cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stages.contracts import AttentionRecord, ImageRecord, ImageSet, Progress, Runtime
from stages.data.records import some
from stages.errors import ConfigError, EnvironmentFailure, InputError
from stages.masks.attention_maps import BROKEN_WEIGHTS
from stages.masks.refinements.base import Refinement
from stages.ops.devices import Precision, autocast
from stages.ops.random_walk import RandomWalkConfig, walk_maps

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW_IMAGES = 16
"""Neighbours in the list that share batches on a GPU."""

_ALL_BROKEN = 16
"""So many images with features of NaN, and none without before them, are all there are."""

RANDOM_WALK = Refinement("the maps spread over cells of like features of the classifier", None)


class MapWalker:
    """The trained classifier's features on a device, and the walk over them."""

    section = "random_walk"
    """Where ``make_masks`` has the option ``short_side_px`` of this walk."""

    def __init__(
        self,
        config: RandomWalkConfig,
        *,
        classifier: Path,
        images: ImageSet,
        progress: Progress,
        runtime: Runtime,
        precision: Precision = "fp32",
    ) -> None:
        """Load the classifier.

        Args:
            config: Features and walk.
            classifier: Output folder of ``train_classifier``.
            images: Where pixels come from.
            progress: Warned when a batch does not fit the device, and by ``conclude``.
            runtime: Device, threads, and the threads that read images ahead.
            precision: Of the forward pass; the walk is in float32.

        Raises:
            ConfigError: the backbone has no such layer; the nearest are named.
            DamagedFileError: the classifier does not read back.
        """
        import torch

        from stages.masks.extraction import BUDGET_PX, Views
        from stages.methods.classifier_files import load_classifier
        from stages.nets.layers import find_layer
        from stages.ops.devices import resolve_device

        self._device = resolve_device(runtime)
        network, _ = load_classifier(classifier, self._device)
        self._backbone = network.backbone.to(memory_format=torch.channels_last)
        if config.layer is not None:
            find_layer(self._backbone, config.layer)
        self._config, self._images, self._progress, self._workers = config, images, progress, runtime.workers
        self._precision: Precision = precision
        self._broken: set[str] = set()
        self._has_walked = False
        self._views = Views((1.0,), flip=False, short_side_px=config.short_side_px)
        is_cpu = self._device.type == "cpu"
        self.window_images = 1 if is_cpu else _WINDOW_IMAGES
        self._budget_px = 1 if is_cpu else BUDGET_PX.get(self._device.type, 1)

    def walk(self, wanted: Sequence[AttentionRecord], window: Sequence[ImageRecord]) -> dict[str, AttentionRecord]:
        """The walked maps of some images by id, on the cells of the features, each map divided by its peak.

        Maps over features that are NaN or infinite become zero: their classes get no pixel (``conclude`` warns).

        Args:
            wanted: Attention of images of the window, with labels.
            window: All images of the window; they decide the batches.

        Raises:
            DataError: an image cannot be read or changed its size.
            InputError: there are too many cells for all pairs, or the features of all images are NaN so far, and these
                are many.
            EnvironmentFailure: the device cannot hold one image.
        """
        from stages.data.whole_images import prefetch, read_checked
        from stages.masks.extraction import build_inputs, plan_batches

        records = {record.id: record for record in wanted if record.maps.any()}
        batches = [
            batch
            for batch in plan_batches([image for image in window if image.labels], self._views, self._budget_px)
            if any(image.id in records for image in batch)
        ]

        def load(batch: list[ImageRecord]) -> NDArray[np.uint8]:
            return build_inputs([read_checked(self._images, image) for image in batch], self._views)[0]

        # maps without evidence have nothing to spread; those of an image that gives NaN are among them
        walked = {record.id: record for record in wanted if record.id not in records}
        for batch, inputs in prefetch(load, batches, workers=self._workers if len(batches) > 1 else 0):
            for image, features in zip(batch, self._features(inputs), strict=True):
                if image.id in records:
                    walked[image.id] = self._walk_one(records[image.id], features, inputs.shape[1:3])
        return walked

    def conclude(self) -> None:
        """Warn once of the images whose maps could not walk; to be called after the last one."""
        if self._broken:
            are = "1 image has" if len(self._broken) == 1 else f"{len(self._broken):,} images have"
            self._progress.warn(
                f"{are} features that are NaN or infinite, over which no map can walk ({some(sorted(self._broken))}): "
                f"their classes get no pixel there, only background; {BROKEN_WEIGHTS}"
            )

    def walk_scattered(self, wanted: Sequence[AttentionRecord], train: Sequence[ImageRecord]) -> list[AttentionRecord]:
        """The walked maps of images from anywhere in the list, in their order: each as ``walk`` gives it in its window.

        Args:
            wanted: Attention of images of ``train``, with labels.
            train: The list of images that the windows are cut from.

        Raises:
            WsssError: as ``walk``.
        """
        size = self.window_images
        place_of = {image.id: place for place, image in enumerate(train)}
        by_window: dict[int, list[AttentionRecord]] = {}
        for record in wanted:
            by_window.setdefault(place_of[record.id] // size, []).append(record)
        walked: dict[str, AttentionRecord] = {}
        for number, records in by_window.items():
            walked |= self.walk(records, train[number * size : (number + 1) * size])
        return [walked[record.id] for record in wanted]

    def _features(self, inputs: NDArray[np.uint8]) -> list[Tensor]:
        """Features (D, h, w) of each input of a batch; half the batch at a time where the device is too small."""
        import torch

        try:
            return list(self._forward(inputs))
        except torch.OutOfMemoryError:
            pass  # the failed pass holds memory until this block is left
        if len(inputs) == 1:
            raise EnvironmentFailure(
                f"the device's memory does not hold one input of {inputs.shape[1]} × {inputs.shape[2]} pixels; set "
                f"make_masks.{self.section}.short_side_px, or run on the CPU"
            )
        half = len(inputs) // 2
        self._progress.warn(f"out of device memory with {len(inputs)} inputs: this batch goes on with {half}")
        return [*self._features(inputs[:half]), *self._features(inputs[half:])]

    def _forward(self, inputs: NDArray[np.uint8]) -> Tensor:
        """What is compared, (B, D, h, w), of a batch."""
        import torch

        from stages.data.transforms import to_network_input

        with torch.inference_mode(), autocast(self._device.type, self._precision):
            return self._extract(to_network_input(torch.from_numpy(inputs), self._device))

    def _extract(self, images: Tensor) -> Tensor:
        """Features (B, D, h, w) of the layer, of normalised images."""
        import torch

        from stages.nets.layers import capture_output

        layer = self._config.layer
        if layer is None:
            return self._backbone(images)
        with capture_output(self._backbone, layer) as captured:
            self._backbone(images)
        features = captured.output
        if not isinstance(features, torch.Tensor) or features.ndim != 4:
            raise ConfigError(f"make_masks.random_walk.layer: '{layer}' gives no map of features; name another layer")
        return features

    def _spread(self, maps: Tensor, cells: Tensor) -> Tensor:
        """The walked maps (n, h, w) over what is compared (D, h, w)."""
        return walk_maps(maps, cells, self._config)

    def _walk_one(self, record: AttentionRecord, features: Tensor, padded: tuple[int, ...]) -> AttentionRecord:
        """Lay maps and features of one image on one grid, and walk."""
        import torch
        from torch.nn import functional

        from stages.ops.attention import quantise_attention
        from stages.ops.cells import resample_maps

        (height, width), *_ = self._views.sizes(record.size)
        rows, columns = features.shape[1] * height / padded[0], features.shape[2] * width / padded[1]
        grid = (max(1, round(rows)), max(1, round(columns)))
        looking = self._backbone.cells(features.shape[1:], padded)
        with torch.inference_mode():
            cells = resample_maps(features, size=grid, image_size=(height, width), cells=looking)
            maps = torch.tensor(record.maps).to(self._device)[None].float() / 255
            shrinks = grid[0] <= maps.shape[2] and grid[1] <= maps.shape[3]
            coarse = functional.interpolate(maps, grid, mode="area" if shrinks else "bilinear")[0]
            walked = self._spread(coarse, cells).cpu().numpy()
        is_broken = ~np.isfinite(walked).all(axis=(1, 2))
        if is_broken.any():
            self._note_broken(record.id)
            walked[is_broken] = 0
        else:
            self._has_walked = True
        return replace(record, maps=quantise_attention(walked)[0])

    def _note_broken(self, image_id: str) -> None:
        """Count an image whose features are NaN; where all are, there is no point in looking at the rest."""
        self._broken.add(image_id)
        if len(self._broken) >= _ALL_BROKEN and not self._has_walked:
            raise InputError(
                f"features must be finite, found NaN or infinity in the first {len(self._broken)} images that walk; "
                f"{BROKEN_WEIGHTS}"
            )
