"""Masks to every tool and back, and what is wrong with what comes back."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from stages.annotation.exchange import FormatName, export_masks, find_masks, import_masks, list_images
from stages.contracts import ClassList, ImageRecord, encode_index_mask, read_index_mask, voc_palette, write_index_mask
from stages.errors import ConfigError, DataError, InputError

pytest.importorskip("pycocotools")

CLASSES = ClassList(names=("cat", "fire hydrant"))
SIZE = (60, 80)
FORMATS: tuple[FormatName, ...] = ("coco", "voc", "labelstudio", "cvat")
FILES = {
    "coco": ["annotations.json"],
    "voc": ["SegmentationClass", "ImageSets", "labelmap.txt"],
    "labelstudio": ["tasks.json", "labels.xml"],
    "cvat": ["annotations.xml"],
}


def ellipse(size: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[: size[0], : size[1]]
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1


def smooth() -> NDArray[np.uint8]:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[ellipse(SIZE, (30, 25), (20, 18))] = 1
    mask[ellipse(SIZE, (25, 62), (14, 12))] = 2
    mask[50:, 40:] = 255
    return mask


def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).choice(np.array([0, 1, 2, 255], dtype=np.uint8), SIZE)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A folder with ``images`` (one in a sub-folder), ``masks`` of them, one of noise, one without any object."""
    masks = {"a": smooth(), "day/b": noise(), "c": np.zeros(SIZE, dtype=np.uint8)}
    for name, mask in masks.items():
        write_index_mask(tmp_path / "masks" / f"{name}.png", mask)
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE[::-1]).save(tmp_path / "images" / f"{name}.jpg")
    return tmp_path


def send(world: Path, format: FormatName, **options: Any) -> Path:
    out = world / f"out-{format}"
    export_masks(find_masks(world / "masks"), list_images(world / "images"), CLASSES, out, format=format, **options)
    if format == "labelstudio":
        submit(out / "tasks.json")
    return out


def submit(tasks: Path) -> None:
    """What an annotator does who finds every prediction right; Label Studio's export keeps both."""
    content = json.loads(tasks.read_text())
    for task in content:
        task["annotations"] = [{"was_cancelled": False, "result": task["predictions"][0]["result"]}]
    tasks.write_text(json.dumps(content))


def fetch(world: Path, source: Path, format: FormatName) -> dict[str, NDArray[np.uint8]]:
    read = import_masks(source, list_images(world / "images"), CLASSES, format=format)
    read.write(world / "back")
    return {name: read_index_mask(path) for name, path in find_masks(world / "back").items()}


def problems(world: Path, source: Path, format: FormatName) -> str:
    """The error of an import, which writes nothing."""
    with pytest.raises(InputError) as caught:
        fetch(world, source, format)
    assert not (world / "back").exists()
    return str(caught.value)


def edited(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_masks_come_back_to_the_byte(world: Path, format: FormatName):
    out = send(world, format)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES[format])
    read = import_masks(out, list_images(world / "images"), CLASSES, format=format)
    expected = {name: path.read_bytes() for name, path in find_masks(world / "masks").items()}
    assert dict(read.masks) == expected
    assert read.empty == ("c",)


@pytest.mark.parametrize("format", FORMATS)
def test_a_zip_reads_as_its_folder(world: Path, format: FormatName):
    out = send(world, format)
    with zipfile.ZipFile(world / "packed.zip", "w") as archive:
        for path in out.rglob("*"):
            archive.write(path, path.relative_to(out))
    back = fetch(world, world / "packed.zip", format)
    np.testing.assert_array_equal(back["a"], smooth())


@pytest.mark.parametrize("format", ["coco", "labelstudio", "cvat"])
def test_polygons_cover_smooth_objects(world: Path, format: FormatName):
    back = fetch(world, send(world, format, shapes="polygons"), format)
    for value in (1, 2, 255):
        found, expected = back["a"] == value, smooth() == value
        assert (found & expected).sum() >= 0.97 * (found | expected).sum(), value
    # specks of noise have no outline worth the name: each comes back as the exact mask that it was written as
    agreement = (back["day/b"] == noise()).mean()
    assert agreement > 0.95


