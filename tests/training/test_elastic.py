"""torchrun --nnodes 1:2 with real agents, each a machine on loopback: one joins, one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import TINY_OPTIONS, write_photos

from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]
TINY = TINY_OPTIONS | {
    "steps": 1_000_000,
    "checkpoint-every": 5,
}


class Machines:
    """Agents that meet on one port; every start and end of a run is in the files of `outputs`."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.agents, self.outputs = folder, [], []
        self.photos = write_photos(folder / "photos", 16)

    def start(self):
        self.outputs.append(self.folder / f"{len(self.agents)}.txt")
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}"]
        # Seconds: how long more machines are waited for, and how often each says that it lives.
        command += ["--rdzv-conf", "last_call_timeout=2,keep_alive_interval=1"]
        command += ["--nproc-per-node", "1", "--max-restarts", "1"]
        command += ["-m", "simclr_fast", "pretrain", "--data", str(self.photos)]
        command += ["--out", str(self.folder / "run"), "--resume"]
        command += [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        with self.outputs[-1].open("w") as output:
            self.agents.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )

    def kill(self, agent):
        """An agent and its processes, which are in sessions of their own."""
        if agent.poll() is None:
            own = Path("/proc", str(agent.pid), "task", str(agent.pid), "children").read_text()
            for pid in [agent.pid, *map(int, own.split())]:
                os.kill(pid, signal.SIGKILL)
            agent.wait()

    def said(self):
        return "".join(path.read_text() for path in self.outputs)

    def steps(self):
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def wait(self, condition):
        end = time.monotonic() + 150
        while not condition():
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)


@pytest.fixture
def machines(tmp_path):
    started = Machines(tmp_path)
    yield started
    for agent in started.agents:
        started.kill(agent)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_machine_joins_and_dies_and_the_run_goes_on(machines, tmp_path):
    machines.start()
    machines.wait(lambda: len(machines.steps()) > 5)
    machines.start()
    machines.wait(lambda: "8 images over 2 ranks" in machines.said())
    # The machine that was alone saved a checkpoint before it began anew.
    alone = int(machines.said().split("resuming at step ")[1].split()[0])
    machines.wait(lambda: machines.steps()[-1] > alone + 6)
    machines.kill(machines.agents[1])
    machines.wait(lambda: machines.said().count("resuming at step ") == 2)
    # torchrun may give either machine rank 0.
    assert re.search(r"rank (1|0, which hosts the store,) died", machines.said())
    together = int(machines.said().split("resuming at step ")[2].split()[0])
    assert together > alone
    assert together % TINY["checkpoint-every"] == 0
    machines.wait(lambda: machines.steps()[-1] > together + 6)
    machines.agents[0].terminate()
    machines.agents[0].wait()
    steps = machines.steps()
    assert steps == list(range(1, steps[-1] + 1))
    assert load_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[-1])["step"] == steps[-1]
