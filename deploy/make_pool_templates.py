"""Write ``docker-pool.json`` and ``kubernetes-pool.json``: Prefect's own job templates with what a GPU run needs.

Needs the two worker packages, which wsss itself does not: ``pip install prefect-docker prefect-kubernetes``.
Run it in this folder after an upgrade of either; a test checks what must be in the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

IMAGE = "wsss"
SHM = "8Gi"
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "WSSS_ARTIFACTS": "/wsss/artifacts",
}
"""Of each flow run.  A deployment's ``job_variables.env`` replaces all of it."""


def docker_template(template: dict[str, Any]) -> dict[str, Any]:
    """All GPUs of the machine, shared memory for DataLoader workers, and a folder of the host for artifacts."""
    default = {
        "image": IMAGE,
        "image_pull_policy": "IfNotPresent",
        "env": ENVIRONMENT,
        "auto_remove": True,
        "volumes": ["/srv/wsss/artifacts:/wsss/artifacts", "/srv/wsss/data:/wsss/data:ro"],
        "container_create_kwargs": {
            "init": True,
            "shm_size": "8g",
            "device_requests": [{"driver": "nvidia", "count": -1, "capabilities": [["gpu"]]}],
        },
    }
    for name, value in default.items():
        template["variables"]["properties"][name]["default"] = value
    return template


def kubernetes_template(template: dict[str, Any]) -> dict[str, Any]:
    """One GPU, a claim for artifacts, a claim for data, and memory as /dev/shm."""
    properties = template["variables"]["properties"]
    for name, value in {"image": IMAGE, "env": ENVIRONMENT, "finished_job_ttl": 86400, "backoff_limit": 0}.items():
        properties[name]["default"] = value
    properties["pod_watch_timeout_seconds"]["default"] = 600  # the image has gigabytes
    claims = {"artifacts_claim": "wsss-artifacts", "data_claim": "wsss-data"}
    for name, value in claims.items():
        properties[name] = {
            "title": name.replace("_", " ").capitalize(),
            "description": "Name of the PersistentVolumeClaim; ReadWriteMany for more than one node.",
            "type": "string",
            "default": value,
        }
    properties["gpus"] = {"title": "GPUs", "description": "Of each run.", "type": "integer", "default": 1}
    properties["shm_size"] = {"title": "Size of /dev/shm", "description": "Counts as memory.", "type": "string"}
    properties["shm_size"]["default"] = SHM
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    pod["volumes"] = [
        {"name": "artifacts", "persistentVolumeClaim": {"claimName": "{{ artifacts_claim }}"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "{{ data_claim }}", "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "{{ shm_size }}"}},
    ]
    container = pod["containers"][0]
    container["resources"]["limits"]["nvidia.com/gpu"] = "{{ gpus }}"
    container["volumeMounts"] = [
        {"name": "artifacts", "mountPath": "/wsss/artifacts"},
        {"name": "data", "mountPath": "/wsss/data", "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    return template


def closed(template: dict[str, Any]) -> dict[str, Any]:
    """Without a way for a run to choose its program, and without names that the template does not know."""
    template["variables"]["properties"].pop("command", None)
    template["variables"]["additionalProperties"] = False
    template["job_configuration"].pop("command", None)
    if manifest := template["job_configuration"].get("job_manifest"):
        manifest["spec"]["template"]["spec"]["containers"][0].pop("args", None)  # the worker's own command
    return template


def main() -> None:
    """Write both files beside this one."""
    from prefect_docker.worker import DockerWorker  # pyright: ignore[reportMissingImports]
    from prefect_kubernetes.worker import KubernetesWorker  # pyright: ignore[reportMissingImports]

    found = {
        "docker-pool.json": closed(docker_template(DockerWorker.get_default_base_job_template())),
        "kubernetes-pool.json": closed(kubernetes_template(KubernetesWorker.get_default_base_job_template())),
    }
    for name, template in found.items():
        Path(__file__).with_name(name).write_text(json.dumps(template, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
