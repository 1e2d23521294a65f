"""``wsss up`` and ``wsss down``: a server, workers and what keeps them going, on this machine."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import JsonOption
from pipeline.cli.output import Output, get_output
from pipeline.engine.invocation import DEFAULT_ARTIFACTS

if TYPE_CHECKING:
    from pipeline.flows.cluster import UpCall

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="DIR", envvar="PREFECT_HOME", help="Prefect's files and our logs; by default .prefect."
    ),
]


def up(
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Address that the server listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port of the server.")] = 4200,
    pool: Annotated[str, typer.Option("--pool", help="Work pool, of type process.")] = "wsss",
    workers: Annotated[
        str, typer.Option("--workers", metavar="auto|N", help="auto: one per visible GPU, or one on the CPU.")
    ] = "auto",
    max_runs: Annotated[
        int | None, typer.Option("--max-runs", metavar="N", min=1, help="Flow runs of the pool at a time.")
    ] = None,
    home: HomeOption = None,
    artifacts: Annotated[
        str, typer.Option("--artifacts", metavar="DIR", envvar="WSSS_ARTIFACTS", help="Root of the artifact store.")
    ] = DEFAULT_ARTIFACTS,
    files_port: Annotated[
        int, typer.Option("--files-port", min=1, max=65535, help="Port for the store's reports, on this machine only.")
    ] = 4201,
    files_url: Annotated[
        str, typer.Option("--files-url", envvar="WSSS_FILES_URL", help="Where another server has the store's reports.")
    ] = "",
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay until SIGTERM or Ctrl-C, then do as wsss down.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Start server, work pool, workers and supervisor; what is up already stays."""
    from pipeline.flows.cluster import UpCall
    from pipeline.flows.cluster import up as bring_up
    from pipeline.flows.environment import default_home

    output = get_output(context)
    call = UpCall(
        home=(home or default_home()).absolute(),
        host=host,
        port=port,
        files_port=files_port,
        pool=pool,
        workers=_number(workers),
        max_runs=max_runs,
        artifacts=artifacts,
        given_files_url=files_url,
    )
    output.document = bring_up(call, output.say)
    if not output.is_json:
        _say_up(output, output.document, call.home)
    if foreground:
        _stay(call, output)


def down(context: typer.Context, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """End what wsss up started; interrupted runs go on with the next wsss up."""
    from pipeline.flows.cluster_down import down as bring_down
    from pipeline.flows.environment import default_home

    output = get_output(context)
    output.document = bring_down((home or default_home()).absolute(), output.say)
    if not output.is_json:
        _say_down(output, output.document)


def _number(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise typer.BadParameter(f"expected auto or a number, got {text!r}", param_hint="--workers")
    return int(text)


def _say_up(output: Output, found: dict[str, Any], home: Path) -> None:
    rows = [("UI", found["ui_url"]), ("API", found["api_url"]), ("reports", found["files_url"] or "not served")]
    rows.append(("pool", found["pool"]["name"]))
    for component in (found["server"], found["supervisor"], *found["workers"]):
        where = f"GPU {component['gpu']}" if component.get("gpu") else "CPU" if "gpu" in component else ""
        pid = f"pid {component['pid']}" if "pid" in component else ""
        rows.append((component["name"], f"{component['state']:11} {pid:12} {where}".rstrip()))
    if found["database"]:
        locked = f"{found['database_locked_errors']} times 'database is locked' in server.log"
        rows.append(("database", f"{found['database']}, {locked}"))
    rows.append(("logs", str(found["logs"])))
    width = max(len(name) for name, _ in rows)
    output.say("")
    for name, value in rows:
        output.say(f"{name:{width}}  {value}")
    for note in found["notes"]:
        output.say(f"note: {note}")
    home_words = "" if home == Path(".prefect").absolute() else f" --home {home}"
    output.say(f"\nexport PREFECT_API_URL={found['api_url']} PREFECT_HOME={home} DO_NOT_TRACK=1")
    output.say("next: prefect deployment run 'wsss/demo' --watch")
    output.say(f"end:  wsss down{home_words}")


def _say_down(output: Output, found: dict[str, Any]) -> None:
    if not found["ended"]:
        output.say(f"nothing was up in {found['home']}")
        return
    output.say(f"ended: {', '.join(found['ended'])}")
    if "server" in found["ended"]:
        output.say(f"{found['database_locked_errors']} times 'database is locked' in server.log")
    for flow_run_id in found["interrupted_runs"]:
        output.say(f"interrupted: flow run {flow_run_id}")
    if found["interrupted_runs"]:
        output.say("they go on from where they stopped with the next free worker, here after: wsss up")


def _stay(call: UpCall, output: Output) -> None:
    """Wait for a signal, and see to it that there is a supervisor; then end everything."""
    from pipeline.flows.cluster_down import down as bring_down
    from pipeline.flows.cluster_state import SUPERVISOR
    from pipeline.flows.supervisor import ensure_running

    try:
        while True:
            time.sleep(2.0)
            ensure_running(call.home, SUPERVISOR)
    except KeyboardInterrupt:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        bring_down(call.home, output.say)
        signal.signal(signal.SIGTERM, before)
