"""Ray Serve in a process of its own: ``python -m tests.support.serve_on_ray CONFIG``.

A cluster of this machine only, without a dashboard, that runs a configuration as ``serve run`` does
until SIGINT. Waits of Ray's own that a busy machine would not keep are longer than by default.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["main", "ray_serving", "replica_pids"]

ROOT = Path(__file__).parents[2]
STOP_S = 120.0
PATIENCE = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # Ray's workers would come after everybody else
}
PRIVATE = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def ray_serving(config: Path, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a configuration on a cluster of its own until the block ends."""
    variables = PATIENCE | PRIVATE | {"HOME": str(config.parent), "PYTHONPATH": str(ROOT)}
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [sys.executable, "-m", "tests.support.serve_on_ray", str(config)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            for pid in [*_descendants(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def replica_pids(process: "subprocess.Popen[bytes]") -> list[int]:
    """Return the processes of the replicas that run below a process."""
    return [pid for pid in _descendants(process.pid) if _title(pid).startswith("ray::ServeReplica")]


def _descendants(ancestor: int) -> list[int]:
    """Return every process below one."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            after_name = (folder / "stat").read_text("ascii", "replace").rpartition(")")[2]
            children.setdefault(int(after_name.split()[1]), []).append(int(folder.name))
    found: list[int] = []
    left = [ancestor]
    while left:
        below = children.get(left.pop(), [])
        found += below
        left += below
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text("utf-8", "replace")
    except OSError:
        return ""


def main(arguments: list[str]) -> None:
    import ray  # noqa: PLC0415  # pyright: ignore[reportMissingImports] - not where tests run without it
    from ray.serve.scripts import cli  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    # whoever runs the tests in the background has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ray.init(num_cpus=2, include_dashboard=False)
    cli(["run", *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
