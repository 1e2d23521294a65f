"""The test server's archive: its bytes, and a check that names everything that is wrong with one."""

import gzip
import io
import os
import random
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stages.scoring.submission.check
from stages.contracts import read_index_mask, voc_palette, write_index_mask
from stages.data.adapters.voc import VOC_CLASSES
from stages.errors import DataError
from stages.scoring.submission.archive import build_archive, result_folder, voc_values
from stages.scoring.submission.check import REMEDIES, Findings, check_archive, check_mask
from stages.scoring.submission.reference import Expected, ImageFolder, read_test_list

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
IDS = [f"2008_{number:06d}" for number in range(1456)]
SHORT = ["2008_000006", "2008_000008", "2008_000011"]
SIZES = {"2008_000006": (30, 40), "2008_000008": (40, 30), "2008_000011": (25, 40)}
"""(height, width)."""


def png(
    values: Iterable[int] = (0, 3, 20), size: tuple[int, int] = (30, 40), mode: str = "P", palette: bytes | None = None
) -> bytes:
    """A mask of vertical stripes of ``values``."""
    values = np.array(list(values), np.uint8)
    stripes = values[np.arange(size[1]) * len(values) // size[1]]
    image = Image.fromarray(np.broadcast_to(stripes, size).copy())
    if mode in ("P", "RGB"):
        image.putpalette(voc_palette().tobytes() if palette is None else palette)
    buffer = io.BytesIO()
    (image.convert("RGB") if mode == "RGB" else image).save(buffer, format="PNG")
    return buffer.getvalue()


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def mask(image_id: str, data: bytes | None = None, folder: str = FOLDER) -> Member:
    return member(f"{folder}/{image_id}.png", png(size=SIZES.get(image_id, (30, 40))) if data is None else data)


def pack(members: Iterable[Member], path: Path) -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Callable[..., Path]:
    """Three good masks, with some in the place of others and more behind them."""

    def build(*more: Member, name: str = "results.tar.gz", **others: bytes | None) -> Path:
        changed = {key.removeprefix("i"): data for key, data in others.items()}
        kept = [mask(i, changed.get(i)) for i in SHORT if i not in changed or changed[i] is not None]
        return pack([*kept, *more], tmp_path / name)

    return build


EXPECTED = Expected(ids=SHORT, size_of=SIZES.get)


def kinds(found: Findings) -> dict[str, int]:
    assert [line.partition(" (")[0] for line in found.problems()] == sorted(found.counts, key=list(REMEDIES).index)
    return found.counts


# -- making one -------------------------------------------------------------------------------------------------------


def predictions(folder: Path, num_classes: int = 21) -> list[tuple[str, Path]]:
    rng = np.random.default_rng(0)
    for image_id, size in SIZES.items():
        write_index_mask(folder / f"{image_id}.png", rng.integers(0, num_classes, size).astype(np.uint8))
    return [(image_id, folder / f"{image_id}.png") for image_id in reversed(SHORT)]


def test_an_archive_has_the_masks_and_nothing_that_changes(tmp_path: Path) -> None:
    made = predictions(tmp_path)
    data = build_archive(made, voc_values(VOC_CLASSES), "comp6")
    for _, path in made:
        os.utime(path, (1, 1))
    assert build_archive(made[::-1], voc_values(VOC_CLASSES), "comp6") == data
    assert data[4:8] == bytes(4), "gzip's time"
    assert data[3] == 0, "no name in gzip's header"
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        members = archive.getmembers()
        assert [m.name for m in members] == [f"{FOLDER}/{i}.png" for i in SHORT]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.isreg()) for m in members} == {
            (0, 0, 0, "", "", 0o644, True)
        }
        for info, (image_id, path) in zip(members, made[::-1], strict=True):
            with Image.open(archive.extractfile(info)) as image:
                assert image.mode == "P"
                assert bytes(image.getpalette() or ()) == voc_palette().tobytes()
                assert np.asarray(image).shape == SIZES[image_id]
                np.testing.assert_array_equal(np.asarray(image), read_index_mask(path))
    (tmp_path / "r.tar.gz").write_bytes(data)
    assert check_archive(tmp_path / "r.tar.gz", EXPECTED).problems() == []


def test_some_classes_become_vocs_values_by_name(tmp_path: Path) -> None:
    values = voc_values(("cat", "bird"))
    assert values.tolist() == [0, 8, 3]
    made = predictions(tmp_path, num_classes=3)
    data = build_archive(made, values, "comp5")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        name = f"{result_folder('comp5')}/2008_000006.png"
        assert name == "results/VOC2012/Segmentation/comp5_test_cls/2008_000006.png"
        with Image.open(archive.extractfile(name)) as image:
            np.testing.assert_array_equal(np.asarray(image), values[read_index_mask(tmp_path / "2008_000006.png")])


