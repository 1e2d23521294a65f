"""Train the head that says which cells belong together, on confident pseudo-masks and frozen features.

Reads: images, the trained classifier, masks of ``make_masks`` with ``confident``.  Writes ``affinity.safetensors`` and
``affinity.json``, and a checkpoint while it trains.  Torch is imported by the functions only.
Shapes: B images, H W pixels of a crop, h w cells.
Source: PSA (Ahn and Kwak, CVPR 2018, §3.2).
Differs: only the head learns; a cell's label is that of the pixel at its centre.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from stages.contracts import ImageSet, Progress, Runtime
from stages.data.transforms import Augmenter
from stages.errors import InputError
from stages.masks.refinements.affinity import AffinityConfig, AffinityDescription, is_trained, save_head
from stages.training.config import TrainingConfig
from stages.training.loop import train
from stages.training.masked_images import MaskedImages
from stages.training.randomness import seed_initial_weights

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stages.nets.backbones.network import Backbone
    from stages.ops.step import StepInfo


def ensure_affinity(
    config: AffinityConfig,
    *,
    make_labels: Callable[[Path], float],
    classifier: Path,
    images: ImageSet,
    seed: int,
    out: Path,
    progress: Progress,
    runtime: Runtime,
) -> None:
    """Train the head under ``out`` where it is not there; of several processes at ``out`` one does, the others wait.

    Labels and checkpoint lie under ``out/affinity`` until it is trained, so that a stopped call continues.

    Args:
        config: As for ``train_affinity``.
        make_labels: Writes ``masks/<id>.png`` under a folder, or goes on with them: what the pixels of each training
            image surely are, 255 elsewhere; returns the share of pixels that are of an object.
        classifier: As for ``train_affinity``, like the rest.
        images: The data set.
        seed: Decides the training.
        out: Where the head is written.
        progress: Told of steps, and of waiting.
        runtime: Device and workers.

    Raises:
        InputError: no pixel is surely of an object, or as ``train_affinity``.
        WsssError: as ``make_labels`` and ``train_affinity``.
    """
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    work, lock = out / "affinity", FileLock(out / ".tmp-affinity.lock", fallback_to_soft=False)
    if is_trained(out) and not work.exists():
        return
    try:
        lock.acquire(blocking=False)
    except Timeout:
        progress.info("waiting: another process learns the affinity")
        lock.acquire()
    try:
        if not is_trained(out):
            if make_labels(work) == 0:
                raise InputError(
                    "affinity learns from pixels that are surely of an object, and no training image has any; lower "
                    f"make_masks.affinity.confident.foreground_threshold ({config.confident.foreground_threshold}), or "
                    "train the classifier longer"
                )
            train_affinity(
                config,
                masks=work / "masks",
                classifier=classifier,
                images=images,
                seed=seed,
                work=work,
                out=out,
                progress=progress,
                runtime=runtime,
            )
        shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()


def train_affinity(
    config: AffinityConfig,
    *,
    masks: Path,
    classifier: Path,
    images: ImageSet,
    seed: int,
    work: Path,
    out: Path,
    progress: Progress,
    runtime: Runtime,
) -> None:
    """Train a head on the classifier's features, from the checkpoint in ``work`` where there is one.

    Args:
        config: Its size, its pairs and its training.
        masks: Folder of ``<id>.png``: what the pixels of each training image surely are, 255 elsewhere.
        classifier: Output folder of ``train_classifier``; its network stays as it is.
        images: The data set.
        seed: Decides the first weights, the order and the crops.
        work: Where the checkpoint is.
        out: Where the head is written when it is done.
        progress: Told of steps and losses.
        runtime: Device and workers.

    Raises:
        InputError: no training image has labels, or the loss is not finite.
        EnvironmentFailure: the device is missing or out of memory.
        DamagedFileError: the classifier or a mask does not read back.
    """
    from stages.methods.classifier_files import load_classifier
    from stages.nets.affinity import find_levels
    from stages.ops.devices import resolve_device

    records = [record for record in images.index.split("train") if record.labels]
    if not records:
        raise InputError("affinity is learned from training images with labels, and none has any; leave affinity out")
    network, _ = load_classifier(classifier, resolve_device(runtime))
    levels = find_levels(network.backbone)
    description = AffinityDescription(levels=tuple(levels), channels=config.channels, stride_px=config.stride_px)
    seed_initial_weights(seed)
    head = description.build()
    history = train(
        head,
        objective=_Objective(network.backbone, description, config.radius_cells),
        dataset=MaskedImages(images, records, masks, Augmenter(config.augment), seed),
        config=TrainingConfig(
            epochs=config.epochs, batch_size=config.batch_size, learning_rate=config.learning_rate, weight_decay=1e-4
        ),
        parameter_groups=[{"params": list(head.parameters())}],
        seed=seed,
        out=work,
        progress=progress,
        runtime=runtime,
        task="train affinity",
    )
    save_head(out, description.model_copy(update={"history": tuple(history)}), head)


class _Objective:
    """The loss of the head on one batch of crops and their labels."""

    def __init__(self, backbone: Backbone, description: AffinityDescription, radius: int) -> None:
        import torch

        self._backbone = backbone.eval().to(memory_format=torch.channels_last)
        self._names = [name for name, _ in description.levels]
        self._stride_px, self._radius = description.stride_px, radius

    def __call__(self, head: nn.Module, batch: dict[str, Tensor], step: StepInfo) -> dict[str, Tensor]:
        from torch.nn import functional

        from stages.nets.affinity import read_levels
        from stages.ops.affinity import pair_losses

        del step
        embedding = head(read_levels(self._backbone, self._names, batch["images"], self._stride_px))
        size = list(embedding.shape[2:])
        labels = functional.interpolate(batch["masks"][:, None].float(), size, mode="nearest-exact")[:, 0].long()
        return pair_losses(embedding, labels, self._radius)
