"""The commands of the loop with human hands, as they stand on its page, in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from stages.data.adapters.synthetic import SyntheticConfig
from stages.data.adapters.synthetic_images import generate_synthetic
from tests.pipeline.whole_runs.here import wsss_here
from tests.pipeline.whole_runs.tiny_run import tiny_yaml

pytest.importorskip("pycocotools")

PAGE = Path(__file__).parents[2] / "docs" / "annotation.md"


@pytest.mark.slow
def test_the_page_from_its_first_command_to_its_last(tmp_path: Path) -> None:
    generate_synthetic(SyntheticConfig(num_train=6, num_val=2, size_px=64, num_classes=2), tmp_path / "photos")
    config = yaml.safe_load(tiny_yaml())
    config["data"] = {"format": "custom", "root": "photos", "images": "JPEGImages"}
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = [(line, wsss_here(tmp_path, *shlex.split(line)[1:])) for line in "".join(blocks).splitlines()]
    assert [line.split()[1] for line, _ in found] == ["run", "masks", "masks", "masks", "data", "run", "compare"]
    use = found[3][1]["use"]
    shown = [override for _, override in re.findall(r"--set ('?)([^ `']+=[^`'\n ]+)\1", PAGE.read_text())]
    assert use["segmenter"][0] in shown
    assert shlex.join(word for override in use["gain_ext"] for word in ("--set", override)) in PAGE.read_text()
    assert [stage["state"] for stage in found[5][1]["stages"]] == ["cached"] * 4 + ["built"] * 2