def test_an_object_with_a_hole_is_a_mask_among_polygons(world: Path):
    ring = np.zeros(SIZE, dtype=np.uint8)
    ring[ellipse(SIZE, (30, 40), (25, 30))] = 1
    ring[ellipse(SIZE, (30, 40), (10, 12))] = 0
    ring[28:32, 38:42] = 2
    write_index_mask(world / "masks" / "a.png", ring)
    out = send(world, "coco", shapes="polygons")
    content = json.loads((out / "annotations.json").read_text())
    image = next(image["id"] for image in content["images"] if image["file_name"] == "a.jpg")
    kinds = [(entry["category_id"], entry["iscrowd"]) for entry in content["annotations"] if entry["image_id"] == image]
    assert kinds == [(1, 1), (2, 0)]
    back = fetch(world, out, "coco")["a"]
    np.testing.assert_array_equal(back == 1, ring == 1)


def test_files_of_images_in_one_folder_are_named_without_it(world: Path):
    records = [ImageRecord(id="a", image="JPEGImages/a.jpg", size=SIZE)]
    masks = {"a": world / "masks" / "a.png"}
    export_masks(masks, records, CLASSES, world / "out", format="coco")
    content = json.loads((world / "out/annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg"]
    assert content["categories"] == [
        {"id": 1, "name": "cat", "supercategory": ""},
        {"id": 2, "name": "fire hydrant", "supercategory": ""},
        {"id": 255, "name": "unsure", "supercategory": ""},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What tools write otherwise than we do
# ---------------------------------------------------------------------------------------------------------------------


def test_coco_of_other_tools(world: Path):
    """Other ids, a path before the name, uncompressed run lengths, two polygons of one object, a later one on top."""
    content = {
        "info": {},
        "images": [{"id": "x", "file_name": "task/a.jpg", "height": 60, "width": 80}],
        "categories": [{"id": 9, "name": "fire hydrant"}, {"id": 4, "name": "cat"}],
        "annotations": [
            {"image_id": "x", "category_id": 9, "segmentation": {"size": [60, 80], "counts": [60, 120, 4620]}},
            {
                "image_id": "x",
                "category_id": 4,
                "segmentation": [[2, 0, 4, 0, 4, 5, 2, 5], [10, 0, 12, 0, 12, 5, 10, 5]],
            },
        ],
    }
    (world / "task.json").write_text(json.dumps(content))
    expected = np.zeros(SIZE, dtype=np.uint8)
    expected[:, 1:3] = 2  # run lengths go down the columns
    expected[:5, 2:4] = expected[:5, 10:12] = 1
    np.testing.assert_array_equal(fetch(world, world / "task.json", "coco")["a"], expected)


def test_cvat_paints_by_z_order(world: Path):
    (world / "task.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?><annotations><version>1.1</version>'
        '<image id="0" name="x/a.jpg" width="80" height="60"><tag label="night"/>'
        '<polygon label="cat" points="0,0;8,0;8,4;0,4" z_order="1"/>'
        '<mask label="background" rle="1, 2, 1" left="6" top="0" width="2" height="2" z_order="2"/>'
        '<polygon label="fire hydrant" points="0,0;80,0;80,2;0,2" z_order="0"/></image></annotations>'
    )
    expected = np.zeros(SIZE, dtype=np.uint8)
    expected[:2] = 2
    expected[:4, :8] = 1
    expected[0, 7] = expected[1, 6] = 0
    np.testing.assert_array_equal(fetch(world, world / "task.xml", "cvat")["a"], expected)


def test_label_studio_finds_images_by_every_address(world: Path):
    out = send(world, "labelstudio")
    addresses = iter(["/data/local-files/?d=shots%2Fa.jpg", "/data/upload/3/0a1b2c3d-c.jpg", "s3://bucket/day/b.jpg"])

    def readdress(tasks: list[dict[str, Any]]) -> None:
        for task in tasks:
            task["data"] = {"image": next(addresses)}

    edited(out / "tasks.json", readdress)
    assert set(fetch(world, out / "tasks.json", "labelstudio")) == {"a", "c", "day/b"}


def test_label_studio_is_told_of_images_below_the_folder_that_it_serves(world: Path):
    """It gives out no file that lies in its document root itself (io_storages/localfiles of 1.13)."""
    out = world / "out"
    masks, records = find_masks(world / "masks"), list_images(world / "images")
    done = export_masks(masks, records, CLASSES, out, format="labelstudio", root=world / "images")
    assert done.image_folder == world / "images"
    addresses = [task["data"]["image"] for task in json.loads((out / "tasks.json").read_text())]
    assert addresses == [f"/data/local-files/?d=images/{name}.jpg" for name in ("a", "c", "day/b")]
    submit(out / "tasks.json")
    assert set(fetch(world, out / "tasks.json", "labelstudio")) == {"a", "c", "day/b"}


def test_label_studio_leaves_open_tasks_alone(world: Path):
    out = send(world, "labelstudio")

    def change(tasks: list[dict[str, Any]]) -> None:
        tasks[0]["annotations"] = []
        tasks[1]["annotations"][0]["was_cancelled"] = True

    edited(out / "tasks.json", change)
    read = import_masks(out / "tasks.json", list_images(world / "images"), CLASSES, format="labelstudio")
    assert len(read.masks) == 1
    assert read.num_open == 2


def test_voc_reads_colours_and_palettes_that_an_editor_sorted_anew(world: Path):
    mask = smooth()
    colours = Image.fromarray(voc_palette()[mask])
    (world / "edited").mkdir()
    colours.save(world / "edited" / "a.png")
    np.testing.assert_array_equal(fetch(world, world / "edited", "voc")["a"], mask)
    sorted_anew = Image.fromarray(np.vectorize({0: 3, 1: 0, 2: 1, 255: 2}.__getitem__)(mask).astype(np.uint8))
    sorted_anew.putpalette(voc_palette()[[1, 2, 255, 0]].tobytes())
    sorted_anew.save(world / "edited" / "a.png")
    read = import_masks(world / "edited", list_images(world / "images"), CLASSES, format="voc")
    assert read.masks["a"] == encode_index_mask(mask)


def test_voc_takes_names_from_the_label_map(world: Path):
    """CVAT sorts labels: the map says which index is which class."""
    out = send(world, "voc")
    text = (out / "labelmap.txt").read_text()
    assert text.splitlines()[1:] == [
        "background:0,0,0::",
        "cat:128,0,0::",
        "fire hydrant:0,128,0::",
        "unsure:224,224,192::",
    ]
    (out / "labelmap.txt").write_text(
        "background:0,0,0::\nfire hydrant:128,0,0::\ncat:0,128,0::\nunsure:224,224,192::\n"
    )
    back = fetch(world, out, "voc")["a"]
    np.testing.assert_array_equal(back, np.array([0, 2, 1], dtype=np.uint8)[smooth() % 255] | 255 * (smooth() == 255))


def test_drawn_classes_that_an_image_is_not_labelled_with_are_told(world: Path):
    out = send(world, "coco")
    records = [record.model_copy(update={"labels": (0,)}) for record in list_images(world / "images")]
    read = import_masks(out, records, CLASSES, format="coco")
    assert dict(read.strange) == {"a": ("fire hydrant",), "day/b": ("fire hydrant",)}


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------------------------------


def test_export_names_every_mask_that_does_not_fit(world: Path):
    write_index_mask(world / "masks" / "gone.png", smooth())
    write_index_mask(world / "masks" / "a.png", smooth()[:-1])
    write_index_mask(world / "masks" / "c.png", np.full(SIZE, 3, dtype=np.uint8))
    with pytest.raises(DataError) as caught:
        send(world, "coco")
    text = str(caught.value)
    assert "there is no image 'gone'" in text
    assert "expected 60 × 80 pixels as its image, found 59 × 80" in text
    assert "expected values 0 … 3 and 255, found [3]" not in text
    assert "expected values 0 … 2 and 255, found [3]" in text
    assert not (world / "out-coco").exists()


def test_export_refuses_a_folder_in_use_and_polygons_of_voc(world: Path):
    (world / "out-coco").mkdir()
    (world / "out-coco" / "notes.txt").touch()
    with pytest.raises(InputError, match="is in use"):
        send(world, "coco")
    with pytest.raises(InputError, match="holds masks"):
        send(world, "voc", shapes="polygons")


@pytest.mark.parametrize("names", [("cat", "unsure"), ("background",), ("cat", "cat"), (" cat",)])
def test_class_names_with_a_meaning_are_refused(world: Path, names: tuple[str, ...]):
    with pytest.raises(ConfigError, match="class list"):
        export_masks(
            find_masks(world / "masks"),
            list_images(world / "images"),
            ClassList(names=names),
            world / "out",
            format="coco",
        )


def test_every_problem_of_an_import_is_named(world: Path):
    out = send(world, "coco")

    def change(content: dict[str, Any]) -> None:
        images = {image["file_name"]: image for image in content["images"]}
        images["a.jpg"]["height"] = 61
        images["c.jpg"]["file_name"] = "other.jpg"
        content["categories"][0]["name"] = "dog"

    edited(out / "annotations.json", change)
    text = problems(world, out, "coco")
    assert "expected the classes cat, fire hydrant; the file has dog" in text
    assert "the file lacks cat" in text
    assert "a.jpg: expected 60 × 80 pixels as its image, found 61 × 80" in text
    assert "other.jpg: is of no image" in text
    assert "day/b.jpg: 'dog' is no class" in text


@pytest.mark.parametrize("counts", ["", "4", "zzzz", "é", [60], [-1, 4801], [4801]])
def test_run_lengths_of_another_image_are_refused(world: Path, counts: str | list[int]):
    """pycocotools would give what stands in memory for the first two."""
    out = send(world, "coco")
    edited(out / "annotations.json", lambda content: content["annotations"][0]["segmentation"].update(counts=counts))
    assert "run lengths" in problems(world, out, "coco")


def test_shapes_of_another_size_are_refused(world: Path):
    out = send(world, "coco")
    far = [[0, 0, 500, 0, 500, 20]]
    edited(out / "annotations.json", lambda content: content["annotations"][0].update(segmentation=far))
    assert "leaves the image of 60 × 80 pixels" in problems(world, out, "coco")
    edited(out / "annotations.json", lambda content: content["annotations"][0].update(segmentation=[[0, 0, 5, 5]]))
    assert "at least 3 points" in problems(world, out, "coco")
    edited(out / "annotations.json", lambda content: content["annotations"][0].update(segmentation=[]))
    assert "has no pixels" in problems(world, out, "coco")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b"\xff\xfe{}", b"[]", b'{"images": 3}', b'{"images": [NaN]}']
)
def test_broken_json_is_refused(world: Path, data: bytes):
    (world / "bad.json").write_bytes(data)
    for format in ("coco", "labelstudio"):
        assert "bad.json" in problems(world, world / "bad.json", format)


