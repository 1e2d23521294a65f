"""The deployments: every shipped config, every stage, and the file for ``prefect deploy``."""

from pathlib import Path

import yaml

from pipeline.config.run_config import find_config, load_config, shipped_configs
from pipeline.engine.stage_table import STAGES
from pipeline.flows.deployments import describe_deployments, write_prefect_yaml

ROOT = Path(__file__).parents[3]


def names(flow: str) -> list[str]:
    return [deployment.name for deployment in describe_deployments() if deployment.flow == flow]


def test_each_shipped_config_and_each_stage_has_a_deployment():
    assert names("wsss") == [path.stem.replace("_", "-") for path in shipped_configs()]
    assert {"demo", "voc12-gain", "voc12-cam"} <= set(names("wsss"))
    assert names("wsss-stage") == list(STAGES)
    assert names("wsss-shard") == ["any"]


def test_each_deployment_names_a_config_that_loads_and_says_what_it_is():
    for deployment in describe_deployments():
        run = load_config(find_config(deployment.parameters["config"]))
        assert len(deployment.description) > 20
        if deployment.flow == "wsss":
            assert run.train_classifier.method.name in deployment.tags


def test_prefect_yaml_is_up_to_date(tmp_path: Path):
    write_prefect_yaml(tmp_path / "prefect.yaml")
    found = (ROOT / "prefect.yaml").read_text(encoding="utf-8")
    assert found == (tmp_path / "prefect.yaml").read_text(encoding="utf-8"), (
        "run: python -m pipeline.flows.deployments --write prefect.yaml"
    )
    document = yaml.safe_load(found)
    assert len(document["deployments"]) == len(describe_deployments())
    assert {entry["enforce_parameter_schema"] for entry in document["deployments"]} == {True}
