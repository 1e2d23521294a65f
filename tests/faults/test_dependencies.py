"""No version that constraints.txt names has a vulnerability that is known: asks the index of pip-audit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.flows.clusters import ROOT


def find_audit() -> str | None:
    beside = Path(sys.executable).with_name("pip-audit")
    return str(beside) if beside.exists() else shutil.which("pip-audit")


@pytest.mark.slow
@pytest.mark.skipif(find_audit() is None, reason="pip-audit is not installed: pip install pip-audit")
def test_no_pinned_version_has_a_known_vulnerability():
    command = [
        str(find_audit()),
        "--requirement",
        "constraints.txt",
        "--no-deps",
        "--disable-pip",
        "--progress-spinner=off",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if "ConnectionError" in done.stderr or "ServiceError" in done.stderr:
        pytest.skip("offline: the index of vulnerabilities cannot be reached")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
