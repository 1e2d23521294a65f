"""Looks at a segmenter on training images: at held-out ones while it trains, at a few crops when it has.

The looks give a curve and the best weights, and stop a training that has collapsed to background.
Reads images with the masks that training uses; writes nothing itself.  Torch is imported by the functions only.
A weakly supervised run has no true masks of training images, and val decides nothing.  So a share of the training
images, chosen by hash, is not trained on, and what is measured there is agreement with their pseudo-masks
(``supervision: full``: with their true masks).
Shapes: C classes with background, H W image pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.contracts import (
    BACKGROUND_INDEX,
    IGNORE_INDEX,
    ImageRecord,
    Progress,
    Runtime,
    SilentProgress,
    StageConfig,
)
from stages.data.subsets import hash_share
from stages.data.transforms import to_network_input
from stages.errors import EnvironmentFailure, InputError, is_out_of_memory
from stages.ops.devices import resolve_device
from stages.ops.metrics.confusion import confusion_matrix, mean_iou, pixel_accuracy
from stages.training.distributed import is_main, own_slice

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from stages.data.batches import TrainingData
    from stages.nets.segmenters.segmenter import Segmenter

    ReadPair = Callable[[ImageRecord], tuple[NDArray[np.uint8], NDArray[np.uint8]]]

_NUM_CROPS = 16
"""Training crops that are looked at after the training."""
_COLLAPSED_RATIO = 0.25
"""Share of the crops with objects that must hold another class before a net that knows one class alone is warned of:
a few pixels of a rare class are no collapse."""


class ValidationConfig(StageConfig):
    """When and on what the segmenter is looked at while it trains."""

    every_steps: int = Field(gt=0, le=100_000_000)
    """Steps between two looks; there is one after the last step, too."""
    ratio: float = Field(default=0.05, gt=0, le=0.5)
    """Share of the training images that is held out: chosen by hash of their ids, not trained on."""
    keep: Literal["last", "best"] = "last"
    """Which weights are delivered: those of the last step, or of the look with the highest mIoU; the others are written
    beside them."""
    collapse_after: int | None = Field(default=5, ge=1, le=10_000)
    """Stop after so many looks in a row that find background everywhere; null does not stop."""


def choose_held_out(config: ValidationConfig, records: Sequence[ImageRecord]) -> frozenset[str]:
    """The ids of the images that are held out: a share by hash, never all."""
    return frozenset(hash_share((record.id for record in records), config.ratio, "segmenter validation"))


class HeldOutImages:
    """The watch of a segmenter's training (``stages.training.loop.Watch``)."""

    def __init__(
        self,
        config: ValidationConfig,
        records: Sequence[ImageRecord],
        read: ReadPair,
        *,
        num_classes: int,
        short_side_px: int | None,
        progress: Progress,
    ) -> None:
        """Take the images; none is read before the first look.

        Args:
            config: When to look, and what to make of it.
            records: The held-out images.
            read: Gives an image, uint8 (H, W, 3), and its mask, uint8 (H, W).
            num_classes: C.
            short_side_px: Shorter side at which the net sees an image; None for its own size.
            progress: Hears of each look.
        """
        self.config, self.records, self.read = config, records, read
        self.num_classes, self.short_side_px = num_classes, short_side_px
        self.progress = progress if is_main() else SilentProgress()
        self.curve: list[dict[str, float]] = []
        """Each look: step, miou and pixel_accuracy, and the predicted and masked foreground as fractions of the
        labelled pixels; all 0 where nothing was labelled."""
        self.best: dict[str, Tensor] | None = None
        self.best_step = 0
        self.num_collapsed = 0

    @property
    def identity(self) -> str:
        """The options and the images."""
        return self.config.model_dump_json() + " ".join(record.id for record in self.records)

    @property
    def every_steps(self) -> int:
        """Steps between two looks."""
        return self.config.every_steps

    def look(self, model: nn.Module, step: int) -> None:
        """Measure ``model`` after ``step`` steps.

        Raises:
            InputError: it has said background everywhere for ``collapse_after`` looks.
            EnvironmentFailure: the device's memory does not hold one image beside the training.
        """
        matrix = self._count(model)
        found = {
            "step": step,
            "miou": float(np.nan_to_num(mean_iou(matrix))),
            "pixel_accuracy": float(np.nan_to_num(pixel_accuracy(matrix))),
            "predicted_foreground": _foreground_share(matrix.sum(axis=0)),
            "masked_foreground": _foreground_share(matrix.sum(axis=1)),
        }
        self.curve.append(found)
        self.progress.info(f"step {step}: mIoU {found['miou']:.1%} on {len(self.records)} held-out images")
        if self.best is None or found["miou"] > max(entry["miou"] for entry in self.curve[:-1]):
            self.best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
            self.best_step = step
        self._check_collapse(found)

    def _check_collapse(self, found: Mapping[str, float]) -> None:
        is_collapsed = found["predicted_foreground"] == 0 and found["masked_foreground"] > 0
        self.num_collapsed = self.num_collapsed + 1 if is_collapsed else 0
        if self.config.collapse_after is not None and self.num_collapsed >= self.config.collapse_after:
            raise InputError(
                f"stopped at step {found['step']:.0f}: the segmenter says background everywhere on "
                f"{len(self.records)} held-out images, at {self.num_collapsed} looks in a row, where their masks have "
                f"{found['masked_foreground']:.1%} of objects; lower training.learning_rate, use loss: "
                "balanced_cross_entropy, look at the pseudo-masks, or raise validation.collapse_after"
            )

    def _count(self, model: nn.Module) -> NDArray[np.int64]:
        """Confusion of all held-out images, this rank's share of the work done here."""
        import torch

        from stages.ops.collectives import sum_over_devices

        device = next(model.parameters()).device
        counts = np.zeros((self.num_classes, self.num_classes), np.int64)
        model.eval()
        try:
            with torch.inference_mode():
                for record in own_slice(self.records):
                    image, mask = self.read(record)
                    counts += confusion_matrix(mask, self._predict(model, record, image, device), self.num_classes)
        finally:
            model.train()
        return sum_over_devices(torch.from_numpy(counts).to(device)).cpu().numpy()

    def _predict(
        self, model: nn.Module, record: ImageRecord, image: NDArray[np.uint8], device: torch.device
    ) -> NDArray[np.uint8]:
        import torch

        from stages.ops.multi_scale import predict_logits

        try:
            batch = to_network_input(torch.from_numpy(image[None]), device)
            logits = predict_logits(model, batch, short_side_px=self.short_side_px)
            return logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._explain_memory(record, image, device, error) from error

    def _explain_memory(
        self, record: ImageRecord, image: NDArray[np.uint8], device: torch.device, error: RuntimeError
    ) -> EnvironmentFailure:
        from stages.ops.multi_scale import network_size

        size = (image.shape[0], image.shape[1])
        seen = network_size(size, self.short_side_px)
        at = "" if seen == size else f", seen at {seen[0]} × {seen[1]}"
        return EnvironmentFailure(
            f"{device} is out of memory for the held-out image '{record.id}' of {size[0]} × {size[1]} pixels{at}, "
            "which validation predicts whole beside the training; set a smaller augment.short_side_px (with resize: "
            "squash augment.crop_px), set validation: null, or use another runtime.device "
            f"({str(error).partition(chr(10))[0]})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Curve, best weights and looks at a collapsed net."""
        return {
            "curve": self.curve,
            "best": self.best,
            "best_step": self.best_step,
            "num_collapsed": self.num_collapsed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.curve, self.best = list(state["curve"]), state["best"]
        self.best_step, self.num_collapsed = state["best_step"], state["num_collapsed"]


def _foreground_share(counts: NDArray[np.int64]) -> float:
    """The share of ``counts`` (C,) that is not background; 0 of none."""
    total = int(counts.sum())
    return 1 - int(counts[BACKGROUND_INDEX]) / total if total else 0.0


def warn_of_collapse(
    segmenter: Segmenter, dataset: TrainingData, runtime: Runtime, progress: Progress, names: Sequence[str]
) -> None:
    """Warn when the trained net says one thing everywhere: background, or a single class where the masks hold others.

    It is looked at on the first training crops.  A single class is warned of where a quarter of the crops with objects
    or more hold another one.  Masks without any object are warned of instead.

    Args:
        segmenter: Put into evaluation mode on the runtime's device.
        dataset: Samples with ``images`` and ``masks``.
        runtime: The device.
        progress: Hears the warning.
        names: The classes, background first.
    """
    import torch

    samples = [dataset.get(index, 0) for index in range(min(len(dataset), _NUM_CROPS))]
    masked = [set(np.unique(sample["masks"]).tolist()) - {BACKGROUND_INDEX, IGNORE_INDEX} for sample in samples]
    if not any(masked):
        progress.warn(
            f"the masks of the first {len(samples)} training crops hold no object pixel; check the pseudo-masks "
            "(make_masks.threshold too high, or a refinement that removes everything)"
        )
        return
    device = resolve_device(runtime)
    segmenter.to(device).eval()
    predicted: set[int] = set()
    with torch.inference_mode():
        for sample in samples:
            logits = segmenter(to_network_input(torch.from_numpy(sample["images"][None]), device))
            predicted |= set(logits.argmax(1).unique().tolist()) - {BACKGROUND_INDEX}
            if len(predicted) > 1:
                return
    num_others = sum(bool(classes - predicted) for classes in masked)
    if not predicted:
        progress.warn(
            f"the segmenter predicts only background on {len(samples)} training crops; train longer, raise "
            "training.learning_rate, or use loss: balanced_cross_entropy"
        )
    elif _COLLAPSED_RATIO * sum(map(bool, masked)) <= num_others:
        progress.warn(
            f"the segmenter predicts no class but {names[predicted.pop()]} on {len(samples)} training crops, and the "
            f"masks of {num_others} of them hold others; train longer, lower training.learning_rate, or give the other "
            "classes more images"
        )
