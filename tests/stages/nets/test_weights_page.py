"""docs/weights.md says what the code does."""

from pathlib import Path

import pytest
import torch

from stages.nets.backbones.config import BACKBONES, BackboneConfig
from stages.nets.backbones.spec import PackageFile
from stages.nets.downloads import PUBLIC_WEIGHTS

PAGE = (Path(__file__).parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", BACKBONES)
def test_strides_and_first_tensor_of_each_backbone_are_on_the_page(name):
    layout = PAGE.partition("## Layout of each backbone")[2].partition("\n## ")[0]
    (row,) = (line for line in layout.splitlines() if line.startswith("|") and f"`{name}`" in line)
    strides = BACKBONES[name].output_strides
    assert f"| {', '.join(map(str, strides))}" in row
    if name != "small":
        with torch.device("meta"):
            first = next(iter(BackboneConfig(name=name, output_stride=strides[-1]).build().state_dict()))
        assert f"`{first}`" in row


@pytest.mark.parametrize("name", PUBLIC_WEIGHTS)
def test_each_public_file_is_on_the_page(name):
    source = PUBLIC_WEIGHTS[name]
    if isinstance(source, PackageFile):
        package = source.package.replace("_", "-")
        assert f"| `{name}` | {package} | {source.file_name} | {source.sha_prefix} |" in PAGE
        return
    assert f"| `{name}` | {source.url} | {source.sha_prefix or 'not published'} |" in PAGE
