"""GAIN and GAIN_ext: losses worked out by hand, where gradients may flow, and which images give their masks."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from stages.contracts import ImageRecord
from stages.errors import ConfigError
from stages.methods.cam import CamConfig
from stages.methods.gain import GAIN_PAPER, GainConfig, GainExtConfig
from stages.nets.backbones.config import BackboneConfig
from stages.nets.backbones.network import Backbone
from stages.nets.classifier import Classifier
from stages.nets.weights import build_backbone
from stages.ops.cells import CellAxis, CellGrid, cells_to_pixels
from stages.ops.mining import (
    erase,
    mean_over_images,
    normalise_maps,
    pixel_targets,
    soft_mask,
    squared_error,
)
from stages.ops.step import StepInfo

K20 = 20
"""Classes of the toy on which the paper's losses must not unlearn anything: VOC has as many."""

STEP = StepInfo(step=0, num_steps=10, epoch=0, device=torch.device("cpu"))
LABELS = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(build_backbone(BackboneConfig(name="small"), {}), 3).train()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


PAPER = {"judge": "self", "mask": "sigmoid", "target": "erased", "am_mode": "per_class", "am_warmup_epochs": 0}


def _mine(**options):
    """The paper's mining from the first step on, but for what is named."""
    return GainConfig(**{**PAPER, **options}).build()


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def test_the_mining_loss_is_the_mean_over_images_of_the_mean_over_their_classes():
    image = torch.tensor([0, 1, 1, 1])
    values = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert mean_over_images(values, image, 2).item() == pytest.approx((4 + 2) / 2)
    assert mean_over_images(values, image, 5).item() == pytest.approx(6 / 5), "images without pairs count as 0"
    assert mean_over_images(torch.zeros(0), torch.zeros(0, dtype=torch.long), 2).item() == 0


def test_images_of_one_and_three_labels_weigh_the_same_in_the_objective(classifier, images):
    losses = _mine(am_score="logit").objective(classifier, images, LABELS, STEP)
    alone = [
        _mine(am_score="logit").objective(_evaluating(classifier), images[i : i + 1], LABELS[i : i + 1], STEP)
        for i in range(2)
    ]
    both = _mine(am_score="logit").objective(_evaluating(classifier), images, LABELS, STEP)
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


def test_a_frozen_judge_teaches_the_backbone_but_never_the_head_and_the_network_as_its_own_judge_both(
    classifier, images
):
    for judge, head_moves in (("frozen", False), ("self", True)):
        classifier.zero_grad()
        losses = _mine(judge=judge).objective(classifier, images, LABELS, STEP)
        losses["mining"].backward()
        assert classifier.backbone.features[0].weight.grad.abs().max() > 0
        head = classifier.head.weight.grad
        assert (head is not None and head.abs().max() > 0) == head_moves


def _by_hand(classifier, judge, images, pairs, *, omega=None, sigma=None):
    """Logits (3,) that ``judge`` gives each image with one class erased, straight from the papers' equations."""
    features = classifier.backbone(images)
    for i, c in pairs:
        raw = torch.einsum("d,dhw->hw", classifier.head.weight.detach()[c, :, 0, 0], features[i]).relu()
        up = cells_to_pixels(raw, (32, 48), CellGrid(CellAxis(0, 4), CellAxis(0, 4)))
        attention = up / (up.max().detach() + 1e-6)
        mask = attention if omega is None else torch.sigmoid(omega * (attention - sigma))
        yield judge((images[i] * (1 - mask))[None]).logits[0]


def test_the_mining_loss_of_the_paper_and_its_gradient_by_hand(classifier, images):
    classifier.eval()
    frozen = copy.deepcopy(classifier).requires_grad_(requires_grad=False)
    method = _mine(judge="frozen", mask_sigma=0.4, mask_omega=8)
    mining = method.objective(classifier, images, LABELS, STEP)["mining"]
    mining.backward()
    got = classifier.backbone.features[0].weight.grad.clone()
    classifier.zero_grad()
    pairs = [(0, 0), (1, 0), (1, 1), (1, 2)]
    logits = _by_hand(classifier, frozen, images, pairs, omega=8, sigma=0.4)
    shares = [1 / 2, 1 / 6, 1 / 6, 1 / 6]  # two images, of one and of three classes
    total = sum(share * row[c].sigmoid() / 3 for share, row, (_, c) in zip(shares, logits, pairs, strict=True))
    assert mining.item() == pytest.approx(total.item(), rel=1e-4)
    total.backward()
    torch.testing.assert_close(got, classifier.backbone.features[0].weight.grad, rtol=1e-4, atol=1e-7)


