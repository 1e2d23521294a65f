"""The threshold that a sweep chooses, and what make_masks and evaluate do with it."""

from pathlib import Path

import numpy as np
import pytest

from stages.contracts import (
    AttentionRecord,
    ClassList,
    Part,
    Runtime,
    SilentProgress,
    open_image_set,
    read_index_mask,
    read_json,
    write_attention_shard,
    write_index_mask,
    write_json,
)
from stages.data.subsets import SweepConfig, choose_sweep_images, sweep_key_content
from stages.errors import ConfigError, DamagedFileError, DataError
from stages.make_masks import MakeMasksConfig, make_masks
from stages.masks.label_rules import SeedConfig, initial_mask
from stages.masks.threshold_choice import choose_threshold, count_thresholds, with_chosen_threshold
from stages.ops.metrics.confusion import confusion_matrix
from stages.scoring.mask_scores import ScoringContext, collect_training, score_training
from tests.stages.tiny_masks import CLASSES, TRAIN, attention_of, size_of, write_world

ONE = Runtime(processes=1, device="cpu")
LABELLED = tuple(image_id for image_id, labels in TRAIN.items() if labels)

World = tuple[Path, Path, Path]


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Objects whose maps are noisy, each about a level of its own: no threshold is right for all."""
    made = write_world(tmp_path / "world", shards=2)
    rng = np.random.default_rng(7)
    records = []
    for level, (image_id, labels) in zip((60, 90, 120, 0, 200), TRAIN.items(), strict=True):
        record = attention_of(image_id, labels)
        noise = rng.normal(0, 25, record.maps.shape)
        maps = np.clip(np.where(record.maps > 99, level + 40, level - 40) + noise, 0, 255).astype(np.uint8)
        records.append(AttentionRecord(image_id, record.size, labels, maps, record.peaks))
    for number, part in enumerate((records[:3], records[3:])):
        write_attention_shard(made[2] / "shards" / f"attention-{number:05d}.npz", part)
    return made


def sweep_of(folder: Path, *ids: str) -> SweepConfig:
    path = folder / "ids.txt"
    path.write_text("\n".join(ids))
    return SweepConfig(num_images=None, image_list=path)


def run(config: MakeMasksConfig, world: World, out: Path, **others: object):
    prepared, data, attention = world
    progress = SilentProgress()
    return make_masks(
        config, images=prepared, attention=attention, data_root=data, out=out, progress=progress, runtime=ONE,
        **others,
    )  # fmt: skip


def evaluated(config: SeedConfig, world: World, masks: Path, ids: set[str], partial: Path):
    """What evaluate counts on ``ids``, with the sweep that it shows."""
    context = ScoringContext(
        images=open_image_set(world[0], world[1]), ids=frozenset(ids), seeds=config, attention=world[2], masks=masks,
        partial=partial,
    )  # fmt: skip
    list(score_training(context, processes=1))
    return collect_training(context)


def test_the_choice_is_the_best_of_evaluates_curve_on_the_same_images(world: World, tmp_path: Path) -> None:
    config = MakeMasksConfig(sweep=sweep_of(tmp_path, "t4", "t0"), refine="none", threshold=0.99)
    result = run(config, world, tmp_path / "out")
    scores = evaluated(with_chosen_threshold(config, tmp_path / "out"), world, tmp_path / "out", {"t0", "t4"}, tmp_path)
    metrics = scores.metrics()
    assert result.metrics["masks.threshold"] == metrics["attention.threshold_oracle"] == scores.level
    assert 0.1 < result.metrics["masks.threshold"] < 0.9
    assert metrics["attention.miou"] == metrics["attention.miou_oracle"] < 1
    assert metrics["masks.miou"] == metrics["attention.miou"]
    assert result.mask_supervision == ("t0", "t4")
    sweep = read_json(tmp_path / "out" / "stats.json")["sweep"]
    assert sweep == {
        "threshold": metrics["attention.threshold_oracle"],
        "miou": metrics["attention.miou_oracle"],
        "image_ids": ["t0", "t4"],
    }


def test_masks_of_a_sweep_are_those_of_its_threshold(world: World, tmp_path: Path) -> None:
    swept = run(MakeMasksConfig(sweep=SweepConfig(num_images=2), refine="none"), world, tmp_path / "swept")
    threshold = swept.metrics["masks.threshold"]
    fixed = run(MakeMasksConfig(threshold=threshold, refine="none"), world, tmp_path / "fixed")
    assert fixed.metrics == {key: value for key, value in swept.metrics.items() if key != "masks.threshold"}
    assert "sweep" not in read_json(tmp_path / "fixed" / "stats.json")
    assert fixed.mask_supervision == ()
    for image_id in TRAIN:
        name = f"masks/{image_id}.png"
        assert (tmp_path / "swept" / name).read_bytes() == (tmp_path / "fixed" / name).read_bytes()


def test_every_part_finds_the_same_threshold(world: World, tmp_path: Path) -> None:
    """No part holds both images of the sweep."""
    config = MakeMasksConfig(sweep=sweep_of(tmp_path, "t0", "t4"), refine="none")
    whole = run(config, world, tmp_path / "whole")
    parts = [run(config, world, tmp_path / "parts", part=Part(index, 3)) for index in range(3)]
    assert {part.mask_supervision for part in parts} == {whole.mask_supervision}
    for image_id in TRAIN:
        name = f"masks/{image_id}.png"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("options", [{}, {"thresholds": {"bird": 0.8}}, {"conflict": "smallest_area"}])
def test_processes_change_no_choice(world: World, options: dict[str, object]) -> None:
    config = SeedConfig.model_validate({"sweep": {"num_images": 4}, **options})
    images = open_image_set(world[0], world[1])
    one, many = (choose_threshold(config, images, world[2], processes=count) for count in (1, 3))
    assert one == many
    assert one.image_ids == LABELLED


def test_one_pass_counts_as_many_do() -> None:
    rng = np.random.default_rng(3)
    record = AttentionRecord("x", (9, 8), (0, 2), rng.integers(0, 256, (2, 5, 4), np.uint8), np.ones(2, np.float32))
    truth = rng.choice([0, 1, 3, 255], (9, 8)).astype(np.uint8)
    classes = ClassList(names=CLASSES)
    counted = count_thresholds(record, truth, classes, SeedConfig())
    for cut, matrix in enumerate(counted):
        mask = initial_mask(record, SeedConfig(threshold=cut / 255))
        np.testing.assert_array_equal(matrix, confusion_matrix(truth, mask, 4))
    # a rule that is not plain and yet says the same, since no cat has a threshold of its own
    other = count_thresholds(record, truth, classes, SeedConfig(thresholds={"dog": 0.9}))
    np.testing.assert_array_equal(other, counted)


def test_a_class_with_its_own_threshold_keeps_it_while_the_other_is_swept(world: World, tmp_path: Path) -> None:
    """Bird (t4) lies 140 bytes above cat (t0): one threshold for both is a compromise, two are not."""
    images = open_image_set(world[0], world[1])
    config = SeedConfig(sweep=sweep_of(tmp_path, "t0", "t4"))
    one = choose_threshold(config, images, world[2], processes=1)
    two = choose_threshold(config.model_copy(update={"thresholds": {"bird": 0.75}}), images, world[2], processes=1)
    assert two.miou > one.miou
    assert two.threshold < one.threshold


def test_other_masks_than_those_of_the_sweep_are_not_read(world: World, tmp_path: Path) -> None:
    for image_id in set(TRAIN) - {"t1"}:
        (world[1] / "masks" / f"{image_id}.png").unlink()
    assert run(MakeMasksConfig(sweep=sweep_of(tmp_path, "t1"), refine="none"), world, tmp_path / "out").metrics
    with pytest.raises(DataError, match=r"t2\.png"):
        run(MakeMasksConfig(sweep=sweep_of(tmp_path, "t1", "t2"), refine="none"), world, tmp_path / "other")


def test_masks_of_nothing_but_void_choose_nothing(world: World, tmp_path: Path) -> None:
    write_index_mask(world[1] / "masks" / "t1.png", np.full(size_of("t1"), 255, np.uint8))
    with pytest.raises(DataError, match="the 1 images of sweep have no pixel other than 255"):
        run(MakeMasksConfig(sweep=sweep_of(tmp_path, "t1"), refine="none"), world, tmp_path / "out")


def test_missing_attention_of_a_swept_image_is_named(world: World, tmp_path: Path) -> None:
    (world[2] / "shards" / "attention-00001.npz").unlink()
    with pytest.raises(DamagedFileError, match=r"no attention for 1 images of sweep \(t4…\)"):
        run(MakeMasksConfig(sweep=sweep_of(tmp_path, "t0", "t4"), refine="none"), world, tmp_path / "out")


def test_a_conflict_that_is_unsure_stays_so_behind_a_crf(world: World, tmp_path: Path) -> None:
    """t2 has two labels; both maps are raised above 0.3 (byte 76) in one corner."""
    record = attention_of("t2", TRAIN["t2"])
    record.maps[:, :2, :3] = 200
    others = [attention_of(image_id, labels) for image_id, labels in TRAIN.items() if image_id != "t2"]
    (world[2] / "shards" / "attention-00001.npz").unlink()
    write_attention_shard(world[2] / "shards" / "attention-00000.npz", [record, *others])
    run(MakeMasksConfig(conflict="unsure"), world, tmp_path / "out")
    mask = read_index_mask(tmp_path / "out" / "masks" / "t2.png")
    assert (mask == 255).sum() == 6
    assert (mask[:2, :3] == 255).all()


def test_thresholds_by_class_reach_masks_and_scores(world: World, tmp_path: Path) -> None:
    plain = MakeMasksConfig(threshold=0.3, refine="none")
    config = plain.model_copy(update={"thresholds": {"bird": 0.75}})
    scores = {}
    for name, rule in (("plain", plain), ("own", config)):
        run(rule, world, tmp_path / name)
        scores[name] = evaluated(rule, world, tmp_path / name, {"t4"}, tmp_path / f"{name}-partial").metrics()
        assert scores[name]["masks.miou"] == scores[name]["masks.miou_before_crf"]
    assert scores["own"]["masks.miou"] > scores["plain"]["masks.miou"]
    assert scores["plain"]["attention.miou"] == scores["plain"]["masks.miou"]
    for metric in ("attention.miou", "attention.miou_oracle"):
        assert scores["own"][metric] == scores["plain"][metric], "of one threshold for all classes"


def test_a_missing_record_of_the_choice_is_named(tmp_path: Path) -> None:
    config = SeedConfig(sweep=SweepConfig())
    write_json(tmp_path / "stats.json", {"images": {}})
    with pytest.raises(DamagedFileError, match="names no chosen threshold; rebuild make_masks"):
        with_chosen_threshold(config, tmp_path)
    assert with_chosen_threshold(SeedConfig(), tmp_path / "nowhere") == SeedConfig()


# ---------------------------------------------------------------------------------------------------------------------
# Which images
# ---------------------------------------------------------------------------------------------------------------------


def test_images_are_drawn_by_the_seed_and_a_larger_draw_holds_the_smaller(world: World) -> None:
    train = open_image_set(world[0], world[1]).index.split("train")
    draws = [choose_sweep_images(SweepConfig(num_images=count), train) for count in (1, 2, 4)]
    assert set(draws[0]) < set(draws[1]) < set(draws[2]) == set(LABELLED), "t3 has no label"
    others = {choose_sweep_images(SweepConfig(num_images=2, seed=seed), train) for seed in range(8)}
    assert len(others) > 1
    with pytest.raises(ConfigError, match=r"asks for 5 images .* 4 of the 5 training images have one"):
        choose_sweep_images(SweepConfig(num_images=5), train)


def test_listed_images_that_cannot_be_used_are_named(world: World, tmp_path: Path) -> None:
    train = open_image_set(world[0], world[1]).index.split("train")
    with pytest.raises(ConfigError) as caught:
        choose_sweep_images(sweep_of(tmp_path, "t1", "t3", "v0"), train)
    assert [problem.partition("image ")[2] for problem in caught.value.problems] == [
        "'t3' has no true mask or no label; remove the line",
        "'v0' is not among the training images; remove the line",
    ]
    with pytest.raises(ConfigError) as caught:
        choose_sweep_images(sweep_of(tmp_path), train)
    assert "the list is empty" in caught.value.problems[0]
    with pytest.raises(ConfigError, match="does not read"):
        choose_sweep_images(SweepConfig(num_images=None, image_list=tmp_path / "none.txt"), train)


def test_a_list_enters_the_key_by_its_ids(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = sweep_of(tmp_path / "a", "x", "y"), sweep_of(tmp_path / "b", "y", "x", "x")
    assert sweep_key_content(one) == sweep_key_content(two) == {"ids": ["x", "y"]}
    assert sweep_key_content(SweepConfig(seed=3)) == {"num_images": 100, "seed": 3}