def test_a_prediction_that_is_missing_or_of_other_classes_is_named(tmp_path: Path) -> None:
    made = predictions(tmp_path)
    with pytest.raises(DataError, match=r"expected class indices 0 … 2 of the run, found 20"):
        build_archive(made, voc_values(("cat", "bird")), "comp6")
    made[0][1].unlink()
    with pytest.raises(DataError, match=r"2008_000011.png: not a readable mask"):
        build_archive(made, voc_values(VOC_CLASSES), "comp6")


# -- checking one -----------------------------------------------------------------------------------------------------


def test_1456_made_images_pass(tmp_path: Path) -> None:
    shapes = [(30, 40), (40, 30), (500, 20)]
    members = [mask(i, png((n % 21, 0), shapes[n % 3])) for n, i in enumerate(IDS)]
    found = check_archive(pack(members, tmp_path / "results.tgz"))
    assert (found.problems(), found.warnings) == ([], [])
    assert (len(found.masks), found.competition) == (1456, "comp6")
    found = check_archive(pack(members[1:], tmp_path / "results.tar.gz"))
    assert found.problems() == [
        "wrong count (1): 1,455 masks, VOC2012's test list has 1,456 images. "
        "Predict every image of ImageSets/Segmentation/test.txt"
    ]


def test_folders_and_a_plain_tar_and_a_dot_before_the_names_are_fine(tmp_path: Path) -> None:
    folders = ["results", "results/VOC2012", "results/VOC2012/Segmentation", FOLDER]
    members = [member(f"./{name}", kind=tarfile.DIRTYPE) for name in [".", *folders]]
    members += [mask(i, folder=f"./{FOLDER}") for i in SHORT]
    assert check_archive(pack(members, tmp_path / "results.tar"), EXPECTED).problems() == []


def test_a_short_palette_is_fine_where_it_has_vocs_colours(packed: Callable[..., Path]) -> None:
    colours = voc_palette().tobytes()
    assert check_archive(packed(i2008_000006=png(palette=colours[:63])), EXPECTED).counts == {}
    found = check_archive(packed(i2008_000006=png(palette=colours[:60])), EXPECTED)
    assert found.problems()[0].startswith(
        "wrong palette (1): 2008_000006.png shows tvmonitor (20) as nothing, VOC's is (0, 64, 128)."
    )


@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [
        (png(mode="RGB"), "wrong mode", "has mode RGB"),
        (png(mode="L"), "wrong mode", "has mode L"),
        (png(palette=bytes(range(256)) * 3), "wrong palette", "shows background (0) as (0, 1, 2), VOC's is (0, 0, 0)"),
        (png((0, 21)), "wrong value", "has 21"),
        (png((0, 255)), "wrong value", "has 255 (void)"),
        (png((21, 22, 23, 24)), "wrong value", "has 21, 22, 23 and 1 more"),
        (png(size=(40, 30)), "wrong size", "is 30 × 40 (width × height), its image 40 × 30 (width × height)"),
        (png(size=(513, 513)), "wrong size", "is 513 × 513"),
        (png()[:-60], "damaged PNG", "(Truncated"),
        (b"\xff\xd8\xff\xe0 a JPEG", "no PNG", r"starts with b'\xff\xd8\xff\xe0'"),
        (b"", "no PNG", "starts with b''"),
    ],
)
def test_a_wrong_mask_is_named(packed: Callable[..., Path], data: bytes, kind: str, text: str) -> None:
    found = check_archive(packed(i2008_000006=data), EXPECTED)
    assert kinds(found) == {kind: 1}
    (line,) = found.problems()
    assert f"2008_000006.png {text}" in line
    assert line.endswith(REMEDIES[kind][1:])


def test_all_that_is_wrong_with_one_mask_is_said() -> None:
    found = dict(check_mask(png((0, 21), size=(600, 10), palette=bytes(768))))
    assert set(found) == {"wrong size", "wrong value", "wrong palette"}


