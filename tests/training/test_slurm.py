"""The batch script for SLURM, with stand-ins for srun and scontrol: every task is a node of its own
on loopback. It is queued again before its time is over, a node dies, and fewer nodes go on."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_OPTIONS, write_photos

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "examples" / "slurm.sh"
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
copying = "--ntasks-per-node=1" in words
command = words[next(i for i, word in enumerate(words) if word[:2] != "--"):]
nodes = int(os.environ["SLURM_NNODES"])
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(nodes), "SLURM_LOCALID": "0"}
step |= {"SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NODELIST": f"127.0.0.[1-{nodes}]"}
tasks = []
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
for rank in range(nodes):
    task = subprocess.Popen(command, env={**os.environ, **step, "SLURM_PROCID": str(rank)})
    tasks.append(task)
if not copying:
    with open(os.environ["PIDS"] + ".part", "w") as file:
        file.write(" ".join(map(str, [os.getpid(), *(task.pid for task in tasks)])))
    os.rename(os.environ["PIDS"] + ".part", os.environ["PIDS"])
# The highest status; srun counts a signal n as 128 + n.
sys.exit(max(code if code >= 0 else 128 - code for code in [task.wait() for task in tasks]))
"""
TINY = TINY_OPTIONS | {
    "timeout": 60,
    "checkpoint-every": 100000,
}


@pytest.fixture
def cluster(tmp_path):
    """start(nodes, steps) → the process of the script."""
    tools = tmp_path / "tools"
    tools.mkdir()
    python = f"exec {sys.executable}"
    (tmp_path / "srun.py").write_text(SRUN)
    for name, line in {
        "srun": f'{python} {tmp_path / "srun.py"} "$@"',
        "scontrol": f'echo "$@" >> {tmp_path / "scontrol"}',
        "simclr-fast": f'{python} -m simclr_fast "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(0o755)
    photos = write_photos(tmp_path / "photos", 16)
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.add(path, path.name)
    running = []

    def start(nodes, steps):
        (tmp_path / "pids").unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes)}
        environment |= {"SLURM_TMPDIR": str(tmp_path / "disk"), "OMP_NUM_THREADS": "1"}
        environment["PIDS"] = str(tmp_path / "pids")
        command = ["bash", SCRIPT, tmp_path / "photos.tar", tmp_path / "run"]
        command += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
        process = subprocess.Popen(
            [*command, "--steps", str(steps)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_step(tmp_path, step, process):
    path = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
    raise AssertionError(process.communicate()[0])


def steps(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_is_queued_again_loses_a_node_and_ends_on_fewer(cluster, tmp_path):
    job = str(os.getpid())
    first = cluster(2, 100000)
    srun, *_ = wait_for_step(tmp_path, 2, first)
    os.kill(srun, signal.SIGUSR1)
    said, _ = first.communicate()
    assert first.returncode == 128 + signal.SIGUSR1, said
    assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n"
    assert (tmp_path / "disk" / f"simclr-{job}" / "photos.tar").is_file()
    saved = steps(tmp_path)[-1]

    second = cluster(2, 100000)
    _, _, dying = wait_for_step(tmp_path, saved + 2, second)
    os.kill(dying, signal.SIGKILL)
    said, _ = second.communicate()
    assert second.returncode not in (0, 128 + signal.SIGUSR1), said
    assert "rank 1" in said
    # SLURM itself queues a job again whose node failed; the script must not do it for errors.
    assert (tmp_path / "scontrol").read_text() == f"requeue {job}\n"

    third = cluster(1, saved + 3)
    said, _ = third.communicate()
    assert third.returncode == 0, said
    assert f"resuming at step {saved}" in said
    assert steps(tmp_path) == list(range(1, saved + 4))
    assert (tmp_path / "run" / "encoder.safetensors").is_file()
