"""Libraries of trackers that write down what they are called with: the true ones are extras that no test needs."""

from pathlib import Path

FAKES = {
    "tensorboard/__init__.py": "",
    "tensorboard/summary.py": """
import json
from pathlib import Path


class Writer:
    def __init__(self, folder):
        self.file = Path(folder) / "points.jsonl"
        self.file.parent.mkdir(parents=True)

    def add_scalar(self, tag, value, step, *, wall_time):
        with self.file.open("a") as file:
            print(json.dumps([tag, value, step]), file=file)

    def flush(self):
        pass

    def close(self):
        self.add_scalar("closed", 1, 0, wall_time=0)
""",
    "wandb/__init__.py": """
calls = []


class Settings:
    def __init__(self, **values):
        self.sync_dir = "wandb/offline-run-1"


class Run:
    offline = True
    settings = Settings()

    def __getattr__(self, name):
        return lambda *words, **options: calls.append([name, *words, options])

    @property
    def summary(self):
        return self


def init(**options):
    calls.append(["init", options])
    return Run()
""",
    "mlflow/__init__.py": "",
    "mlflow/entities.py": """
from collections import namedtuple

Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")
""",
    "mlflow/tracking.py": """
from types import SimpleNamespace

calls = []


class MlflowClient:
    def __init__(self, tracking_uri):
        calls.append(("client", tracking_uri))

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        calls.append(("experiment", name))
        return "7"

    def create_run(self, experiment_id, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(self, run_id, metrics=(), params=()):
        calls.append(("batch", [tuple(m)[:2] + (m.step,) for m in metrics], [tuple(p) for p in params]))

    def set_terminated(self, run_id, status):
        calls.append(("end", status))
""",
}


def write_fake_trackers(folder: Path) -> None:
    """Write them where ``sys.path`` or PYTHONPATH will find them before the true ones."""
    for name, code in FAKES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
