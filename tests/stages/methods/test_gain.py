"""GAIN and GAIN_ext: losses worked out by hand, where gradients may flow, and which images give their masks."""

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ImageRecord
from stages.errors import ConfigError
from stages.methods.gain import GAIN_PAPER, GainConfig, GainExtConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.classifier import Classifier
from stages.nets.weights import build_backbone
from stages.ops.cells import CellAxis, CellGrid, cells_to_pixels
from stages.ops.mining import (
    erase,
    mean_over_classes_then_images,
    normalise_maps,
    pixel_targets,
    soft_mask,
    squared_error,
)
from stages.ops.step import StepInfo

STEP = StepInfo(step=0, num_steps=10, epoch=0, device=torch.device("cpu"))
LABELS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(build_backbone(BackboneConfig(name="small"), {}), 3).train()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


def _mine_all(**options):
    return GainConfig(**{"am_min_probability": 0, "alpha": 1, **options}).build()


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_the_mining_loss_is_the_mean_over_images_of_the_mean_over_their_classes():
    image = torch.tensor([0, 1, 1, 1])
    values = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert mean_over_classes_then_images(values, image, 2).item() == pytest.approx((4 + 2) / 2)
    assert mean_over_classes_then_images(values, image, 5).item() == pytest.approx(3.0), "images without pairs"
    assert mean_over_classes_then_images(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).item() == 0


def test_images_of_one_and_three_labels_weigh_the_same_in_the_objective(classifier, images):
    losses = _mine_all(am_score="logit").objective(classifier, images, LABELS, STEP)
    alone = [
        _mine_all(am_score="logit").objective(_evaluating(classifier), images[i : i + 1], LABELS[i : i + 1], STEP)
        for i in range(2)
    ]
    both = _mine_all(am_score="logit").objective(_evaluating(classifier), images, LABELS, STEP)
    assert both["mining"].item() == pytest.approx((alone[0]["mining"] + alone[1]["mining"]).item() / 2, rel=1e-4)
    assert losses["loss"].item() == pytest.approx((losses["classification"] + losses["mining"]).item(), rel=1e-5)


def _evaluating(classifier):
    """BatchNorm in evaluation: an image's result then does not depend on the batch."""
    return classifier.eval()


