"""A segmenter on disk that says different things of different pixels, without a training."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stages.nets.segmenters.build import build_segmenter
from stages.nets.segmenters.config import LargeFovConfig, SegmenterConfig
from stages.nets.segmenters.deeplab_v2 import DeepLabV2
from stages.nets.segmenters.files import save_segmenter

CLASSES = ("auk", "bee")
SMALL = LargeFovConfig.model_validate({"backbone": {"name": "small"}})


def save_lively_segmenter(folder: Path, config: SegmenterConfig = SMALL, *, seed: int = 0) -> Path:
    """The output folder of a train_segmenter that drew its weights; its last layer is strong and without bias."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = build_segmenter(config, len(CLASSES) + 1, init="random", weights={})
        for layer in net.aspp if isinstance(net, DeepLabV2) else [net.classifier]:
            torch.nn.init.normal_(layer.weight, std=1.0)
    save_segmenter(folder, config, net, CLASSES)
    return folder


def save_noise(path: Path, size: tuple[int, int], *, seed: int = 0) -> Path:
    """An image of coloured blobs, (height, width)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC).save(path)
    return path
