"""Attention of anybody's classifier by hand-made networks, and refinement that refuses what is no probability."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import wsss
from stages.errors import InputError

SIZE = (32, 48)


class Tiny(nn.Module):
    """2×2 means of R, G, B as three features, their mean over the image, and a linear head of two classes."""

    def __init__(self, *, between: bool = False) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3, 2, stride=2, bias=False)
        self.between = nn.ReLU() if between else nn.Identity()
        self.head = nn.Linear(3, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.eye(3)[:, :, None, None] / 4 * torch.ones(1, 1, 2, 2))
            self.head.weight.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]))
            self.head.bias.copy_(torch.tensor([5.0, -5.0]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.body(images).mean(dim=(2, 3))
        return self.head(self.between(pooled - 0.5) if isinstance(self.between, nn.ReLU) else pooled)


def picture() -> NDArray[np.uint8]:
    """Red on the left third, green on the middle third, blue on the right third; multiples of two pixels."""
    image = np.zeros((*SIZE, 3), np.uint8)
    for channel in range(3):
        image[:, 16 * channel : 16 * (channel + 1), channel] = 200
    return image


PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "short_side_px": None}


@pytest.mark.parametrize("method", ["cam", "gradcam"])
def test_maps_of_a_linear_head_are_its_weights_times_the_features(method: str) -> None:
    red_not_blue, green = wsss.attention(Tiny(), picture(), [0, 1], method=method, **PLAIN)
    assert red_not_blue.shape == SIZE
    assert red_not_blue[:, :15] == pytest.approx(1)
    assert red_not_blue[:, 17:] == pytest.approx(0)
    assert green[:, 17:31] == pytest.approx(1)
    assert green[:, :15] == pytest.approx(0)
    assert green[:, 33:] == pytest.approx(0)


def test_the_likeliest_class_is_taken_where_none_is_named() -> None:
    assert np.array_equal(wsss.attention(Tiny(), picture(), **PLAIN), wsss.attention(Tiny(), picture(), [0], **PLAIN))


def test_a_class_without_evidence_is_zero_and_not_nan() -> None:
    blue = np.zeros((*SIZE, 3), np.uint8)
    blue[..., 2] = 200
    assert (wsss.attention(Tiny(), blue, [0], **PLAIN) == 0).all()


def test_mirror_and_scales_of_a_symmetric_net_change_little() -> None:
    plain = wsss.attention(Tiny(), picture(), [1], **PLAIN)
    both = wsss.attention(Tiny(), picture(), [1], flip=True, scales=(1.0, 2.0), **PLAIN)
    assert both.shape == plain.shape
    assert np.abs(both - plain)[..., [4, 24, 44]].max() < 0.01  # the middle of each third


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v2", "densenet121"])
def test_cam_and_gradcam_agree_where_only_a_mean_stands_between(name: str) -> None:
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    cam, grad = (wsss.attention(net, image, method=method, short_side_px=96) for method in ("cam", "gradcam"))
    assert cam.shape == (1, 96, 128)
    assert cam.max() == pytest.approx(1)
    if name != "squeezenet1_1":  # its gradients pass a ReLU behind the class maps
        assert np.abs(cam - grad).max() < 1e-3


def test_timm_nets_bring_their_own_normalisation() -> None:
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mean, std = net.pretrained_cfg["mean"], net.pretrained_cfg["std"]
    assert mean == (0.5, 0.5, 0.5)
    own = wsss.attention(net, image, [1], short_side_px=64)
    assert np.array_equal(own, wsss.attention(net, image, [1], short_side_px=64, mean=mean, std=std))
    assert not np.array_equal(own, wsss.attention(net, image, [1], short_side_px=64, mean=(0.1, 0.2, 0.3)))


def test_what_has_no_cam_says_what_works() -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for net in (Tiny(between=True), torchvision.models.vgg11(weights=None)):
        with pytest.raises(InputError, match="method='gradcam' works"):
            wsss.attention(net, image, [0], method="cam", short_side_px=64)
        assert wsss.attention(net, image, [0], short_side_px=64).shape == (1, 64, 64)
    with pytest.raises(InputError, match="use a convolutional classifier"):
        wsss.attention(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 2)), image, [0], short_side_px=64)
    with pytest.raises(InputError, match=r"gives logits \(1, K\), found \(1, 3, 32, 32\)"):
        wsss.attention(nn.Conv2d(3, 3, 2, stride=2), image, [0], short_side_px=64)


def test_the_model_is_left_as_it_was() -> None:
    net = torchvision.models.resnet18(weights=None)
    net.train()
    net.layer1.eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        assert wsss.attention(net, picture(), [0], short_side_px=64).max() > 0
    assert net.training
    assert not net.layer1.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_layer_can_be_named_and_is_asked_back_for() -> None:
    net = torchvision.models.resnet18(weights=None)
    early = wsss.attention(net, picture(), [0], layer="layer2", short_side_px=64)
    assert not np.array_equal(early, wsss.attention(net, picture(), [0], short_side_px=64))
    with pytest.raises(InputError, match=r"no 'layer9'.*layer"):
        wsss.attention(net, picture(), [0], layer="layer9")
    with pytest.raises(InputError, match="'fc' gives no map"):
        wsss.attention(net, picture(), [0], layer="fc")
    with pytest.raises(InputError, match="goes with method='gradcam'"):
        wsss.attention(net, picture(), [0], layer="layer2", method="cam")


@pytest.mark.parametrize("labels", [[2], [-1], []])
def test_labels_that_the_model_lacks_are_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match=r"class numbers 0 … 1, found"):
        wsss.attention(Tiny(), picture(), labels, **PLAIN)


def test_images_come_as_files_arrays_and_pil(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    as_array = wsss.attention(Tiny(), picture(), [0], **PLAIN)
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(picture())):
        assert np.array_equal(wsss.attention(Tiny(), given, [0], **PLAIN), as_array)
    assert wsss.attention(Tiny(), picture()[..., 0], [0], **PLAIN).shape == (1, *SIZE)
    for wrong in (picture() / 255, picture().transpose(2, 0, 1), picture()[..., :2]):
        with pytest.raises(InputError, match=r"uint8 \(H, W, 3\)"):
            wsss.attention(Tiny(), wrong, [0])
    with pytest.raises(InputError, match="not a readable image"):
        wsss.attention(Tiny(), tmp_path / "b.png", [0])


def test_pil_images_are_read_as_their_files_are(tmp_path: Path) -> None:
    from wsss.pictures import read_picture

    sixteen = Image.fromarray((np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8))
    sixteen.save(tmp_path / "a.png")
    assert np.array_equal(read_picture(sixteen), read_picture(tmp_path / "a.png"))
    assert read_picture(sixteen)[0, 1, 0] == 4
    with pytest.raises(InputError):
        read_picture(Image.fromarray(np.full((8, 8), 0.5, np.float32)))


def test_a_model_of_nan_is_no_absence_of_evidence() -> None:
    net = Tiny()
    torch.nn.init.constant_(net.head.weight, float("nan"))
    with pytest.raises(InputError, match="not finite"):
        wsss.attention(net, picture(), [0], **PLAIN)
    with pytest.raises(InputError, match="std"):
        wsss.attention(Tiny(), picture(), [0], mean=(0, 0, 0), std=(0, 0, 0))
    with pytest.raises(InputError, match="class numbers"):
        wsss.attention(Tiny(), picture(), [1.5])


@pytest.mark.parametrize("method", ["cam", "gradcam"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_gives_the_same_maps(method: str, dtype: torch.dtype) -> None:
    plain = wsss.attention(Tiny(), picture(), [0, 1], method=method, **PLAIN)
    found = wsss.attention(Tiny().to(dtype), picture(), [0, 1], method=method, **PLAIN)
    assert found.dtype == np.float32
    assert np.abs(found - plain).max() < 0.02


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
@pytest.mark.parametrize("method", ["cam", "gradcam"])
def test_a_deep_model_of_half_precision_gives_nearly_the_same_maps(name: str, method: str) -> None:
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None)
    image = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    plain = wsss.attention(net, image, [3], method=method, short_side_px=96)
    assert np.abs(wsss.attention(net.bfloat16(), image, [3], method=method, short_side_px=96) - plain).mean() < 0.05


@pytest.mark.parametrize("method", ["cam", "gradcam"])
def test_inference_mode_around_the_call_or_the_making_changes_nothing(method: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None)
    plain = wsss.attention(net, picture(), [3], method=method, short_side_px=64)
    with torch.inference_mode():
        assert np.array_equal(wsss.attention(net, picture(), [3], method=method, short_side_px=64), plain)
        made = torchvision.models.resnet18(weights=None)
        made.load_state_dict(net.state_dict())
        made.requires_grad_(False)
    before = {name: tensor for name, tensor in made.named_parameters()}
    assert np.array_equal(wsss.attention(made, picture(), [3], method=method, short_side_px=64), plain)
    assert all(tensor is before[name] for name, tensor in made.named_parameters())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": (float("nan"),)}, "scales: expected a list of finite numbers above 0 and up to 16, found .nan"),
        ({"scales": (1.0, -1.0)}, r"scales: .*found \(1.0, -1.0\)"),
        ({"scales": (float("inf"),)}, "scales: "),
        ({"scales": (1e9,)}, "up to 16"),
        ({"scales": ()}, "scales: "),
        ({"scales": 1.0}, "scales: expected a list of finite numbers above 0 and up to 16, found 1.0"),
        ({"scales": ("big",)}, "scales: "),
        ({"mean": (0.5,)}, r"mean: expected 3 finite numbers, found \(0.5,\)"),
        ({"mean": (0.5, 0.5, 0.5, 0.5)}, "mean: expected 3 finite numbers, found"),
        ({"mean": ()}, "mean: expected 3 finite numbers, found"),
        ({"mean": (0, 0, float("nan"))}, "mean: expected 3 finite numbers, found"),
        ({"mean": 0.5}, "mean: expected 3 finite numbers, found 0.5"),
        ({"std": (1, 1)}, r"std: expected 3 finite numbers above 0, found \(1, 1\)"),
        ({"std": (1, 1, -1)}, "std: "),
        ({"std": (1, 1, float("nan"))}, "std: "),
        ({"short_side_px": 0}, "short_side_px: expected 1 … 16384 or None, found 0"),
        ({"short_side_px": 1e9}, "short_side_px: "),
        ({"labels": 1}, "labels: expected class numbers 0 … 1, found 1"),
        ({"labels": [True]}, "labels: expected class numbers"),
        ({"labels": "01"}, "labels: expected class numbers"),
        ({"image": None}, "expected a path, a PIL image or RGB as a numpy array, uint8 .*, found NoneType"),
        ({"image": ""}, "found an empty path"),
        ({"image": torch.zeros(3, 8, 8)}, "found Tensor"),
        ({"image": np.zeros((0, 8, 3), np.uint8)}, "expected an image with pixels"),
        ({"image": Image.new("RGB", (8, 0))}, "expected an image with pixels"),
        ({"model": None}, "model: expected a torch.nn.Module, found NoneType"),
    ],
)
def test_wrong_arguments_of_attention_are_one_line(options: dict[str, object], text: str) -> None:
    arguments = {"model": Tiny(), "image": picture(), "labels": [0]} | options
    with pytest.raises(InputError, match=text) as caught:
        wsss.attention(**arguments)  # type: ignore[arg-type] - wrong on purpose
    assert "\n" not in str(caught.value)


def test_a_normalisation_of_the_model_that_is_none_is_named() -> None:
    net = Tiny()
    net.pretrained_cfg = {"mean": (0.5,), "std": (0.2,)}  # type: ignore[assignment] - as timm sets it
    with pytest.raises(InputError, match=r"mean: expected 3 finite numbers, found \(0.5,\)"):
        wsss.attention(net, picture(), [0])


def test_images_of_one_pixel_and_tiny_scales_have_a_map() -> None:
    pixel = np.full((1, 1, 3), 200, np.uint8)
    assert wsss.attention(Tiny(), pixel, [0], scales=[1e-6, 1]).shape == (1, 1, 1)


# -- refine -----------------------------------------------------------------------------------------------------------


def two_halves() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Dark left, bright right; and a mask whose edge is 3 pixels off and that has a hole."""
    image = np.full((40, 40, 3), 30, np.uint8)
    image[:, 20:] = 220
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 17:] = 9
    mask[10:13, 30:33] = 0
    return image, mask


