import numpy as np
import pytest
import torch
from torch.nn import functional

from stages.contracts import ImageRecord
from stages.errors import EnvironmentFailure, InputError
from stages.masks.extraction import AttentionExtractor, Views, build_inputs, plan_batches
from stages.methods.cam import Cam
from stages.nets.backbones.cell_rules import CellRule
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.network import IMAGENET_MEAN
from stages.nets.classifier import Classifier
from stages.nets.weights import build_backbone
from tests.stages.linear_nets import linear_backbone

CPU = torch.device("cpu")


class Brightness:
    """A method whose attention of class k is the brightness of colour channel k, averaged over cells of 4 pixels."""

    attention_needs_gradient = False

    def __init__(self, limit: int = 1000, factor: float = 1.0) -> None:
        self.limit, self.factor = limit, factor
        self.batches: list[tuple[int, ...]] = []

    def attention(self, classifier, images, labels):
        self.batches.append(tuple(images.shape))
        if len(images) > self.limit:
            raise torch.OutOfMemoryError("no more memory")
        assert torch.is_inference_mode_enabled() is not self.attention_needs_gradient
        return functional.avg_pool2d(images + 3.0, 4) * self.factor * labels[:, :, None, None]


class SignedBrightness(Brightness):
    """The same with a sign: the middle grey is 0, and the attention is the positive part."""

    def score_maps(self, classifier, images):
        return functional.avg_pool2d(images, 4)

    def attention(self, classifier, images, labels):
        return self.score_maps(classifier, images).relu() * labels[:, :, None, None]


def _extractor(method, views, warnings=None, **others):
    classifier = Classifier(build_backbone(BackboneConfig(name="small"), {}), 3).eval()
    classifier.backbone.cell_rule = CellRule.EVEN_POOLS  # as Brightness looks
    warn = (warnings if warnings is not None else []).append
    options = {"views": views, "map_stride": 4, "num_foreground": 3, "device": CPU, "warn": warn, **others}
    return AttentionExtractor(classifier, method, **options)


def _record(number: int, size: tuple[int, int], labels: tuple[int, ...] = (0,)) -> ImageRecord:
    return ImageRecord(id=f"i{number}", image=f"i{number}.png", size=size, labels=labels)


def _smooth_image(height: int, width: int) -> np.ndarray:
    """Brightness rises from the top left to the bottom right; red along the width, green along the height."""
    columns, rows = np.linspace(10, 240, width), np.linspace(10, 240, height)
    image = np.zeros((height, width, 3))
    image[..., 0], image[..., 1] = columns[None], rows[:, None]
    return image.round().astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(40, 64), (37, 51), (50, 33)])
