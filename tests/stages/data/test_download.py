"""Fetching VOC: from archives put there by hand, and what is said without a network."""

from __future__ import annotations

import hashlib
import http.client
import io
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from stages.contracts import SilentProgress
from stages.data.download import SBD_ARCHIVE, VOC_ARCHIVE, Archive, fetch_voc
from stages.errors import InputError


def pack(path: Path, content: Path, name: str) -> Archive:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        tar.add(content, arcname=name)
    # nobody listens on port 9 of this machine: a fetch would fail
    return Archive(path.name, f"http://127.0.0.1:9/{path.name}", hashlib.md5(path.read_bytes()).hexdigest())


@pytest.fixture
def archives(tiny_voc: Path, tmp_path: Path) -> tuple[Archive, Archive]:
    """Both archives, put into ``tmp_path / "data"`` by hand."""
    (tmp_path / "data").mkdir()
    classes = tmp_path / "benchmark_RELEASE/dataset/cls"
    classes.mkdir(parents=True)
    savemat(classes / "d.mat", {"GTcls": {"Segmentation": np.ones((12, 10), dtype=np.uint8)}})
    return (
        pack(tmp_path / "data/voc.tar", tiny_voc.parent, "VOCdevkit"),
        pack(tmp_path / "data/sbd.tgz", tmp_path / "benchmark_RELEASE", "benchmark_RELEASE"),
    )


def fetch(folder: Path, archives: tuple[Archive, Archive]) -> Path:
    voc, sbd = archives
    return fetch_voc(folder, SilentProgress(), voc_archive=voc, sbd_archive=sbd, expected=3)


def test_archives_put_there_by_hand_are_unpacked_and_converted(
    archives: tuple[Archive, Archive], tmp_path: Path
) -> None:
    root = fetch(tmp_path / "data", archives)
    assert root == tmp_path / "data/VOCdevkit/VOC2012"
    assert (root / "ImageSets/Segmentation/trainaug.txt").read_text(encoding="utf-8") == "a\nb\nd\n"
    for archive in archives:
        (tmp_path / "data" / archive.name).unlink()
    assert fetch(tmp_path / "data", archives) == root


def test_a_half_unpacked_set_is_unpacked_again(archives: tuple[Archive, Archive], tmp_path: Path) -> None:
    root = fetch(tmp_path / "data", archives)
    (root / "JPEGImages/c.jpg").unlink()
    (root / "ImageSets/Segmentation/trainaug.txt").unlink()
    fetch(tmp_path / "data", archives)
    assert (root / "JPEGImages/c.jpg").is_file()


def test_a_wrong_md5_is_refused_and_nothing_unpacked(archives: tuple[Archive, Archive], tmp_path: Path) -> None:
    with (tmp_path / "data/voc.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="its md5 is not"):
        fetch(tmp_path / "data", archives)
    assert not (tmp_path / "data/VOCdevkit").exists()


def test_an_archive_that_leaves_its_folder_is_refused(archives: tuple[Archive, Archive], tmp_path: Path) -> None:
    path = tmp_path / "data/voc.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    evil = Archive(path.name, "http://127.0.0.1:9/voc.tar", hashlib.md5(path.read_bytes()).hexdigest())
    with pytest.raises(InputError, match="cannot be unpacked safely"):
        fetch(tmp_path / "data", (evil, archives[1]))
    assert not (tmp_path / "escaped.txt").exists()


def test_without_a_network_it_says_what_to_fetch_by_hand(
    archives: tuple[Archive, Archive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.download._FREE_BYTES", 0)
    before = socket.getdefaulttimeout()
    with pytest.raises(InputError) as caught:
        fetch(tmp_path / "empty", archives)
    assert f"put these files into {tmp_path / 'empty'}" in caught.value.message
    assert caught.value.problems == tuple(f"{item.url} (md5 {item.md5})" for item in archives)
    assert caught.value.exit_code == 2
    assert list((tmp_path / "empty").iterdir()) == []
    assert socket.getdefaulttimeout() == before


def test_a_full_disk_is_said_before_the_download(
    archives: tuple[Archive, Archive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.download._FREE_BYTES", 2**60)
    with pytest.raises(Exception, match="GiB free, VOC and SBD need") as caught:
        fetch(tmp_path / "empty", archives)
    assert getattr(caught.value, "exit_code", None) == 4


def test_the_addresses_are_those_of_torchvision() -> None:
    from torchvision.datasets import SBDataset
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    entry = DATASET_YEAR_DICT["2012"]
    assert (VOC_ARCHIVE.name, VOC_ARCHIVE.url, VOC_ARCHIVE.md5) == (entry["filename"], entry["url"], entry["md5"])
    assert (SBD_ARCHIVE.name, SBD_ARCHIVE.url, SBD_ARCHIVE.md5) == (SBDataset.filename, SBDataset.url, SBDataset.md5)


def test_a_transfer_that_breaks_off_leaves_nothing_and_says_what_to_fetch(
    archives: tuple[Archive, Archive], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets.utils as torchvision_utils

    def break_off(url: str, root: str, filename: str, md5: str) -> None:
        (Path(root) / filename).write_bytes(b"half")
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr(torchvision_utils, "download_url", break_off)
    (tmp_path / "data/voc.tar").unlink()
    with pytest.raises(InputError, match=r"could not fetch voc\.tar"):
        fetch(tmp_path / "data", archives)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["sbd.tgz"]


def test_a_file_in_the_place_of_the_folder_is_refused(archives: tuple[Archive, Archive], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(InputError, match="is a file or lies below one"):
            fetch(folder, archives)
