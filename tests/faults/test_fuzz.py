"""Files that others wrote, or that rotted: whatever their bytes, one of our own errors, soon, and in little memory.

Each example is a valid file that was changed.  WSSS_FUZZ_EXAMPLES=2000 tries more than the usual number of each kind.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from pipeline.config.run_config import RunConfig, load_config
from pipeline.config.yaml_models import load_values
from pipeline.engine.records import read_runs
from pipeline.store.artifacts import open_store
from stages.contracts import encode_index_mask, iter_attention, open_image_set, read_index_mask, read_rgb
from stages.contracts.attention import AttentionRecord, write_attention_shard
from stages.data.adapters.custom import CustomConfig
from stages.data.boxes import read_box_annotation, read_box_list
from stages.data.names import ImageNames
from stages.data.readers import read_annotation
from stages.data.records import Problems
from stages.data.sbd import read_sbd_mask
from stages.data.subsets import read_ids
from stages.errors import WsssError
from stages.methods.classifier_files import read_description
from stages.nets.segmenters.files import read_segmenter_record
from stages.scoring.submission.check import check_archive
from tests.pipeline.whole_runs.tiny_run import TINY, tiny_yaml

EXAMPLES = int(os.environ.get("WSSS_FUZZ_EXAMPLES", "60"))
LIMIT_S = 10.0
LIMIT_BYTES = 300e6
LIMIT_WORDS = 20_000
"""Most characters of an error: what is long in a file is shortened in the words about it."""

KEY = "0123456789abcdef0123"


# -- the kinds of files -----------------------------------------------------------------------------------------------

NAMES = ImageNames({"a": "a.jpg"})


class Kind(NamedTuple):
    """A kind of file: where it lies in the folder of an example, a valid one, and who reads it, given that folder."""

    path: str
    data: bytes
    read: Callable[[Path], object]


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _png(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def _mat() -> bytes:
    buffer = io.BytesIO()
    mask = np.zeros((1, 1), dtype=[("Segmentation", object)])
    mask[0, 0] = (np.arange(12, dtype=np.uint8).reshape(3, 4),)
    savemat(buffer, {"GTcls": mask}, do_compression=True)
    return buffer.getvalue()


def _shard() -> bytes:
    maps = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npz"
        write_attention_shard(path, [AttentionRecord("a", (6, 8), (0,), maps, np.ones(1, np.float32))])
        return path.read_bytes()


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(
            "results/VOC2012/Segmentation/comp6_test_cls/a.png", encode_index_mask(np.eye(3, dtype=np.uint8))
        )
    return buffer.getvalue()


def custom_data(folder: Path, **options: Any) -> object:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (folder / "images").mkdir(exist_ok=True)
        (folder / "images" / name).touch()
    if not (folder / "labels.csv").exists():
        (folder / "labels.csv").write_bytes(LABELS)
    if options:
        (folder / "val.txt").write_text("c\n")
    found = CustomConfig(root=folder, masks=None, **options).scan()
    return found.problems.lines(50), found.listing.warnings


def artifacts(folder: Path) -> object:
    store = open_store(folder / "artifacts")
    found = store.lookup("make_masks", KEY)
    return found and (found.metrics, found.warnings, found.mask_supervision, found.size_bytes), list(store.artifacts())


LABELS = b"image,labels\na.jpg,cat;dog\nb.jpg,dog\nc.jpg,\n"
XML = b"""<annotation><size><width>9</width></size><object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin>
<xmax>3</xmax><ymax>4</ymax></bndbox></object></annotation>"""
MANIFEST = {
    "content": {
        "schema": 1,
        "stage": "make_masks",
        "key": KEY,
        "mask_supervision": [],
        "files": {},
        "config": {"a": 1},
    },
    "run": {"metrics": {"masks.miou": 0.5}, "warnings": ["a"], "started": "2025-01-01T00:00:00", "seconds": 1.5},
}
RECORD = {
    "run": "r",
    "name": "n",
    "started": "2025-06-01T12:00:00+00:00",
    "state": "done",
    "keys": {"make_masks": KEY},
    "config": {},
}
CLASSIFIER = {"backbone": {"name": "small"}, "method": {"name": "cam"}, "classes": {"names": ["a", "b"]}}
SEGMENTER = {"net": {"name": "largefov", "backbone": {"name": "small"}}, "num_classes": 3, "classes": ["a", "b"]}
IMAGE = {"id": "a", "image": "a.jpg", "size": [6, 8], "labels": [0]}
INDEX = {
    "classes": {"names": ["cat", "dog"]},
    "images": [IMAGE],
    "splits": {"train": ["a"]},
    "mask_values": {"0": 0, "1": 1, "2": 2, "255": 255},
}


PHOTO = Image.fromarray(np.full((8, 9, 3), 90, np.uint8))
KINDS = {
    "config": Kind("run.yaml", tiny_yaml().encode(), lambda here: load_config(here / "run.yaml")),
    "labels": Kind("labels.csv", LABELS, custom_data),
    "id list": Kind(
        "train.txt",
        b"a\nb.jpg\n",
        lambda here: custom_data(here, train_list=here / "train.txt", val_list=here / "val.txt"),
    ),
    "ids": Kind("ids.txt", b"a\nb\n", lambda here: read_ids(here / "ids.txt", "option")),
    "annotation": Kind("a.xml", XML, lambda here: read_annotation(here / "a.xml", Problems())),
    "boxes": Kind("a.xml", XML, lambda here: read_box_annotation(here / "a.xml", Problems())),
    "box list": Kind(
        "b.txt", b"a.jpg,1,2,3,4\n", lambda here: read_box_list(here / "b.txt", "b.txt", Problems(), NAMES)
    ),
    "mat": Kind("a.mat", _mat(), lambda here: read_sbd_mask(here / "a.mat")),
    "mask": Kind("a.png", encode_index_mask(np.eye(8, dtype=np.uint8)), lambda here: read_index_mask(here / "a.png")),
    "png": Kind("b.png", _png(PHOTO), lambda here: read_rgb(here / "b.png")),
    "jpeg": Kind("a.jpg", _png(PHOTO, "JPEG"), lambda here: read_rgb(here / "a.jpg")),
    "attention": Kind("shards/attention-0.npz", _shard(), lambda here: list(iter_attention(here))),
    "index": Kind("index.json", _json(INDEX), lambda here: open_image_set(here, None)),
    "classifier": Kind("classifier.json", _json(CLASSIFIER), read_description),
    "segmenter": Kind("segmenter.json", _json(SEGMENTER), read_segmenter_record),
    "manifest": Kind(f"artifacts/make_masks/{KEY}/manifest.json", _json(MANIFEST), artifacts),
    "record": Kind("runs/n-r.json", _json(RECORD), lambda here: read_runs(open_store(here))),
    "submission": Kind("a.zip", _zip(), lambda here: check_archive(here / "a.zip")),
}


# -- how they are changed ---------------------------------------------------------------------------------------------

NASTY = (
    b"\0", b"\xff\xfe", b"9" * 5000, b"[" * 5000, b"a" * 20_000, b"\xff" * 8,
    b"\x1b[31m", b"\r", b"\n", b'"', b"'", b",", b";", b"\t", b"[", b"]", b"{", b"}", b"<", b">", b"&a;",
    b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"null", b"true", b"../../etc/passwd", b"/dev/zero",
    b"&a [*a, *a]", b"!!timestamp foo", b"!!python/object/apply:os.system [x]", b"<<: *a", b"\xc2\xa0", b"\xe2\x80\xae",
    b"\xed\xa0\x80", b"<!DOCTYPE a [<!ENTITY a 'b'>]>", b"\x00\xff\xff\xff\x7f", b"2026-02-30",
)  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """``data`` with a few changes: cut, flipped, exchanged, repeated, or with something nasty in it; or other bytes."""
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.sampled_from((0, 1, 2, 4, 8, 30)))
        change = draw(st.sampled_from(("nasty", "nasty", "flip", "bytes", "cut", "repeat", "drop")))
        if change == "nasty":
            data = data[:at] + draw(st.sampled_from(NASTY)) + data[at + size :]
        elif change == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif change == "bytes":
            data = data[:at] + draw(st.binary(max_size=12)) + data[at + size :]
        elif change == "cut":
            data = data[:at]
        elif change == "repeat":
            data = data[:at] + data[at : at + size] * draw(st.integers(2, 200)) + data[at:]
        else:
            data = data[:at] + data[at + size :]
    return data


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from((-1, 0, 1, 10**400, 2**63, 1e308, -0.5, "", "a", "../a", "\0", "\x1b[31m", "\ud800", "a" * 3000)),
    st.lists(st.integers(-2, 300), max_size=3),
    st.dictionaries(st.sampled_from(("a", "names", "content", "size")), st.integers(), max_size=2),
)


@st.composite
def another_value(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with a value somewhere that is of another kind, missing, or too much."""
    if isinstance(document, dict) and document and draw(st.integers(0, 4)):
        name = draw(st.sampled_from(sorted(document)))
        rest = {other: value for other, value in document.items() if other != name}
        if not draw(st.integers(0, 5)):
            return {**rest, draw(st.sampled_from(("", "more", "\x1b"))): document[name]}
        return {**document, name: draw(another_value(document[name]))}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(document) - 1))
        return [*document[:at], draw(another_value(document[at])), *document[at + 1 :]]
    return draw(VALUES)


