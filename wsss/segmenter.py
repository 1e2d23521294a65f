"""A trained segmenter for single images: from ``wsss export``, from a run, or from the folder of a stage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from stages.contracts import SilentProgress, expand_path, read_json
from stages.errors import DamagedFileError, InputError
from wsss.pictures import Picture, read_picture

if TYPE_CHECKING:
    import torch

    from stages.scoring.image_prediction import SegmenterSource
    from stages.scoring.prediction import PredictionConfig


class Segmenter:
    """A network with the names of its classes and its way to look at images."""

    def __init__(self, source: SegmenterSource, prediction: PredictionConfig, *, device: str = "auto") -> None:
        """Load the network of ``source``; most callers use ``load``."""
        from stages.contracts import Runtime
        from stages.ops.devices import resolve_device

        self.classes: tuple[str, ...] = source.classes
        """C names, background first: mask value i means ``classes[i]``."""
        self._prediction = prediction
        self._device: torch.device = resolve_device(Runtime(device=device))
        self._model = source.load(str(self._device))

    @classmethod
    def load(
        cls, where: str | os.PathLike[str], *, device: str = "auto", artifacts: str | os.PathLike[str] = "artifacts"
    ) -> Self:
        """Load a segmenter.

        Args:
            where: A folder that ``wsss export`` wrote; a ``train_segmenter`` folder; a config or a run.
            device: auto, cpu, mps, cuda or cuda:N.
            artifacts: The store of a config or run.

        Raises:
            InputError: there is no such folder or config, or the config trains no segmenter.
            MissingArtifactError: the config's segmenter is not in the store.
            DamagedFileError: a file is missing, damaged or edited.
            EnvironmentFailure: the device is not there.
        """
        from stages.nets.segmenters.files import WEIGHTS_FILE
        from stages.scoring.exported_model import CONFIG_FILE, exported_source, read_export, trained_source
        from stages.scoring.prediction import PredictionConfig

        path = expand_path(os.fspath(where))
        if path.is_dir() and (path / WEIGHTS_FILE).is_file():
            _check_artifact(path)
            return cls(trained_source(path), PredictionConfig(), device=device)
        if path.is_dir() or path.name == CONFIG_FILE:
            folder, record = read_export(path)
            return cls(exported_source(folder, record), record.prediction, device=device)
        from pipeline.delivery.trained_segmenter import find_segmenter

        found = find_segmenter(str(where), None, str(artifacts), doing="Segmenter.load")
        return cls(trained_source(found.artifact.path), found.prediction, device=device)

    def predict(self, image: Picture, **options: Any) -> NDArray[np.uint8]:  # noqa: ANN401 - of any field
        """The class of every pixel, uint8 (H, W): 0 background, i ``classes[i]``.

        Args:
            image: A path, a PIL image, or RGB as uint8 (H, W, 3).
            options: Fields of ``PredictOptions``: ``scales``, ``flip``, ``crf`` (a preset's name, a ``CrfConfig`` or
                None), ``short_side_px``, ``window_px``, ``precision``; by default as the segmenter's config says.

        Raises:
            InputError: an option or the image is wrong.
        """
        import torch

        from stages.ops.devices import check_precision, deterministic
        from stages.scoring.network_pass import refine_prediction
        from stages.scoring.window_prediction import PicturePredictor

        chosen = self._options(options)
        check_precision(chosen.precision, self._device, "precision")
        pixels = read_picture(image)
        predictor = PicturePredictor(self._model, len(self.classes), chosen, self._device, SilentProgress())
        with torch.inference_mode(), deterministic(self._device):
            ((mask, probabilities),) = predictor.predict(pixels[None])
        if mask is None:
            assert probabilities is not None
            assert chosen.crf is not None
            mask = refine_prediction(pixels, probabilities, chosen.crf, device=str(self._device))
        return mask

    def probabilities(self, image: Picture, **options: Any) -> NDArray[np.float32]:  # noqa: ANN401 - of any field
        """Probabilities of the classes before any CRF, float32 (C, H, W) summing to 1 over C.

        Arguments as for ``predict``; the image is seen at once, not in windows.
        """
        import torch

        from stages.data.transforms import to_network_input
        from stages.ops.devices import check_precision, deterministic
        from stages.ops.multi_scale import multi_scale_probabilities

        chosen = self._options(options)
        check_precision(chosen.precision, self._device, "precision")
        images = torch.from_numpy(read_picture(image)[None])
        with torch.inference_mode(), deterministic(self._device):
            found = multi_scale_probabilities(
                self._model,
                to_network_input(images, self._device),
                scales=chosen.scales,
                flip=chosen.flip,
                short_side_px=chosen.short_side_px,
                precision=chosen.precision,
            )
        return found[0].cpu().numpy()

    def _options(self, given: dict[str, Any]) -> Any:  # noqa: ANN401 - PredictOptions, which imports late
        from pydantic import ValidationError

        from stages.scoring.window_prediction import PredictOptions

        values = PredictOptions.of(self._prediction).model_dump() | given
        if isinstance(values["crf"], str):
            values["crf"] = {"preset": values["crf"]}
        values["scales"] = tuple(values["scales"]) if isinstance(values["scales"], Sequence) else values["scales"]
        try:
            return PredictOptions.model_validate(values).resolved(str(self._device))
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors()]
            raise InputError("the options of the prediction are wrong", lines) from error


def _check_artifact(folder: Path) -> None:
    """Refuse a folder of a store whose files, the names of the classes among them, are not as they were published."""
    from pipeline.store.artifacts import MANIFEST, check_manifest, examine

    path = folder / MANIFEST
    if path.is_file():  # what a stage wrote outside of a store has none
        manifest = check_manifest(read_json(path), str(path), "train_segmenter")
        damage, _ = examine(folder, manifest["content"]["files"])
        if damage:
            raise DamagedFileError(
                f"{folder} is damaged or was edited; train_segmenter makes it again", damage.values()
            )
