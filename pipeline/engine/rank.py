"""One rank of a training, started by ``pipeline.engine.launcher`` as ``python -m pipeline.engine.rank FOLDER``.

Reads the request in FOLDER and writes there how it ended.  The main rank writes the stage's files and says its progress
as JSON lines on stdout; the others write nothing and are silent.  The end of stdin ends this process.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.engine.child import ChildProgress, Events, call_stage, die_with_parent
from pipeline.engine.failures import deliberate, to_message
from pipeline.engine.launcher import REQUEST, RanksRequest, ending_name
from pipeline.engine.making import to_plain
from pipeline.store.artifacts import open_store
from stages.contracts import SilentProgress, write_json
from stages.training.distributed import is_main, this_rank


def main(folder: Path) -> int:
    """Call the stage and write down how it ended."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    faulthandler.enable()
    die_with_parent()
    request = RanksRequest.model_validate_json((folder / REQUEST).read_bytes())
    ending = run_rank(request, Events(descriptor))
    write_json(folder / ending_name(this_rank()), {"at": time.time(), **ending})
    return 1 if "error" in ending else 0


def run_rank(request: RanksRequest, events: Events) -> dict[str, Any]:
    """``result`` or ``error`` of the stage, as JSON."""
    told = ChildProgress(events)
    try:
        store = open_store(request.artifacts)
        result = call_stage(request, store, request.work, told if is_main() else SilentProgress())
    except Exception as error:
        return {"error": to_message(deliberate(error, request.stage))}
    finally:
        told.flush()
    return {"result": {"metrics": to_plain(result.metrics), "mask_supervision": list(result.mask_supervision)}}


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)  # at once: after an error the connection to the other ranks is open, and closing it could wait