def test_maps_lie_where_the_image_is_at_every_scale_and_mirrored(size, flip):
    image = _smooth_image(*size)
    for scale in (0.5, 1.0, 2.0):
        views = Views((scale,), flip, None)
        record = _record(0, size, (0, 1))
        found = _extractor(Brightness(), views).records([record], build_inputs([image], views))[0]
        h, w = -(-size[0] // 4), -(-size[1] // 4)
        assert found.maps.shape == (2, h, w)
        restored = found.maps / 255.0 * found.peaks[:, None, None] - 3.0
        grey = restored * np.array([0.229, 0.224])[:, None, None] + np.array([0.485, 0.456])[:, None, None]
        red = 10 + 230 * ((np.arange(w) + 0.5) / w * size[1] - 0.5) / (size[1] - 1)
        green = 10 + 230 * ((np.arange(h) + 0.5) / h * size[0] - 0.5) / (size[0] - 1)
        inner = (slice(2, -3), slice(2, -3))  # border cells see the padding
        assert np.abs(grey[0] * 255 - red[None])[inner].max() < 3
        assert np.abs(grey[1] * 255 - green[:, None])[inner].max() < 3


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((1.0,), True), ((0.75, 1.5), True)])
@pytest.mark.parametrize(
    ("name", "stride", "shift_px"),
    [
        ("small", 4, 1.5),
        ("vgg16", 16, 0),
        ("resnet50", 16, 7.5),
        ("squeezenet1_1", 16, None),
        ("tf_efficientnet_lite0", 16, -7.5),
    ],
)
def test_a_map_lies_on_the_object_that_was_seen(name, stride, shift_px, scales, flip, monkeypatch):
    """A bright spot on the mean colour: centres of mass agree to a pixel; evenly spread cells are half one off."""
    size, centre = (118, 150), np.array([54.0, 86.0])
    places = np.moveaxis(np.indices(size), 0, -1)
    spot = np.exp(-np.square(places - centre).sum(axis=-1, keepdims=True) / (2 * 14**2))
    image = (255 * (np.array(IMAGENET_MEAN) * (1 - spot) + spot)).round().astype(np.uint8)
    classifier = Classifier(linear_backbone(name, stride, monkeypatch), 1).eval()
    torch.nn.init.ones_(classifier.head.weight)
    views, record = Views(scales, flip, None), _record(0, size)

    def find_centre():
        extractor = AttentionExtractor(
            classifier, Cam(), views=views, map_stride=1, num_foreground=1, device=CPU, warn=pytest.fail
        )
        (found,) = extractor.records([record], build_inputs([image], views))
        weights = np.maximum(found.maps[0].reshape(-1).astype(float) - 50, 0)
        return np.average(places.reshape(-1, 2), axis=0, weights=weights)

    assert np.abs(find_centre() - centre).max() < 1
    if scales == (1.0,) and not flip and shift_px is not None:
        classifier.backbone.cell_rule = CellRule.EVEN_POOLS
        assert find_centre() - centre == pytest.approx([shift_px, shift_px], abs=1)


def test_the_mirrored_view_changes_nothing_for_a_method_that_does_not_care():
    image = np.random.default_rng(0).integers(0, 255, (32, 64, 3), dtype=np.uint8)
    record = _record(0, (32, 64))
    plain, both = Views((1.0,), False, None), Views((1.0,), True, None)
    one = _extractor(Brightness(), plain).records([record], build_inputs([image], plain))[0]
    two = _extractor(Brightness(), both).records([record], build_inputs([image], both))[0]
    np.testing.assert_array_equal(one.maps, two.maps)


def test_batches_share_padded_sizes_and_keep_every_image_once():
    views = Views((1.0, 2.0), True, None)
    records = [_record(n, size) for n, size in enumerate([(24, 40), (90, 30), (23, 39), (24, 40), (40, 24)])]
    batches = list(plan_batches(records, views, budget_px=1 << 20))
    assert [[record.id for record in batch] for batch in batches] == [["i0", "i2", "i3"], ["i1"], ["i4"]]
    small = list(plan_batches(records, views, budget_px=1))
    assert [len(batch) for batch in small] == [1, 1, 1, 1, 1]


def test_an_image_does_not_feel_the_company_in_its_batch():
    views = Views((0.5, 1.0), True, None)
    images = [_smooth_image(24, 40), _smooth_image(23, 38)[::-1].copy()]
    records = [_record(0, (24, 40), (0, 2)), _record(1, (23, 38), (1,))]
    together = _extractor(Brightness(), views).records(records, build_inputs(images, views))
    for record, image, found in zip(records, images, together, strict=True):
        alone = _extractor(Brightness(), views).records([record], build_inputs([image], views))[0]
        assert found.labels == alone.labels == record.labels
        assert np.abs(found.maps.astype(int) - alone.maps).max() <= 1


def test_out_of_memory_halves_the_batch_and_gives_the_same_maps():
    views = Views((1.0,), True, None)
    images = [_smooth_image(24, 40)] * 5
    records = [_record(n, (24, 40)) for n in range(5)]
    tight, warnings = Brightness(limit=3), []
    found = _extractor(tight, views, warnings).records(records, build_inputs(images, views))
    free = _extractor(Brightness(), views).records(records, build_inputs(images, views))
    assert [shape[0] for shape in tight.batches] == [10, 5, 2, 2, 2, 2, 2]
    assert warnings[0] == "out of device memory with 10 inputs of 32 × 64 pixels: going on with 5"
    for one, two in zip(found, free, strict=True):
        np.testing.assert_array_equal(one.maps, two.maps)


