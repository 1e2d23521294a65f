"""Parameters that a flow does not know are named before Prefect stumbles over them."""

import inspect

from pipeline.flows.deployment_check import find_unknown


def flow(config: str, splits: list[str] | None = None) -> None: ...


def test_known_parameters_are_fine():
    assert find_unknown({"config": "demo"}, inspect.signature(flow)) == ""


def test_unknown_ones_are_named_beside_the_known():
    problem = find_unknown({"config": "demo", "split": "val", "alpha": 1}, inspect.signature(flow))
    assert "its parameters alpha, split are not known here (known: config, splits)" in problem
