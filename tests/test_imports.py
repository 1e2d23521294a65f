"""What must not be imported where: a config is checked, and a finished run repeated, without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.machine_speed import cpu_seconds, slowness

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "torchvision", "prefect", "albumentations", "cv2", "scipy.ndimage", "matplotlib", "timm")
"""Of scipy a part: numba, whose import keys rest on, looks at scipy's version, which loads its light root."""

CHECK = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
{{code}}
print(sorted(name for name in {HEAVY!r} if name in sys.modules))
"""

CASES = {
    "a config is read": "from pipeline.config.run_config import load_config; load_config(Path('configs/demo.yaml'))",
    "a wrong config is refused": """
from pipeline.config.run_config import load_config
from stages.errors import ConfigError
try:
    load_config(Path('configs/demo.yaml'), ['make_masks.thresold=0.3', 'seed=x'])
except ConfigError as error:
    assert len(error.problems) == 2, error
else:
    raise AssertionError('accepted')
""",
    "keys are computed": """
import tempfile
from pipeline.config.run_config import load_config
from pipeline.engine.plan import plan_run
plan_run(load_config(Path('configs/demo.yaml')), Path(tempfile.mkdtemp()) / 'digests.json')
""",
    "the engine is imported": "import pipeline.engine.run, pipeline.engine.records, pipeline.engine.child",
}


@pytest.mark.parametrize("code", CASES.values(), ids=list(CASES))
def test_nothing_heavy_is_imported_when(code: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", CHECK.replace("{code}", code)], capture_output=True, text=True, cwd=ROOT
    )
    assert answer.stdout.strip() == "[]", answer.stdout + answer.stderr


def test_checking_a_config_takes_less_than_a_second_of_cpu() -> None:
    started = time.monotonic()
    seconds = cpu_seconds("-c", CHECK.replace("{code}", CASES["a wrong config is refused"]))
    # CPU time, because the machine that tests may be busy; wall time is only a safety net
    assert seconds < 1.0 * slowness()
    assert time.monotonic() - started < 60
