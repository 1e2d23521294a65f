"""`wsss data check`: broken copies of the synthetic set, each with its message, and all of them at once."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import stages.data.check as check_module
from stages.contracts import SilentProgress, read_index_mask, voc_palette, write_index_mask
from stages.data.adapters.custom import CustomConfig
from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.voc import VocConfig
from stages.data.check import check_data, check_mask
from stages.errors import DataError, EnvironmentFailure
from stages.prepare_data import PrepareDataConfig, prepare_data
from tests.stages.data.drawn_sets import draw_set

AsCustom = Callable[..., CustomConfig]


def check(config: CustomConfig) -> list[str]:
    return check_data(config, SilentProgress(), processes=1).problems.lines()


def mask_of(folder: Path, name: str = "train_00000") -> Path:
    return folder / "SegmentationClass" / f"{name}.png"


def test_the_unbroken_set_has_no_problem(synthetic_folder: Path, as_custom: AsCustom) -> None:
    progress = SilentProgress()
    assert check_data(as_custom(synthetic_folder), progress, processes=1).problems.lines() == []
    assert progress.warnings == []


def test_a_generated_set_needs_no_files() -> None:
    assert check_data(SyntheticConfig(num_train=2, num_val=1), SilentProgress()).problems.lines() == []


def test_truncated_missing_and_false_images(broken: Path, as_custom: AsCustom) -> None:
    images = broken / "JPEGImages"
    whole = (images / "train_00001.jpg").read_bytes()
    (images / "train_00001.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "train_00002.jpg").unlink()
    (images / "train_00003.jpg").write_text("<html>404</html>", encoding="utf-8")
    Image.fromarray(np.full((64, 64), 900, dtype=np.uint16)).save(images / "val_00000.png")
    (images / "val_00000.jpg").unlink()
    text = "\n".join(check(as_custom(broken)))
    assert f"{images / 'train_00001.jpg'}: not a readable image (image file is truncated" in text
    assert "train.txt line 3: image 'train_00002' has no file in JPEGImages" in text
    assert f"{images / 'train_00003.jpg'}: not a readable image (it is a web page, perhaps a login" in text
    assert "val_00000" not in text  # 16 bits a pixel are read as everywhere


def test_an_rgb_mask(broken: Path, as_custom: AsCustom) -> None:
    path = mask_of(broken)
    Image.open(path).convert("RGB").save(path)
    assert check(as_custom(broken)) == [
        f"{path}: expected a mask of class indices (PNG mode P or L, 8 bits a pixel), found mode RGB (colours "
        "instead of indices); save the class index of each pixel, with VOC's palette if it shall look like VOC"
    ]


def test_a_mask_of_another_size_and_a_damaged_one(broken: Path, as_custom: AsCustom) -> None:
    small, cut = mask_of(broken), mask_of(broken, "val_00001")
    write_index_mask(small, np.zeros((64, 32), dtype=np.uint8))
    cut.write_bytes(cut.read_bytes()[:200])
    lines = check(as_custom(broken))
    expected = "expected 64×64 pixels (height×width) as its image has, found 64×32; make the mask at the image's size"
    assert lines[0] == f"{small}: {expected}"
    assert lines[1].startswith(f"{cut}: is no readable mask")
    assert len(lines) == 2


def test_values_that_are_no_class(broken: Path, as_custom: AsCustom) -> None:
    path = mask_of(broken)
    mask = read_index_mask(path)
    mask[:3], mask[3:6] = 77, 4
    write_index_mask(path, mask)
    assert check(as_custom(broken)) == [
        f"{path}: values 4, 77 are no class (allowed: 0 … 3 and 255); save class indices, not grey levels"
    ]


def test_a_requantised_palette_is_seen_though_its_values_are_classes(tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:4], mask[5:7] = 2, 3
    colours = Image.fromarray(voc_palette()[mask])
    path = tmp_path / "mask.png"
    colours.quantize(3, method=Image.Quantize.MEDIANCUT).save(path)
    allowed = {value: value for value in (0, 1, 2, 3, 255)}
    values, problems, moved = check_mask(path, (8, 8), allowed, is_deep=True)
    assert values is not None
    assert set(values.tolist()) <= set(allowed)
    assert problems == []
    assert len(moved) == 1
    assert "an image program re-quantised the mask" in moved[0]
    write_index_mask(path, mask)
    assert check_mask(path, (8, 8), allowed, is_deep=True)[1:] == ([], [])


def save_in_another_order(path: Path) -> None:
    """The mask's indices with the colours of classes 1 and 2 exchanged."""
    mask = Image.fromarray(read_index_mask(path))
    colours = voc_palette().copy()
    colours[[1, 2]] = colours[[2, 1]]
    mask.putpalette(colours.tobytes())
    mask.save(path)