def test_normalising_and_masking_by_hand():
    maps = torch.tensor([[[1.0, 3.0], [5.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(
        normalise_maps(maps, "max", "full")[0], torch.tensor([[0.2, 0.6], [1.0, 0.6]]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        normalise_maps(maps, "minmax", "detached")[0], torch.tensor([[0.0, 0.5], [1.0, 0.5]]), rtol=1e-4, atol=1e-4
    )
    assert normalise_maps(maps, "minmax", "full")[1].abs().max() == 0, "no evidence stays zero"
    mask = soft_mask(torch.tensor([[[0.5, 1.0]]]), sigma=0.5, omega=10)
    torch.testing.assert_close(mask, torch.tensor([[[0.5, 1 / (1 + 2.718281828**-5)]]]))
    erased = erase(torch.full((1, 3, 1, 2), 2.0), torch.tensor([[[0.25, 1.0]]]))
    torch.testing.assert_close(erased, torch.tensor([1.5, 0.0]).expand(1, 3, 1, 2))


def test_a_full_normalisation_gradient_ignores_the_scale_of_the_features_and_a_detached_one_does_not():
    maps = torch.rand(1, 3, 3)
    for gradient, expected in (("full", 0.0), ("detached", None)):
        scale = torch.ones((), requires_grad=True)
        soft_mask(normalise_maps(maps * scale, "max", gradient), sigma=0.5, omega=5).sum().backward()
        if expected is None:
            assert scale.grad.item() > 0.1
        else:
            assert scale.grad.item() == pytest.approx(0, abs=1e-4)


def test_pixel_targets_average_areas_and_leave_void_out():
    masks = torch.tensor([[[2, 2, 255, 255], [2, 0, 255, 255], [0, 0, 2, 255], [0, 0, 1, 255]]], dtype=torch.uint8)
    even = CellGrid.even((2, 2), (4, 4))
    target, known = pixel_targets(masks, torch.tensor([0, 0]), torch.tensor([1, 0]), (2, 2), even)
    torch.testing.assert_close(target, torch.tensor([[[0.75, 0.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.5]]]))
    assert known.tolist() == [[[1, 0], [1, 1]]] * 2
    attention = torch.tensor([[[1.0, 0.9], [0.5, 0.5]]])
    assert squared_error(attention, target[:1], known[:1]).item() == pytest.approx((0.25**2 + 0.5**2 + 0) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Where gradients flow
# ---------------------------------------------------------------------------------------------------------------------


def test_mask_only_reaches_the_backbone_but_never_the_head_and_shared_reaches_both(classifier, images):
    for mode, head_moves in (("mask_only", False), ("shared", True)):
        classifier.zero_grad()
        losses = _mine_all(mining_gradient=mode).objective(classifier, images, LABELS, STEP)
        losses["mining"].backward()
        assert classifier.backbone.features[0].weight.grad.abs().max() > 0
        head = classifier.head.weight.grad
        assert (head is not None and head.abs().max() > 0) == head_moves


def test_the_mining_gradient_through_the_mask_equals_a_pass_with_a_frozen_copy(classifier, images):
    import copy

    classifier.eval()
    frozen = copy.deepcopy(classifier).requires_grad_(requires_grad=False)
    method = _mine_all(am_score="logit", mask_sigma=0.4, mask_omega=8)
    method.objective(classifier, images, LABELS, STEP)["mining"].backward()
    got = classifier.backbone.features[0].weight.grad.clone()
    classifier.zero_grad()
    features = classifier.backbone(images)
    pairs = [(0, 0), (1, 0), (1, 1), (1, 2)]
    total = 0
    for i, c in pairs:
        raw = torch.einsum("d,dhw->hw", classifier.head.weight.detach()[c, :, 0, 0], features[i]).relu()
        up = cells_to_pixels(raw, (32, 48), CellGrid(CellAxis(0, 4), CellAxis(0, 4)))
        attention = up / (up.max().detach() + 1e-6)
        erased = images[i] * (1 - torch.sigmoid(8 * (attention - 0.4)))
        total = total + frozen(erased[None]).logits[0, c] / (1 if i == 0 else 3) / 2
    total.backward()
    torch.testing.assert_close(got, classifier.backbone.features[0].weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["shared", "mask_only"])
def test_the_masked_pass_leaves_batch_norm_statistics_alone(classifier, images, mode):
    plain = GainConfig(alpha=0).build()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    plain.objective(classifier, images, LABELS, STEP)
    once = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.load_state_dict(before)
    _mine_all(mining_gradient=mode).objective(classifier, images, LABELS, STEP)
    for name, value in classifier.state_dict().items():
        torch.testing.assert_close(value, once[name], rtol=0, atol=0)
    assert all(m.training for m in classifier.modules()), "every layer is back in training mode"


def test_nothing_is_mined_before_the_warm_up_ends(classifier, images):
    method = _mine_all(am_warmup_epochs=2)
    early = method.objective(classifier, images, LABELS, StepInfo(9, 10, 1, torch.device("cpu")))
    late = method.objective(classifier, images, LABELS, StepInfo(9, 10, 2, torch.device("cpu")))
    assert early["mining"].item() == early["mined"].item() == 0
    assert early["loss"].item() == early["classification"].item()
    assert late["mining"].item() > 0
    assert late["mined"].item() == 1


def test_only_classes_that_the_classifier_knows_are_mined(classifier, images):
    classifier.eval()
    probability = classifier(images).logits.sigmoid()[LABELS > 0]
    between = probability.sort().values[1:3].mean().item()  # two of the four pairs are above
    losses = GainConfig(am_min_probability=between).build().objective(classifier, images, LABELS, STEP)
    assert losses["mined"].item() == pytest.approx(0.5)
    none = GainConfig(am_min_probability=0.99).build().objective(classifier, images, LABELS, STEP)
    assert none["mining"].item() == none["mined"].item() == 0
    none["loss"].backward()


@pytest.mark.parametrize(("mode", "passes"), [("per_class", 4), ("joint", 2), ("random_class", 2)])
def test_each_mode_looks_at_as_many_erased_images_as_it_says(classifier, images, mode, passes, monkeypatch):
    seen = []
    method = _mine_all(am_mode=mode)
    look = method._look_again
    monkeypatch.setattr(method, "_look_again", lambda net, erased: seen.append(erased) or look(net, erased))
    losses = method.objective(classifier, images, LABELS, STEP)
    assert len(seen) == 1, "all pairs of a batch go through one masked pass"
    assert seen[0].shape == (passes, 3, 32, 48)
    assert torch.isfinite(losses["loss"])


def test_random_class_draws_every_class_of_an_image_in_turn(classifier, images):
    classifier.eval()
    method = GainConfig(am_mode="random_class", am_min_probability=0).build()
    evidence, _ = method._classify(classifier, images, LABELS)
    drawn = set()
    for seed in range(30):
        torch.manual_seed(seed)
        chosen = method._choose(evidence)
        assert evidence.image[chosen].tolist() == [0, 1]
        drawn.add(int(evidence.label[chosen][1]))
    assert drawn == {0, 1, 2}


def test_second_order_lets_the_mining_loss_reach_the_head(classifier, images):
    for second_order in (False, True):
        classifier.zero_grad()
        method = _mine_all(second_order=second_order)
        method.objective(classifier, images, LABELS, STEP)["mining"].backward()
        head = classifier.head.weight.grad
        assert (head is not None and head.abs().max() > 0) == second_order


def test_images_without_labels_are_no_trouble(classifier, images):
    losses = (
        GainExtConfig(pixel_images=1)
        .build()
        .objective(classifier, images, torch.zeros(2, 3), STEP, masks=torch.full((2, 32, 48), 255))
    )
    losses["loss"].backward()
    assert losses["mining"].item() == losses["pixel"].item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# GAIN_ext
# ---------------------------------------------------------------------------------------------------------------------


def test_the_pixel_loss_by_hand_and_its_weight(classifier, images):
    classifier.eval()
    masks = torch.full((2, 32, 48), 255)
    masks[1] = 0
    masks[1, :16, :24] = 1  # class 0 in a quarter of image 1; classes 1 and 2 are not in the crop
    method = GainExtConfig(pixel_images=1, am_min_probability=0, alpha=0.5).build()
    losses = method.objective(classifier, images, LABELS, STEP, masks=masks)
    maps = classifier(images).scores[1, 0].relu()
    attention = maps / maps.max()
    rows, columns = (torch.tensor([1.0] * half + [0.375] + [0.0] * (half - 1)) for half in (4, 6))
    target = rows[:, None] * columns  # cell 4: pixel 14, half of it, and 15 of 14 to 18
    assert losses["pixel"].item() == pytest.approx(((attention - target) ** 2).mean().item(), rel=1e-4)
    expected = losses["classification"] + 0.5 * losses["mining"] + 10 * losses["pixel"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_pixel_loss_waits_for_its_warm_up(classifier, images):
    masks = torch.zeros(2, 32, 48, dtype=torch.uint8)
    masks[:, 8:20, 8:30] = 1
    method = GainExtConfig(pixel_images=1, ext_warmup_epochs=2).build()
    values = [
        method.objective(classifier, images, LABELS, StepInfo(9, 10, epoch, torch.device("cpu")), masks=masks)["pixel"]
        for epoch in (1, 2)
    ]
    assert values[0].item() == 0 < values[1].item()


def test_maps_can_be_compared_at_the_masks_size(classifier, images):
    masks = torch.zeros(2, 32, 48, dtype=torch.uint8)
    masks[:, 8:20, 8:30] = 1
    both = [
        GainExtConfig(pixel_images=1, ext_resize=resize, alpha=0)
        .build()
        .objective(classifier.eval(), images, LABELS, STEP, masks=masks)["pixel"]
        .item()
        for resize in ("mask_to_map", "map_to_mask")
    ]
    assert both[0] != both[1]
    assert both[0] == pytest.approx(both[1], rel=0.3)


def _records(masked, unmasked=2):
    return [
        ImageRecord(id=f"i{n}", image=f"i{n}.png", size=(32, 32), labels=(0,), mask=f"m{n}.png" if n < masked else None)
        for n in range(masked + unmasked)
    ]


def test_the_subset_is_drawn_by_seed_and_grows_by_adding():
    records = _records(40)
    ten = GainExtConfig(pixel_images=10).pixel_labelled(records)
    assert len(set(ten)) == 10
    assert set(ten) <= {f"i{n}" for n in range(40)}
    assert ten == GainExtConfig(pixel_images=10).pixel_labelled(records[::-1])
    assert set(ten) < set(GainExtConfig(pixel_images=20).pixel_labelled(records))
    assert set(ten) != set(GainExtConfig(pixel_images=10, pixel_seed=1).pixel_labelled(records))


def test_a_subset_larger_than_the_masks_is_refused():
    with pytest.raises(ConfigError, match=r"asks for 200 images with true masks; 3 of the 5 training images have one"):
        GainExtConfig().pixel_labelled(_records(3))


def test_a_listed_subset_names_every_id_that_cannot_be_used(tmp_path):
    path = tmp_path / "subset.txt"
    path.write_text("i1\ni0\ni3\nnobody\n")
    config = GainExtConfig(pixel_list=path)
    with pytest.raises(ConfigError) as caught:
        config.pixel_labelled(_records(2))
    assert [problem.split(": ", 2)[2] for problem in caught.value.problems] == [
        "image 'i3' has no true mask; remove the line",
        "image 'nobody' is not among the images that the classifier is trained on; remove the line",
    ]
    path.write_text("i1\ni0\n")
    assert config.pixel_labelled(_records(2)) == ("i1", "i0")
    assert config.key_content()["pixel_list"] == ["i1", "i0"], "a key rests on the ids, not on the path"
    path.write_text("\n")
    with pytest.raises(ConfigError, match="names images that cannot be used") as empty:
        config.pixel_labelled(_records(2))
    assert "the list is empty" in empty.value.problems[0]
    with pytest.raises(ConfigError, match="does not read"):
        GainExtConfig(pixel_list=tmp_path / "none.txt").pixel_labelled(_records(2))


def test_number_and_list_exclude_each_other(tmp_path):
    with pytest.raises(ValidationError, match="exactly one of pixel_images and pixel_list"):
        GainExtConfig(pixel_images=3, pixel_list=tmp_path / "a.txt")
    with pytest.raises(ValidationError, match="exactly one of pixel_images and pixel_list"):
        GainExtConfig(pixel_images=None)


def test_only_pixel_labelled_images_are_repeated():
    config = GainExtConfig(pixel_repeat=4)
    assert [config.repeats(image_id, frozenset({"a"})) for image_id in ("a", "b")] == [4, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_the_strict_preset_is_the_paper_and_single_fields_beat_it():
    paper = GainConfig(preset="gain_paper")
    assert {name: getattr(paper, name) for name in GAIN_PAPER} == GAIN_PAPER
    assert (paper.alpha, paper.mining_gradient, paper.am_score, paper.second_order) == (1.0, "shared", "logit", False)
    assert GainConfig(preset="gain_paper", alpha=0.3).alpha == 0.3
    assert GainConfig.model_validate(paper.model_dump()) == paper
    assert GainExtConfig().ext_weight == 10


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_sigma": 0},
        {"mask_sigma": 1},
        {"mask_omega": 0},
        {"alpha": -1},
        {"am_min_probability": 1},
        {"am_warmup_epochs": -1},
        {"mining_gradient": "both"},
        {"ext_weight": 10},
        {"layer": "features.8", "channel_weights": "closed_form"},
    ],
)
def test_values_out_of_range_and_options_of_others_are_refused(wrong):
    with pytest.raises(ValidationError):
        GainConfig(**wrong)