def test_a_mask_follows_the_edges_of_the_image_and_keeps_its_numbers() -> None:
    image, mask = two_halves()
    right = np.zeros_like(mask)
    right[:, 20:] = 9
    assert np.array_equal(wsss.refine(image, mask=mask), right)
    unsure = mask.copy()
    unsure[:, 15:25] = 255
    assert np.array_equal(wsss.refine(image, mask=unsure), right)
    assert np.array_equal(wsss.refine(image, mask=mask.astype(np.int64)), right)
    assert np.array_equal(wsss.refine(image, mask=mask, crf=None), mask)
    assert (wsss.refine(image, mask=np.full_like(mask, 7)) == 7).all()


def test_maps_become_class_numbers() -> None:
    image, mask = two_halves()
    maps = np.stack([(mask == 0) * 0.2, (mask > 0) * 0.8]).astype(np.float32)
    found = wsss.refine(image, maps=maps, labels=[14, 3])
    assert set(np.unique(found)) == {4, 15}
    assert (found[:, 20:] == 4).all()
    assert (found[:, :20] == 15).all()
    bytes_ = np.rint(maps * 255).astype(np.uint8)
    assert np.array_equal(wsss.refine(image, maps=bytes_, labels=[14, 3]), found)
    assert np.array_equal(wsss.refine(image, maps=maps[1:], threshold=0.5, crf=None), (mask > 0).astype(np.uint8))
    small = maps[1:, ::4, ::4]  # of any resolution
    assert (wsss.refine(image, maps=small)[:, 22:] == 1).all()