def test_infinite_points_are_refused(world: Path):
    out = send(world, "coco")
    path = out / "annotations.json"
    edited(path, lambda content: content["annotations"][0].update(segmentation=[[0, 0, 7, 0, 7, 1234567]]))
    path.write_text(path.read_text().replace("1234567", "Infinity"))
    assert "annotations.json" in problems(world, out, "coco")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not readable XML"),
        ("<annotations>", "not readable XML"),
        (f"{BOMB}<annotations>&b;</annotations>", "document type"),
        ('<!DOCTYPE x SYSTEM "file:///etc/hostname"><annotations/>', "document type"),
        ("<boxes/>", "expected CVAT's <annotations>"),
        ("<annotations/>", "has no annotated image"),
        ('<annotations><image name="a.jpg" width="80"/></annotations>', "lacks or garbles 'height'"),
        ('<annotations><image name="a.jpg" width="80" height="6o"/></annotations>', "lacks or garbles"),
    ],
)
def test_broken_xml_is_refused(world: Path, text: str, expected: str):
    (world / "bad.xml").write_text(text)
    assert expected in problems(world, world / "bad.xml", "cvat")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ('<box label="cat" xtl="1" ytl="1" xbr="4" ybr="4"/>', "found a box"),
        ('<polygon label="cat"/>', "lacks 'points'"),
        ('<polygon label="cat" points="1,2;x"/>', "cat: "),
        (
            '<mask label="cat" rle="4801" left="0" top="0" width="80" height="60"/>',
            "4,800 pixels together, found 4,801",
        ),
        ('<mask label="cat" rle="4" left="79" top="0" width="2" height="2"/>', "leaves the image"),
        ('<mask label="cat" rle="4" left="-1" top="0" width="2" height="2"/>', "leaves the image"),
        ('<polygon label="dog" points="0,0;4,0;4,4"/>', "'dog' is no class"),
    ],
)
def test_broken_shapes_of_cvat_are_refused(world: Path, shape: str, expected: str):
    text = f'<annotations><image name="a.jpg" width="80" height="60">{shape}</image></annotations>'
    (world / "bad.xml").write_text(text)
    assert expected in problems(world, world / "bad.xml", "cvat")