def test_a_single_input_that_does_not_fit_is_an_error_with_ways_out():
    views = Views((1.0,), False, None)
    with pytest.raises(EnvironmentFailure, match=r"one input of 32 × 64 pixels.*short_side_px"):
        _extractor(Brightness(limit=0), views).records(
            [_record(0, (24, 40))], build_inputs([_smooth_image(24, 40)], views)
        )


def test_broken_weights_are_named_with_the_image():
    views = Views((1.0,), False, None)
    with pytest.raises(InputError, match="image 'i0': attention maps must be finite"):
        _extractor(Brightness(factor=float("nan")), views).records(
            [_record(0, (24, 40))], build_inputs([_smooth_image(24, 40)], views)
        )


def test_a_broken_map_can_be_borne_beside_a_sound_one():
    class HalfBroken(Brightness):
        def attention(self, classifier, images, labels):
            maps = super().attention(classifier, images, labels)
            return maps * torch.tensor([1.0, float("inf"), 1.0])[:, None, None]

    views, record, image = Views((1.0,), False, None), _record(0, (24, 40), (0, 1)), _smooth_image(24, 40)
    sound = _extractor(Brightness(), views).records([record], build_inputs([image], views))[0]
    inputs = build_inputs([image], views)
    (borne,) = _extractor(HalfBroken(), views).records([record], inputs, is_nan_borne=True)
    np.testing.assert_array_equal(borne.maps[0], sound.maps[0])
    assert borne.peaks[0] == sound.peaks[0]
    assert not borne.maps[1].any()
    assert np.isnan(borne.peaks[1])


def test_a_method_that_differentiates_runs_outside_inference_mode():
    class NeedsGradient(Brightness):
        attention_needs_gradient = True

        def attention(self, classifier, images, labels):
            output = classifier(images)
            (gradient,) = torch.autograd.grad(output.logits[:, 0].sum(), output.scores)
            return super().attention(classifier, images, labels) + gradient.sum()

    views = Views((1.0,), False, None)
    found = _extractor(NeedsGradient(), views).records(
        [_record(0, (24, 40))], build_inputs([_smooth_image(24, 40)], views)
    )
    assert found[0].maps.max() == 255


def test_short_side_is_applied_before_the_scales():
    views = Views((0.25, 0.5, 1.0), False, 80)
    assert views.sizes((24, 36)) == ((32, 32), (40, 60), (80, 120)), "no side below 32"
    assert views.padded((24, 36)) == ((32, 32), (64, 64), (96, 128))


@pytest.mark.parametrize("flip", [False, True])
def test_minmax_stretches_the_scores_with_their_sign(flip):
    image = _smooth_image(32, 64)  # red rises evenly from left to right: half of it lies below 0
    views, record = Views((1.0,), flip, None), _record(0, (32, 64))
    inputs = build_inputs([image], views)
    stretched = _extractor(SignedBrightness(), views, normalisation="minmax").records([record], inputs)[0].maps[0]
    np.testing.assert_allclose(stretched[0], np.linspace(0, 255, 16), atol=1)
    cut = _extractor(SignedBrightness(), views).records([record], inputs)[0].maps[0]
    assert (cut[0] == 0).sum() == 8
    assert cut.max() == 255


def test_minmax_of_attention_without_signed_scores_and_of_constant_maps():
    views, record = Views((1.0,), False, None), _record(0, (32, 64), (0, 2))
    inputs = build_inputs([_smooth_image(32, 64)], views)  # blue is 0 everywhere
    found = _extractor(Brightness(), views, normalisation="minmax").records([record], inputs)[0]
    np.testing.assert_allclose(found.maps[0, 0], np.linspace(0, 255, 16), atol=1)
    assert not found.maps[1].any()
