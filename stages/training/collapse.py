"""Whether a trained segmenter says anything but background, on a few of its training crops.

Reads some samples; writes nothing.  Torch is imported by the function only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from stages.contracts import BACKGROUND_INDEX, IGNORE_INDEX, Progress, Runtime
from stages.data.transforms import to_network_input
from stages.ops.devices import resolve_device

if TYPE_CHECKING:
    from stages.data.batches import TrainingData
    from stages.nets.segmenters.segmenter import Segmenter

NUM_COLLAPSE_SAMPLES = 16
"""Training crops that are looked at after the training."""


def warn_of_collapse(segmenter: Segmenter, dataset: TrainingData, runtime: Runtime, progress: Progress) -> None:
    """Warn when the trained net says background everywhere on crops whose masks hold objects, or none holds any.

    Args:
        segmenter: Put into evaluation mode on the runtime's device.
        dataset: Samples with ``images`` and ``masks``.
        runtime: The device.
        progress: Told.
    """
    import torch

    samples = [dataset.get(index, 0) for index in range(min(len(dataset), NUM_COLLAPSE_SAMPLES))]
    if not any(_has_foreground(sample["masks"]) for sample in samples):
        progress.warn(
            f"the masks of the first {len(samples)} training crops hold no object pixel; check the pseudo-masks "
            "(make_masks.threshold too high, or a refinement that removes everything)"
        )
        return
    device = resolve_device(runtime)
    segmenter.to(device).eval()
    with torch.inference_mode():
        for sample in samples:
            logits = segmenter(to_network_input(torch.from_numpy(sample["images"][None]), device))
            if bool((logits.argmax(1) != BACKGROUND_INDEX).any()):
                return
    progress.warn(
        f"the segmenter predicts only background on {len(samples)} training crops; train longer, raise "
        "training.learning_rate, or use loss: balanced_cross_entropy"
    )


def _has_foreground(mask: NDArray[Any]) -> bool:
    return bool(((mask != BACKGROUND_INDEX) & (mask != IGNORE_INDEX)).any())