def test_the_mining_loss_of_the_default_by_hand(classifier, images):
    classifier.eval()
    frozen = copy.deepcopy(classifier).requires_grad_(requires_grad=False)
    method = GainConfig(am_mode="per_class", am_warmup_epochs=0).build()
    mining = method.objective(classifier, images, LABELS, STEP)["mining"]
    pairs = [(0, 0), (1, 0), (1, 1), (1, 2)]
    expected = 0.0
    for (i, c), row in zip(pairs, _by_hand(classifier, frozen, images, pairs), strict=True):
        others = LABELS[i].clone()
        others[c] = 0
        expected += nn.functional.multilabel_soft_margin_loss(row[None], others[None]).item() * (1 / 2, 1 / 6)[i]
    assert mining.item() == pytest.approx(expected, rel=1e-4)


def test_the_frozen_judge_stays_what_the_network_was_when_the_warm_up_ended(classifier, images):
    method = GainConfig(am_warmup_epochs=1).build()
    assert method.state_dict() == {"judge": None}
    method.objective(classifier, images, LABELS, STEP)
    assert method.state_dict() == {"judge": None}, "the warm-up has no judge"
    late = StepInfo(step=5, num_steps=10, epoch=1, device=torch.device("cpu"))
    method.objective(classifier, images, LABELS, late)
    kept = {name: value.clone() for name, value in method.state_dict()["judge"].items()}
    was = classifier.eval()(images).logits
    torch.testing.assert_close(method._judge(images).logits, was, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.add_(0.1)
    torch.manual_seed(3)
    first = method.objective(classifier.train(), images, LABELS, late)
    assert all(torch.equal(value, kept[name]) for name, value in method.state_dict()["judge"].items())
    resumed = GainConfig(am_warmup_epochs=1).build()
    resumed.load_state_dict({"judge": kept})
    torch.manual_seed(3)
    again = resumed.objective(classifier, images, LABELS, late)
    assert torch.equal(first["mining"], again["mining"]), "a resumed training has the same judge"
    assert all(torch.equal(value, kept[name]) for name, value in resumed.state_dict()["judge"].items())


def test_classes_that_exclude_each_other_leave_no_others_to_ask_for(classifier, images):
    classifier.is_exclusive = True
    with pytest.raises(ConfigError, match=r"these images have one label each .*; set method\.target: erased"):
        GainConfig().build().prepare(classifier)
    method = _mine(judge="frozen")
    method.prepare(classifier)
    one_label = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mining = method.objective(classifier.eval(), images, one_label, STEP)["mining"]
    logits = _by_hand(classifier, classifier, images, [(0, 0), (1, 1)], omega=10, sigma=0.5)
    expected = sum(row.softmax(dim=0)[c].item() for c, row in enumerate(logits)) / 2
    assert mining.item() == pytest.approx(expected, rel=1e-3)


def test_a_judge_is_taken_and_kept_whatever_the_labels_of_a_step(classifier, images):
    nothing = torch.zeros_like(LABELS)
    method = GainConfig(am_warmup_epochs=0).build()
    assert method.objective(classifier, images, nothing, STEP)["mining"].item() == 0
    kept = method.state_dict()["judge"]
    assert kept is not None, "another device may mine in this step"
    resumed = GainConfig(am_warmup_epochs=0).build()
    resumed.load_state_dict({"judge": kept})
    assert resumed.state_dict()["judge"] is kept, "a checkpoint before the next step has it too"


def test_batch_norm_keeps_nothing_of_erased_images(classifier, images):
    def statistics(**options):
        net = copy.deepcopy(classifier)
        GainConfig(am_warmup_epochs=0, **options).build().objective(net, images, LABELS, STEP)
        assert all(module.training for module in net.modules()), "every layer is back in training mode"
        return {name: value for name, value in net.state_dict().items() if "running" in name}

    plain, before = statistics(alpha=0), classifier.state_dict()
    assert not any(torch.equal(value, before[name]) for name, value in plain.items())
    for name, value in statistics(judge="frozen").items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0)
    for name, value in statistics(judge="self").items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_nothing_is_mined_before_the_warm_up_ends(classifier, images):
    method = _mine(am_warmup_epochs=2)
    early = method.objective(classifier, images, LABELS, StepInfo(9, 10, 1, torch.device("cpu")))
    late = method.objective(classifier, images, LABELS, StepInfo(9, 10, 2, torch.device("cpu")))
    assert early["mining"].item() == 0
    assert early["loss"].item() == early["classification"].item()
    assert late["mining"].item() > 0


@pytest.mark.parametrize(("mode", "passes"), [("per_class", 4), ("joint", 2), ("random_class", 2)])
def test_each_mode_looks_at_as_many_erased_images_as_it_says(classifier, images, mode, passes, monkeypatch):
    seen = []
    method = _mine(am_mode=mode)
    look = classifier.forward
    monkeypatch.setattr(classifier, "forward", lambda shown: seen.append(shown) or look(shown))
    losses = method.objective(classifier, images, LABELS, STEP)
    assert torch.equal(seen.pop(0), images)
    assert len(seen) == 1, "all pairs of a batch go through one masked pass"
    assert seen[0].shape == (passes, 3, 32, 48)
    assert torch.isfinite(losses["loss"])


