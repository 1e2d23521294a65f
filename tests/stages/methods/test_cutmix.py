"""CutMix pastes one rectangle and counts its area."""

import pytest
import torch
from pydantic import ValidationError

from stages.contracts import ClassList
from stages.methods.classifier_files import ClassifierDescription, build_classifier
from stages.methods.cutmix import CutMixConfig, mix_batch, pasted_box
from stages.nets.backbones.config import BackboneConfig
from stages.ops.losses import multilabel_soft_margin, softmax_cross_entropy
from stages.ops.step import StepInfo

STEP = StepInfo(step=0, num_steps=1, epoch=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _fixed_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _build(**options):
    description = ClassifierDescription(
        backbone=BackboneConfig(name="small"),
        method=CutMixConfig(**options),
        classes=ClassList(names=("red", "green", "blue")),
    )
    return build_classifier(description, {})


@pytest.mark.parametrize(
    ("centre", "kept", "expected"),
    [
        ((20, 30), 0.75, (10, 30, 15, 45)),  # half of each side: 20 × 30 of 40 × 60
        ((0, 59), 0.75, (0, 10, 44, 60)),  # cut off at the top and on the right
        ((20, 30), 1.0, (20, 20, 30, 30)),  # nothing
        ((20, 30), 0.0, (0, 40, 0, 60)),  # everything
    ],
)
def test_the_box_has_the_images_form_and_is_cut_off_at_the_edges(centre, kept, expected):
    assert pasted_box((40, 60), centre, kept) == expected


def test_a_rectangle_of_each_partner_is_pasted_and_the_area_is_counted_again():
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30).clone()
    shares = []
    for seed in range(30):
        torch.manual_seed(seed)
        mixed = mix_batch(images, 1.0)
        assert sorted(mixed.partners.tolist()) == [0, 1, 2, 3]
        for number in range(4):
            own = (mixed.images[number] == number).float()
            partner = (mixed.images[number] == mixed.partners[number]).float()
            assert torch.equal((own + partner > 0).float(), torch.ones(3, 20, 30))
            if mixed.partners[number] != number:
                assert own.mean().item() == pytest.approx(mixed.kept, abs=1e-6)
                rows, columns = partner[0].nonzero(as_tuple=True)
                area = 0 if len(rows) == 0 else (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
                assert area == partner[0].sum()  # one whole rectangle
        shares.append(mixed.kept)
    assert images.unique().tolist() == [0, 1, 2, 3]
    assert min(shares) < 0.4 < 0.9 < max(shares)


def test_the_same_seed_mixes_alike_and_the_next_draw_does_not():
    images = torch.randn(4, 3, 20, 30)
    torch.manual_seed(2)
    first, second = mix_batch(images, 0.5), mix_batch(images, 0.5)
    torch.manual_seed(2)
    again = mix_batch(images, 0.5)
    assert torch.equal(first.images, again.images)
    assert first.kept == again.kept
    assert not torch.equal(first.images, second.images)


def test_the_loss_weighs_both_labels_by_area():
    classifier, method = _build()
    images, labels = torch.randn(3, 3, 32, 48), torch.eye(3)
    torch.manual_seed(4)
    losses = method.objective(classifier.train(), images, labels, STEP)
    torch.manual_seed(4)
    torch.rand(())
    mixed = mix_batch(images, 1.0)
    logits = classifier(mixed.images).logits
    own, partner = multilabel_soft_margin(logits, labels), multilabel_soft_margin(logits, labels[mixed.partners])
    assert 0 < mixed.kept < 1
    torch.testing.assert_close(losses["loss"], mixed.kept * own + (1 - mixed.kept) * partner)
    torch.testing.assert_close(
        losses["loss"], multilabel_soft_margin(logits, mixed.kept * labels + (1 - mixed.kept) * labels[mixed.partners])
    )
    assert losses["kept"].item() == pytest.approx(mixed.kept)


def test_exclusive_classes_are_mixed_by_their_shares():
    classifier, method = _build(mix_rate=1.0)
    classifier.is_exclusive = True
    images, labels = torch.randn(3, 3, 32, 48), torch.eye(3)
    torch.manual_seed(4)
    losses = method.objective(classifier.train(), images, labels, STEP)
    torch.manual_seed(4)
    torch.rand(())
    mixed = mix_batch(images, 1.0)
    shares = mixed.kept * labels + (1 - mixed.kept) * labels[mixed.partners]
    torch.testing.assert_close(losses["loss"], softmax_cross_entropy(classifier(mixed.images).logits, shares))


def test_a_batch_that_is_not_mixed_has_the_plain_loss():
    classifier, method = _build(mix_rate=0.0)
    images, labels = torch.randn(3, 3, 32, 48), torch.eye(3)
    losses = method.objective(classifier.train(), images, labels, STEP)
    torch.testing.assert_close(losses["loss"], multilabel_soft_margin(classifier(images).logits, labels))
    assert losses["kept"] == 1


def test_batches_are_mixed_as_often_as_the_rate_says():
    classifier, method = _build(mix_rate=0.5)
    images, labels = torch.randn(2, 3, 16, 16), torch.eye(3)[:2]
    mixed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        with torch.no_grad():
            mixed += int(method.objective(classifier.train(), images, labels, STEP)["kept"] < 1)
    assert 17 <= mixed <= 42  # 30 at most, as a box of no area is no mix; a deviation is 3.9


def test_defaults_are_the_papers_and_bounds_hold():
    assert (CutMixConfig().beta, CutMixConfig().mix_rate) == (1.0, 1.0)
    with pytest.raises(ValidationError, match="greater than 0"):
        CutMixConfig(beta=0)
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        CutMixConfig(mix_rate=1.1)