def test_cvat_declares_its_labels(world: Path):
    out = send(world, "cvat")
    root = ElementTree.fromstring((out / "annotations.xml").read_text())
    assert [name.text for name in root.iterfind("meta/task/labels/label/name")] == ["cat", "fire hydrant", "unsure"]
    (out / "annotations.xml").write_text((out / "annotations.xml").read_text().replace(">cat<", ">dog<"))
    assert "the file lacks cat" in problems(world, out, "cvat")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"type": "rectanglelabels", "value": {"rectanglelabels": ["cat"]}}, "found rectanglelabels"),
        ({"value": {"brushlabels": ["cat"], "rle": [1, 2]}}, "cut off"),
        ({"value": {"brushlabels": ["cat"], "rle": [1, 999]}}, "no bytes"),
        ({"value": {"brushlabels": ["cat"], "rle": [0, 0, 0, 4, 56, 18, 63, 255]}}, "found one of 1"),
        ({"value": {"brushlabels": ["cat"]}}, "no run lengths"),
        ({"value": {"brushlabels": []}}, "expected one label"),
        ({"value": {"brushlabels": ["dog"]}}, "'dog' is no class"),
        ({"type": "polygonlabels", "value": {"polygonlabels": ["cat"], "points": [1]}}, "points are damaged"),
        ({"image_rotation": 90}, "was turned"),
        ({"original_width": 40}, "sizes"),
        ({"original_width": 0}, "greater than 0"),
    ],
)
def test_broken_shapes_of_label_studio_are_refused(world: Path, change: dict[str, Any], expected: str):
    out = send(world, "labelstudio")
    edited(out / "tasks.json", lambda tasks: tasks[0]["annotations"][0]["result"][0].update(change))
    assert expected in problems(world, out / "tasks.json", "labelstudio")


