"""docs/segmenters.md says what the code does."""

import re
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest
import yaml

from stages.make_masks import MakeMasksConfig
from stages.nets.downloads import COCO_WEIGHTS
from stages.nets.segmenters.config import Init
from stages.train_segmenter import TrainSegmenterConfig
from stages.training.rounds import RetrainingConfig
from stages.training.segmenter_objective import LossConfig, LossName, SecConfig
from stages.training.validation import ValidationConfig

PAGE = (Path(__file__).parents[3] / "docs" / "segmenters.md").read_text(encoding="utf-8")
NETS = ("largefov", "deeplabv2", "deeplabv3", "deeplabv3plus")


@pytest.mark.parametrize("name", COCO_WEIGHTS)
def test_each_public_file_is_on_the_page(name):
    source = COCO_WEIGHTS[name]
    assert f"| `{name}` | {source.url} | {source.sha_prefix} |" in PAGE


def test_the_examples_on_the_page_are_configs():
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    first, sec, rounds, second = (example["train_segmenter"] for example in examples)
    config = TrainSegmenterConfig.model_validate(first)
    common = {"net": first["net"], "training": first["training"]}
    assert TrainSegmenterConfig.model_validate(common | sec).losses == {"sec"}
    assert MakeMasksConfig.model_validate(examples[1]["make_masks"]).confident is not None
    retrained = TrainSegmenterConfig.model_validate(common | sec | rounds)
    assert retrained.losses == {"sec", "cross_entropy"}
    assert (config.net.channels, config.net.dilation, config.training.step_factor) == (1024, 12, 0.1)
    assert ValidationConfig.model_validate(second["validation"]).keep == "best"


def test_every_net_start_and_option_is_on_the_page():
    training = ("accumulate_steps", "ema_decay", "bias_lr_factor", "bias_weight_decay")
    own = (training, ValidationConfig.model_fields, RetrainingConfig.model_fields)
    losses = (*get_args(LossName), *LossConfig.model_fields, *SecConfig.model_fields)
    for word in (*NETS, *get_args(Init), *losses, *chain.from_iterable(own)):
        assert re.search(rf"\b{word}\b", PAGE), word
