"""The overlays of deploy/kubernetes, rendered by the real kustomize, and what is in them."""

import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from server.settings import Settings
from tests.support.required import find_tool, require_or_skip

__all__ = [
    "KUBERNETES",
    "OVERLAYS",
    "RUNNING",
    "Pod",
    "find",
    "one",
    "pods",
    "render",
    "selects",
    "served",
    "servers",
    "settings",
]

Manifest = dict[str, Any]
KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
RUNNING = ("cpu", "gpu", "kserve")
"""Overlays that run servers."""
OVERLAYS = (*RUNNING, "monitoring")
PREDICTOR_FIELDS = frozenset(
    {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "deploymentStrategy", "model"}
)
"""Fields of a predictor that are KServe's; the others are those of a pod."""


@functools.cache
def _rendered(overlay: str, program: str) -> str:
    result = subprocess.run(
        [program, "kustomize", str(KUBERNETES / "overlays" / overlay)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def render(overlay: str) -> list[Manifest]:
    """Return what an overlay applies; skips the calling test where there is no kubectl."""
    program = find_tool("kubectl")
    require_or_skip("kubectl", program)
    return list(yaml.safe_load_all(_rendered(overlay, str(program))))


def find(overlay: str, kind: str) -> list[Manifest]:
    """Return the objects of one kind."""
    return [manifest for manifest in render(overlay) if manifest["kind"] == kind]


def one(overlay: str, kind: str) -> Manifest:
    """Return the only object of its kind."""
    (found,) = find(overlay, kind)
    return found


def settings(overlay: str) -> dict[str, str]:
    """Return the settings of the servers as their environment has them."""
    return one(overlay, "ConfigMap")["data"]


def served(overlay: str) -> Settings:
    """Return the settings that a server of an overlay starts with."""
    values = {n.removeprefix("DALORRA_").lower(): v for n, v in settings(overlay).items()}
    return Settings(**values)  # type: ignore[arg-type]


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Return whether a selector by labels takes a pod with these labels."""
    return selector.get("matchLabels", {}).items() <= labels.items()


@dataclass(frozen=True)
class Pod:
    """What will run.

    Attributes:
        name: Of what makes it.
        labels: Its own.
        spec: Its own; of an InferenceService, what KServe makes of it and its runtime.
        serves: Whether it is a server rather than a job.
    """

    name: str
    labels: dict[str, str]
    spec: Manifest = field(repr=False)
    serves: bool

    @property
    def container(self) -> Manifest:
        """Its only container."""
        (container,) = self.spec["containers"]
        return container


def pods(overlay: str) -> Iterator[Pod]:
    """Give every kind of pod that an overlay makes."""
    for manifest in render(overlay):
        name, spec = manifest["metadata"]["name"], manifest.get("spec", {})
        if manifest["kind"] in ("Deployment", "Job"):
            template = spec["template"]
            serves = manifest["kind"] == "Deployment"
            yield Pod(name, template["metadata"]["labels"], template["spec"], serves)
        if manifest["kind"] == "InferenceService":
            runtime = one(overlay, "ServingRuntime")["spec"]
            own = {k: v for k, v in spec["predictor"].items() if k not in PREDICTOR_FIELDS}
            merged = {**own, "containers": runtime["containers"], "volumes": runtime["volumes"]}
            yield Pod(name, runtime["labels"], merged, serves=True)


def servers(overlay: str) -> list[Pod]:
    """Return the pods that serve."""
    return [pod for pod in pods(overlay) if pod.serves]