def try_it(kind: Kind, folder: Path, data: bytes) -> None:
    """Read ``data`` as this kind: an answer, or one of our errors, within the limits."""
    path = folder / kind.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    is_traced = tracemalloc.is_tracing()
    if not is_traced:
        tracemalloc.start()
    tracemalloc.reset_peak()
    started = time.monotonic()
    try:
        kind.read(folder)
        words = ""
    except WsssError as error:
        words = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        if not is_traced:
            tracemalloc.stop()
    assert len(words) < LIMIT_WORDS, f"an error of {len(words)} characters"
    assert time.monotonic() - started < LIMIT_S
    assert peak < LIMIT_BYTES, f"{peak / 1e6:.0f} MB"


DOCUMENTS = {"index": INDEX, "classifier": CLASSIFIER, "segmenter": SEGMENTER, "manifest": MANIFEST, "record": RECORD}
often = settings(
    max_examples=EXAMPLES,
    derandomize="WSSS_FUZZ_EXAMPLES" not in os.environ,  # the usual number is the same everywhere
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("name", KINDS)
def test_a_valid_one_is_read(name: str, tmp_path: Path):
    """Otherwise every example would fail at its first byte, and the rest be never tried."""
    kind = KINDS[name]
    path = tmp_path / kind.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kind.data)
    assert kind.read(tmp_path) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@often