def test_two_annotations_of_one_image_are_refused(world: Path):
    out = send(world, "labelstudio")
    edited(out / "tasks.json", lambda tasks: tasks.append(tasks[0]))
    assert "is there twice" in problems(world, out / "tasks.json", "labelstudio")
    edited(out / "tasks.json", lambda tasks: tasks[0].update(annotations=2 * tasks[0]["annotations"]))
    assert "has 2 annotations" in problems(world, out / "tasks.json", "labelstudio")


def test_masks_with_values_or_colours_of_no_class_are_refused(world: Path):
    folder = world / "edited"
    folder.mkdir()
    Image.fromarray(np.full(SIZE, 7, dtype=np.uint8)).save(folder / "a.png")
    assert "values [7] are of no class; expected 0 … 2 and 255" in problems(world, folder, "voc")
    Image.new("RGB", SIZE[::-1], (1, 2, 3)).save(folder / "a.png")
    assert "colours [(1, 2, 3)] are of no class" in problems(world, folder, "voc")
    Image.fromarray(np.zeros(SIZE, dtype=np.uint16)).save(folder / "a.png")
    assert "found mode I;16" in problems(world, folder, "voc")
    (folder / "a.png").write_bytes(b"no image")
    assert "not a readable mask" in problems(world, folder, "voc")
    Image.new("L", (79, 60)).save(folder / "a.png")
    assert "expected 60 × 80 pixels as its image, found 60 × 79" in problems(world, folder, "voc")


def test_zips_that_lead_out_of_themselves_are_refused(world: Path):
    with zipfile.ZipFile(world / "bad.zip", "w") as archive:
        archive.writestr("../../annotations.json", "{}")
        archive.writestr("/annotations.json", "{}")
    text = problems(world, world / "bad.zip", "coco")
    assert "lead out of it" in text
    assert "- ../../annotations.json" in text
    (world / "cut.zip").write_bytes((world / "bad.zip").read_bytes()[:-30] + b"PK\x05\x06" + bytes(18))
    problems(world, world / "cut.zip", "coco")


def test_a_source_that_is_not_there_or_ambiguous_is_refused(world: Path):
    assert "cannot be read (No such file or directory)" in problems(world, world / "gone.json", "coco")
    assert "expected .json in it, found none" in problems(world, world / "images", "coco")
    (world / "two").mkdir()
    for name in ("one.json", "two.json"):
        (world / "two" / name).write_text("{}")
    assert "expected one .json, found 2" in problems(world, world / "two", "coco")


def test_masks_that_are_there_are_replaced_by_force_alone(world: Path):
    out = send(world, "coco")
    read = import_masks(out, list_images(world / "images"), CLASSES, format="coco")
    with pytest.raises(InputError, match="has masks of 3 of these 3 images"):
        read.write(world / "masks")
    write_index_mask(world / "masks" / "a.png", np.zeros(SIZE, dtype=np.uint8))
    read.write(world / "masks", force=True)
    np.testing.assert_array_equal(read_index_mask(world / "masks" / "a.png"), smooth())