def test_colours_in_another_order_are_a_defect_in_voc_alone(broken: Path, as_custom: AsCustom, tiny_voc: Path) -> None:
    path = next(
        path for path in sorted((broken / "SegmentationClass").iterdir()) if {1, 2} & {*read_index_mask(path).flat}
    )
    save_in_another_order(path)
    progress = SilentProgress()
    assert check_data(as_custom(broken), progress, processes=1).problems.lines() == []
    (warning,) = progress.warnings
    assert warning.startswith(f"1 masks have VOC's colours in another order; fine where that is meant, but e.g. {path}")
    for image in (tiny_voc / "JPEGImages").iterdir():
        Image.fromarray(np.zeros((24, 20, 3), dtype=np.uint8)).save(image)
    mask = mask_of(tiny_voc, "c")
    for mask in (mask_of(tiny_voc, name) for name in "abc"):
        write_index_mask(mask, np.kron(read_index_mask(mask), np.ones((2, 2), dtype=np.uint8)))
    config = VocConfig(root=tiny_voc, train_list="train")
    assert check_data(config, SilentProgress(), processes=1).problems.lines() == []
    colours = Image.fromarray(voc_palette()[read_index_mask(mask)])
    colours.quantize(5, method=Image.Quantize.MEDIANCUT).save(mask)
    (problem,) = check_data(config, SilentProgress(), processes=1).problems.lines()
    assert problem.startswith(f"{mask}: its palette is not VOC's but a re-ordered one")


def test_a_palette_of_ones_own_is_fine(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 0]], dtype=np.uint8))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "mask.png")
    assert check_mask(tmp_path / "mask.png", (2, 2), {0: 0, 1: 1, 2: 2, 255: 255}, is_deep=True)[1:] == ([], [])


def test_masks_of_0_and_255_have_no_object(broken: Path, as_custom: AsCustom) -> None:
    for path in (broken / "SegmentationClass").glob("*.png"):
        write_index_mask(path, np.where(read_index_mask(path) > 0, 255, 0).astype(np.uint8))
    lines = check(as_custom(broken))
    assert len(lines) == 1
    assert "none of the 9 masks has a pixel of a class" in lines[0]


def draw_grey(path: Path, bits: int, size: tuple[int, int] = (64, 64)) -> None:
    """A grey PNG of few bits with the values 0 and 1 in stripes, as its standard has it."""
    height, width = size
    row = int("".join(format(column % 2, f"0{bits}b") for column in range(width)), 2).to_bytes(width * bits // 8, "big")
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress((b"\0" + row) * height),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(data)) + kind + data for kind, data in chunks.items()]
    sums = [struct.pack(">I", zlib.crc32(part[4:])) for part in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(part + sum_ for part, sum_ in zip(parts, sums, strict=True)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits_are_named_by_their_bits(bits: int, broken: Path, as_custom: AsCustom) -> None:
    path = mask_of(broken)
    draw_grey(path, bits)
    assert check(as_custom(broken)) == [
        f"{path}: expected a mask of class indices (PNG mode P or L, 8 bits a pixel), found a grey one of {bits} "
        f"{'bit' if bits == 1 else 'bits'} a pixel, whose values stand for levels of grey; save the class index of "
        "each pixel, with VOC's palette if it shall look like VOC"
    ]
    with pytest.raises(DataError, match=f"a grey one of {bits} bit"):
        read_index_mask(path)
    assert check_mask(path, (64, 64), {0: 0}, is_deep=False)[1] != [], "its header is enough"


def test_masks_of_16_bits_are_named_by_their_bits(broken: Path, as_custom: AsCustom) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(mask_of(broken))
    assert "8 bits a pixel), found mode I;16 (16 bits a pixel); save the" in check(as_custom(broken))[0]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_palette_masks_of_few_bits_hold_their_indices(bits: int, broken: Path, as_custom: AsCustom) -> None:
    mask = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2).astype(np.uint8))
    mask.putpalette(voc_palette().tobytes())
    mask.save(mask_of(broken), bits=bits)
    assert check(as_custom(broken)) == []
    assert np.array_equal(read_index_mask(mask_of(broken)), np.asarray(mask))