def test_random_class_draws_every_class_of_an_image_in_turn(classifier, images):
    classifier.eval()
    method = GainConfig(am_mode="random_class").build()
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
        method = _mine(second_order=second_order, judge="frozen")
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
    method = GainExtConfig(pixel_images=1, alpha=0.5, am_warmup_epochs=0).build()
    losses = method.objective(classifier, images, LABELS, STEP, masks=masks)
    maps = classifier(images).scores[1, 0].relu()
    attention = maps / maps.max()
    rows, columns = (torch.tensor([1.0] * half + [0.375] + [0.0] * (half - 1)) for half in (4, 6))
    target = rows[:, None] * columns  # cell 4: pixel 14, half of it, and 15 of 14 to 18
    assert losses["pixel"].item() == pytest.approx(((attention - target) ** 2).mean().item() / 2, rel=1e-4), (
        "a mean over the batch, of which one image has an error"
    )
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
    assert (paper.alpha, paper.judge, paper.am_score, paper.second_order) == (1.0, "self", "sigmoid", False)
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
        {"am_warmup_epochs": -1},
        {"judge": "both"},
        {"mask": "hard"},
        {"target": "all"},
        {"ext_weight": 10},
        {"layer": "features.8", "channel_weights": "closed_form"},
    ],
)
def test_values_out_of_range_and_options_of_others_are_refused(wrong):
    with pytest.raises(ValidationError):
        GainConfig(**wrong)


# ---------------------------------------------------------------------------------------------------------------------
# What mining does to a classifier
# ---------------------------------------------------------------------------------------------------------------------


def _toy(*, batch_norm):
    """A net of three layers for 24 px images of K = 20 colours."""
    layers = []
    for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
        layers += [nn.ReLU()]
    classifier = Classifier(Backbone(nn.Sequential(*layers), num_channels=64, output_stride=2), K20)
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(classifier.head.weight, std=0.05)
    return classifier


def _coloured_squares(generator, count=32):
    """Images (count, 3, 24, 24) with one to three squares, each of one of 20 colours, and their labels (count, 20)."""
    colours = torch.stack(torch.meshgrid(*[torch.linspace(-1.5, 1.5, 3)] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    colours = colours[torch.arange(27) != 13][:K20]
    images, labels = 0.1 * torch.randn(count, 3, 24, 24, generator=generator), torch.zeros(count, K20)
    for image, label in zip(images, labels, strict=True):
        places = torch.randperm(4, generator=generator)[: int(torch.randint(1, 4, (), generator=generator))]
        for place in places.tolist():
            top, left, c = place // 2 * 12 + 2, place % 2 * 12 + 2, int(torch.randint(K20, (), generator=generator))
            image[:, top : top + 8, left : left + 8] = colours[c][:, None, None]
            label[c] = 1
    return images, labels


def _go_on(classifier, method, steps, rate):
    """Train in place; the recall on other images, in evaluation mode."""
    generator = torch.Generator().manual_seed(7)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=rate, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        images, labels = _coloured_squares(generator)
        optimizer.zero_grad()
        method.objective(classifier.train(), images, labels, STEP)["loss"].backward()
        optimizer.step()
    images, labels = _coloured_squares(torch.Generator().manual_seed(99), 128)
    with torch.no_grad():
        logits = classifier.eval()(images).logits
    return (logits[labels > 0] > 0).float().mean().item()


@pytest.fixture(scope="module", params=[False, True], ids=["no BatchNorm", "BatchNorm"])
def converged(request):
    """A classifier of 20 classes that knows them, and its recall."""
    torch.manual_seed(0)
    classifier, rate = _toy(batch_norm=request.param), 1.0 if request.param else 0.3
    cam = CamConfig().build()
    _go_on(classifier, cam, 200, rate)
    recall = _go_on(classifier, cam, 60, rate / 4)
    assert recall > 0.9
    return classifier, recall


@pytest.mark.parametrize("preset", ["gain", "gain_paper"])
def test_mining_keeps_what_a_converged_classifier_of_twenty_classes_knows(converged, preset):
    classifier, recall = converged
    method = GainConfig(preset=preset, am_warmup_epochs=0).build()
    assert _go_on(copy.deepcopy(classifier), method, 60, 0.1) > recall - 0.03


def test_a_score_without_a_lower_bound_unlearns_them(converged):
    method = GainConfig(preset="gain_paper", am_warmup_epochs=0, am_score="logit").build()
    assert _go_on(copy.deepcopy(converged[0]), method, 60, 0.1) < 0.2