@given(draw=st.data())
def test_changed_bytes_are_an_answer_or_one_of_our_errors(name: str, tmp_path: Path, draw: st.DataObject):
    kind = KINDS[name]
    data = draw.draw(damaged(kind.data))
    try_it(kind, tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(DOCUMENTS))
@often
@given(draw=st.data())
def test_other_values_are_an_answer_or_one_of_our_errors(name: str, tmp_path: Path, draw: st.DataObject):
    try_it(KINDS[name], tmp_path, json.dumps(draw.draw(another_value(DOCUMENTS[name]))).encode())


@pytest.mark.slow
@often
@given(
    path=st.sampled_from(("name", "seed", "data.root", "make_masks.crf", "a.b.c", "", ".", "runtime.")), text=st.data()
)
def test_overrides_are_taken_or_refused_by_our_errors(path: str, text: st.DataObject):
    data = text.draw(damaged(b"[1, {a: b}]"))
    value = data.decode(errors="surrogateescape")
    started = time.monotonic()
    words = ""
    try:
        load_values(RunConfig, TINY, [f"{path}={value}"], "the config")
    except WsssError as error:
        words = str(error)
    assert len(words) < LIMIT_WORDS
    assert time.monotonic() - started < LIMIT_S


def changed(**run: Any) -> bytes:
    return _json({**MANIFEST, "run": {**MANIFEST["run"], **run}})


FOUND = [
    ("config", b"name: !!timestamp foo"),
    ("config", b"seed: " + b"9" * 5000),
    ("manifest", changed(metrics=None)),
    ("manifest", changed(metrics=["a"])),
    ("manifest", changed(warnings=5)),
    ("manifest", _json({**MANIFEST, "content": {**MANIFEST["content"], "mask_supervision": [[]]}})),
]


@pytest.mark.parametrize(("name", "data"), FOUND, ids=[f"{name}-{data[-30:]!r}" for name, data in FOUND])
def test_what_once_failed_is_an_answer_or_one_of_our_errors(
    name: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.faults.test_fuzz.LIMIT_S", 1.0)
    try_it(KINDS[name], tmp_path, data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mat", b"\0" + KINDS["mat"].data),  # scipy took it for a MATLAB 4 array of 1.7 GB
        ("index", KINDS["index"].data.replace(b"classes", b"klasses")),
        ("index", b"[" * 5000),
        ("attention", KINDS["attention"].data[:40]),
        ("classifier", KINDS["classifier"].data.replace(b"names", b"n" * 20_000)),
        ("segmenter", KINDS["segmenter"].data.replace(b"classes", b"c" * 20_000)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_failed_once_is_one_of_our_errors(name: str, data: bytes, tmp_path: Path):
    try_it(KINDS[name], tmp_path, data)
    with pytest.raises(WsssError):
        KINDS[name].read(tmp_path)