def numbered(folder: Path, masks: Sequence[NDArray[np.uint8]]) -> list[str]:
    """What check warns of masks of images whose labels are cat, dog, cat, dog …, beside what it says of splits."""
    root = draw_set(folder / "set", ["cat", "dog"] * (len(masks) // 2), values=[1] * len(masks))
    for number, mask in enumerate(masks):
        write_index_mask(root / f"masks/p{number:02d}.png", mask)
    checked, prepared = SilentProgress(), SilentProgress()
    config = CustomConfig(root=root, val_ratio=0.5)
    assert check_data(config, checked, processes=1).problems.lines() == []
    prepare_data(PrepareDataConfig(), data=config, out=folder / "out", progress=prepared)
    assert len(prepared.warnings) == len(checked.warnings), "a run says it too"
    return checked.warnings


def block(value: int, ground: int) -> NDArray[np.uint8]:
    """A mask with a block."""
    mask = np.full((24, 32), ground, dtype=np.uint8)
    mask[8:16, 8:20] = value
    return mask


def test_masks_without_a_pixel_of_background_are_warned_of(tmp_path: Path) -> None:
    (text,) = numbered(tmp_path, [block(1, 255), block(2, 255)] * 4)
    assert text == (
        "none of the 8 masks has a pixel 0, which is background, and 8 have 255, which counts nowhere; is background "
        "another value?  Then save background as 0 and the i-th class as i, counted from 1"
    )
    assert numbered(tmp_path / "right", [block(1, 0), block(2, 0)] * 4) == []
    assert numbered(tmp_path / "one", [block(1, 255), block(2, 0)] * 4) == [], "crops of an object may have none"


def test_masks_that_count_the_classes_from_0_are_warned_of(tmp_path: Path) -> None:
    for ground in (2, 255):
        warnings = numbered(tmp_path / str(ground), [block(0, ground), block(1, ground)] * 4)
        assert (
            "8 of 8 masks fit their image's labels if value 0 is the first class, 0 as they are; save background as 0 "
            "and the i-th class as i, counted from 1"
        ) in warnings


def test_masks_of_one_value_are_warned_of(tmp_path: Path) -> None:
    masks = [block(1, 0), block(2, 0)] * 4
    (text,) = numbered(tmp_path, [block(1, 1), block(2, 2), *masks, *masks])
    assert text.startswith("2 of 18 masks have one value all over, a class or 255: 'p00', 'p01'; are")
    (one, two) = numbered(tmp_path / "void", [block(255, 255), block(255, 255), *masks, *masks])
    assert one.startswith("2 of 18 masks have one value all over, a class or 255: 'p00', 'p01'; are")
    assert two.startswith("2 of 18 masks of images with labels have none of the classes: 'p00', 'p01'; are objects")


def test_masks_whose_object_is_255_are_warned_of_where_others_have_theirs(tmp_path: Path) -> None:
    (text,) = numbered(tmp_path, [block(1, 0), block(255, 0), *[block(1, 0), block(2, 0)] * 4])
    assert text == (
        "1 of 10 masks of images with labels have none of the classes: 'p01'; are objects saved as 0 or 255, or are "
        "they not drawn?"
    )


def test_problems_of_every_kind_are_said_at_once(broken: Path, as_custom: AsCustom) -> None:
    labels, lists = broken / "labels.csv", broken / "ImageSets/Segmentation"
    labels.write_text(labels.read_text(encoding="utf-8") + "ghost,auk\n", encoding="utf-8")
    labels.write_text(labels.read_text(encoding="utf-8").replace("\ntrain_00000,", "\ntrain_00000,bea "), "utf-8")
    (lists / "val.txt").write_text("val_00000\nval_00000\ntrain_00001\n", encoding="utf-8")
    (broken / "JPEGImages/train_00004.jpg").write_bytes(b"no image")
    path = mask_of(broken, "train_00005")
    Image.open(path).convert("RGBA").save(path)
    text = "\n".join(check(as_custom(broken)))
    for part in (
        "labels.csv line 11: image 'ghost' has no file in JPEGImages; remove the line or add the image",
        "labels.csv line 2: unknown class 'bea', did you mean 'bee'?",
        "val.txt line 2: image 'val_00000' stands on line 1 already",
        "1 images stand in both train (train.txt) and val (val.txt): 'train_00001'",
        "train_00004.jpg: not a readable image",
        "found mode RGBA",
    ):
        assert part in text
    (lists / "val.txt").write_text("", encoding="utf-8")
    assert "val.txt: the val list is empty" in "\n".join(check(as_custom(broken)))


def test_header_checks_read_no_pixel(broken: Path) -> None:
    path = mask_of(broken)
    write_index_mask(path, np.full((64, 64), 200, dtype=np.uint8))
    assert check_mask(path, (64, 64), {0: 0}, is_deep=False) == (None, [], [])
    assert len(check_mask(path, (60, 64), {0: 0}, is_deep=False)[1]) == 1


@pytest.mark.slow
def test_several_processes_give_the_same_lines_in_the_same_order(broken: Path, as_custom: AsCustom) -> None:
    for name in ("train_00001", "val_00002"):
        (broken / f"JPEGImages/{name}.jpg").write_bytes(b"no image")
    config = as_custom(broken)
    assert check_data(config, SilentProgress(), processes=2).problems.lines() == check(config)


def test_a_killed_worker_is_the_machines_fault(
    broken: Path, as_custom: AsCustom, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed:
        def __init__(self, **options: object) -> None: ...

        def __enter__(self) -> Killed:
            return self

        def __exit__(self, *reason: object) -> None: ...

        def map(self, *work: object) -> Iterator[object]:
            raise BrokenProcessPool

    monkeypatch.setattr(check_module, "ProcessPoolExecutor", Killed)
    with pytest.raises(EnvironmentFailure, match=r"lower runtime\.processes"):
        check_data(as_custom(broken), SilentProgress(), processes=2)