def test_probabilities_give_positions() -> None:
    image, mask = two_halves()
    probabilities = np.where(mask == 0, 0.3, 0.6)[None] * np.array([0, 1, 0])[:, None, None]
    probabilities[0] = 1 - probabilities[1]
    found = wsss.refine(image, probabilities=probabilities.astype(np.float32))
    assert np.array_equal(found, np.where(np.arange(40) >= 20, 1, 0)[None].repeat(40, 0))


def test_energies_and_logits_are_refused_and_told_what_to_do() -> None:
    image, mask = two_halves()
    right = np.stack([mask == 0, mask > 0]) * 0.8 + 0.1
    for wrong in (-np.log(right), np.log(right), right * 2, right * np.nan):
        with pytest.raises(InputError, match=r"sum to 1 over the labels.*softmax.*exp"):
            wsss.refine(image, probabilities=wrong)
    assert wsss.refine(image, probabilities=right.astype(np.float16)).shape == (40, 40)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected one of maps, mask and probabilities, found none"),
        ({"maps": np.ones((1, 4, 4)), "mask": np.zeros((40, 40), int)}, "found maps and mask"),
        ({"maps": np.ones((40, 40))}, r"expected \(n, h, w\)"),
        ({"maps": np.full((1, 4, 4), 1.5)}, r"values in \[0, 1\], found 1.5"),
        ({"maps": np.full((1, 4, 4), -0.5)}, r"values in \[0, 1\], found -0.5"),
        ({"maps": np.full((1, 4, 4), np.nan)}, r"values in \[0, 1\]"),
        ({"maps": np.ones((2, 4, 4)), "labels": [1.5, 2]}, "expected 2 different class numbers"),
        ({"maps": np.ones((2, 4, 4)), "labels": ["a", "b"]}, "expected 2 different class numbers"),
        ({"maps": np.ones((2, 4, 4)), "labels": 3}, "expected 2 different class numbers 0 … 253, one a map, found 3"),
        ({"maps": np.ones((1, 4, 4)), "threshold": float("nan")}, "the options of refine are wrong"),
        ({"maps": np.ones((1, 4, 4)), "confidence": "high"}, "the options of refine are wrong"),
        (
            {"mask": np.eye(40, dtype=int), "confidence": "high"},
            "confidence: expected above 0.5 and below 1, found 'high'",
        ),
        ({"mask": np.eye(40, dtype=int), "crf": 5}, "crf: expected a CrfConfig, None or one of .*, found int"),
        ({"probabilities": np.full((2, 40, 40), np.nan)}, "sum to 1 over the labels"),
        ({"probabilities": np.zeros((2, 40, 0))}, r"expected floats \(L, 40, 40\)"),
        ({"mask": np.zeros((0, 0), int)}, r"of the image's \(40, 40\)"),
        ({"maps": np.ones((2, 4, 4)), "labels": [1]}, "expected 2 different class numbers"),
        ({"maps": np.ones((2, 4, 4)), "labels": [1, 1]}, "expected 2 different class numbers"),
        ({"maps": np.ones((1, 4, 4)), "threshold": 1.5}, "the options of refine are wrong"),
        ({"maps": [[[0.5]]]}, "expected a numpy array, found list"),
        ({"mask": np.eye(40, dtype=int), "crf": "irm"}, "crf: expected a CrfConfig"),
        ({"mask": np.zeros((40, 41), int)}, r"of the image's \(40, 40\)"),
        ({"mask": np.zeros((40, 40))}, "expected integers"),
        ({"mask": np.full((40, 40), 300)}, "labels 0 … 255, found 300"),
        ({"mask": np.eye(40, dtype=int), "confidence": 0.4}, "confidence: expected above 0.5"),
        ({"mask": np.eye(40, dtype=int), "labels": [1]}, "labels go with maps"),
        ({"probabilities": np.full((2, 20, 20), 0.5)}, r"expected floats \(L, 40, 40\)"),
        ({"probabilities": np.ones((1, 40, 40))}, "expected 2 … 255 labels"),
    ],
)
def test_wrong_shapes_and_ranges_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        wsss.refine(two_halves()[0], **options)


@pytest.mark.parametrize("image", [None, "", np.zeros((0, 40, 3), np.uint8), Image.new("L", (0, 0)), 7])
def test_what_is_no_image_is_refused(image: object) -> None:
    with pytest.raises(InputError, match=r"expected (a path|an image with pixels)"):
        wsss.refine(image, mask=np.zeros((40, 40), int))  # type: ignore[arg-type] - wrong on purpose


def test_maps_of_exchanged_height_and_width_are_refused_and_squares_are_of_any_image() -> None:
    image = np.zeros((30, 40, 3), np.uint8)
    for shape in ((40, 30), (12, 9), (8, 6)):
        with pytest.raises(InputError, match=r"height and width are exchanged; take maps.transpose\(0, 2, 1\)"):
            wsss.refine(image, maps=np.ones((1, *shape)))
    for shape in ((7, 7), (30, 40), (3, 4), (2, 1)):
        assert wsss.refine(image, maps=np.ones((1, *shape)), crf=None).shape == (30, 40)