@pytest.mark.parametrize(
    ("extra", "kind", "text"),
    [
        (mask("2008_000099"), "extra image", "2008_000099.png"),
        (mask("2008_000006"), "duplicate name", "2008_000006.png"),
        (mask("x", folder=f"/{FOLDER}"), "unsafe path", f"'/{FOLDER}/x.png'"),
        (mask("x", folder=f"{FOLDER}/../comp5_test_cls"), "unsafe path", "/../"),
        (member("..\\x.png"), "unsafe path", "'..\\x.png'"),
        (member(f"{FOLDER}/a.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), "link", "a.png → /etc/passwd"),
        (member(f"{FOLDER}/a.png", kind=tarfile.LNKTYPE, link=f"{FOLDER}/2008_000006.png"), "link", "a.png → results"),
        (member(f"{FOLDER}/a.png", kind=tarfile.FIFOTYPE), "no plain file", "a.png"),
        (member("results/readme.txt", b"hello"), "other member", "results/readme.txt"),
        (member(f"{FOLDER}/._2008_000006.png", b"mac"), "other member", "._2008_000006.png"),
        (member("logs", kind=tarfile.DIRTYPE), "other member", "logs/"),
        (mask("x", folder="results/VOC2012/Segmentation/comp6_val_cls"), "other member", "comp6_val_cls/x.png"),
        (mask("x", folder="results/VOC2012/Segmentation/comp5_test_cls"), "two competitions", "expected comp6"),
    ],
)
def test_a_wrong_member_is_named(packed: Callable[..., Path], extra: Member, kind: str, text: str) -> None:
    found = check_archive(packed(extra), EXPECTED)
    assert kinds(found) == {kind: 1}
    assert text in found.problems()[0]


def test_missing_images_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    found = check_archive(pack([mask(i) for i in IDS[7:]], tmp_path / "r.tgz"), Expected(ids=IDS))
    assert found.problems() == [
        "missing image (7): 2008_000000.png; 2008_000001.png; 2008_000002.png; 2008_000003.png; 2008_000004.png; "
        "… 2 more. Add its mask"
    ]


def test_problems_of_every_kind_come_together(packed: Callable[..., Path]) -> None:
    path = packed(
        member("notes.txt", b"x"),
        mask("2008_000099", png((0, 255))),
        i2008_000006=png(mode="RGB"),
        i2008_000011=None,
    )
    found = check_archive(path, EXPECTED)
    assert set(kinds(found)) == {"other member", "missing image", "extra image", "wrong mode", "wrong value"}


def test_without_a_list_names_must_be_as_vocs(packed: Callable[..., Path]) -> None:
    found = check_archive(packed(mask("cat1")), Expected())
    assert kinds(found) == {"wrong name": 1, "wrong count": 1}
    assert "cat1.png no image of VOC" in found.problems()[0]


def test_the_other_competition_is_named(packed: Callable[..., Path]) -> None:
    found = check_archive(packed(), Expected(ids=SHORT, competition="comp5"))
    assert found.counts["two competitions"] == 3


# -- files that do not read -------------------------------------------------------------------------------------------


def test_a_truncated_gzip_is_named_and_its_masks_are_not_called_missing(packed: Callable[..., Path]) -> None:
    noise = np.random.default_rng(0).integers(0, 21, (300, 300)).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(noise)
    image.putpalette(voc_palette().tobytes())
    image.save(buffer, format="PNG")
    path = packed(i2008_000008=buffer.getvalue())
    path.write_bytes(path.read_bytes()[:30_000])
    found = check_archive(path, Expected(ids=SHORT))
    assert kinds(found) == {"not readable": 1}
    assert "end-of-stream" in found.problems()[0]


def test_a_damaged_gzip_is_found_at_its_end(packed: Callable[..., Path]) -> None:
    path = packed()
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # a byte of the checksum
    path.write_bytes(data)
    assert "CRC" in check_archive(path, EXPECTED).problems()[0]


def test_bytes_behind_the_end_are_found(packed: Callable[..., Path]) -> None:
    path = packed(name="results.tar")
    path.write_bytes(path.read_bytes() + b"PK\3\4 something")
    assert kinds(check_archive(path, EXPECTED)) == {"not readable": 1}


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("results.tar.gz", b"some text, no archive", "results.tar.gz holds something else, not gzip"),
        ("results.tar.gz", b"", "results.tar.gz holds nothing, not gzip"),
        ("results.tar.gz", b"BZh91AY", "results.tar.gz holds bzip2, not gzip"),
        ("results.rar", b"Rar!", "results.rar: expected a name that ends in .tar.gz, .tgz or .tar"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    found = check_archive(tmp_path / name)
    assert list(found.counts) == ["wrong kind of file"]
    assert text in found.problems()[0]


def test_a_zip_is_named_as_wrong(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "results.zip", "w") as archive:
        archive.writestr(f"{FOLDER}/2008_000006.png", png())
    found = check_archive(tmp_path / "results.zip")
    assert list(found.counts) == ["wrong kind of file"]
    assert "results.zip holds zip" in found.problems()[0]
    assert "tar czf" in found.problems()[0]


def test_a_plain_tar_under_gzips_name_is_read_and_named(packed: Callable[..., Path]) -> None:
    path = packed(name="results.tar").rename(packed().with_name("wrong.tar.gz"))
    found = check_archive(path, EXPECTED)
    assert kinds(found) == {"wrong kind of file": 1}
    assert len(found.masks) == 3


# -- archives that mean harm ------------------------------------------------------------------------------------------


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo(f"{FOLDER}/2008_000008.png")
    info.size = 1 << 40
    path = tmp_path / "results.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf()))
    found = check_archive(path, Expected(ids=SHORT))
    assert kinds(found) == {"too large": 1}, "what was not read is not called missing"
    assert "2008_000008.png has 1,099,511,627,776 bytes" in found.problems()[0]


def test_a_bomb_of_zeros_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.scoring.submission.check, "MAX_ARCHIVE_BYTES", 1 << 20)
    path = tmp_path / "results.tar.gz"
    with gzip.open(path, "wb") as file:
        file.write(mask("2008_000006")[0].tobuf() + bytes(4 << 20))
    assert kinds(check_archive(path, Expected(ids=SHORT)))["too large"] == 1


def test_a_header_that_wants_the_memory_ends_early(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 400 << 20
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
    path = tmp_path / "results.tar.gz"
    with path.open("wb") as file:
        file.write(compressor.compress(info.tobuf(tarfile.USTAR_FORMAT)))
        for _ in range(64):
            file.write(compressor.compress(bytes(1 << 20)))
        file.write(compressor.flush())
    assert kinds(check_archive(path, Expected(ids=SHORT))) == {"too large": 1}


def test_too_many_members_end_the_reading(packed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.scoring.submission.check, "MAX_MEMBERS", 2)
    assert "more than 2 members" in check_archive(packed(), EXPECTED).problems()[0]


def test_a_mask_that_claims_a_million_pixels_a_side_is_not_decoded() -> None:
    data = bytearray(png())
    data[16:24] = (1_000_000).to_bytes(4, "big") * 2
    assert dict(check_mask(bytes(data))).keys() == {"wrong size"}
    assert "too large to be looked at" in dict(check_mask(bytes(data), (1_000_000, 1_000_000)))["wrong size"]


def test_damaged_bytes_never_end_in_another_error(packed: Callable[..., Path]) -> None:
    path = packed(name="results.tar")
    whole, draw, found = path.read_bytes(), random.Random(0), set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice((len(data), draw.randrange(len(data))))])
        found |= set(check_archive(path, EXPECTED).counts)
    assert {"not readable", "damaged PNG", "missing image"} <= found


# -- what it is held against ------------------------------------------------------------------------------------------


def test_sizes_are_read_from_a_folder_of_images(tmp_path: Path, packed: Callable[..., Path]) -> None:
    images = tmp_path / "JPEGImages"
    images.mkdir()
    for image_id in SHORT[:2]:
        height, width = SIZES[image_id]
        exif = Image.Exif()
        exif[0x0112] = 6  # the file lies on its side: the image, and so its mask, has the other one up
        Image.new("RGB", (height, width)).save(images / f"{image_id}.jpg", exif=exif)
    expected = Expected(ids=SHORT, size_of=ImageFolder(images).size_of)
    found = check_archive(packed(), expected)
    assert found.problems() == []
    assert found.warnings == [
        "the list has 3 images, VOC2012's test list has 1,456: the server takes only an archive of these",
        "masks without an image to compare their size with: 1",
    ]
    assert kinds(check_archive(packed(i2008_000008=png()), expected)) == {"wrong size": 1}
    (images / "2008_000006.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2008_000006.jpg: not a readable image"):
        check_archive(packed(), expected)
    with pytest.raises(DataError, match="found no folder"):
        ImageFolder(tmp_path / "nothing")


def test_masks_of_one_size_are_warned_of_where_the_images_are_not_known(tmp_path: Path) -> None:
    path = pack([mask(i, png(size=(321, 321))) for i in SHORT], tmp_path / "r.tgz")
    (text,) = (text for text in check_archive(path, Expected(ids=SHORT)).warnings if "321" in text)
    assert "all masks are 321 × 321" in text


def test_a_list_is_read_and_its_faults_named(tmp_path: Path) -> None:
    path = tmp_path / "test.txt"
    path.write_text("2008_000006\n\n2008_000008\n")
    assert read_test_list(path) == ("2008_000006", "2008_000008")
    path.write_text("JPEGImages/a.jpg\n")
    with pytest.raises(DataError, match=re.escape("line 1: expected one image id, found 'JPEGImages/a.jpg'")):
        read_test_list(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_test_list(path)
    with pytest.raises(DataError, match="cannot be used"):
        read_test_list(tmp_path / "nothing.txt")
