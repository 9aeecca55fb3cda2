"""The rank of this process under a launcher: torchrun, or SLURM's srun."""

import os
import re
from dataclasses import dataclass

# Variables of MPI's launchers that hold the number of processes.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_FIRST_PORT, _PORTS = 15_000, 15_000


@dataclass(frozen=True)
class Launch:
    """rank of size processes; local_rank of local_size on this machine.

    url: where the processes meet, for torch.distributed; "env://" under torchrun.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    url: str = "env://"


def launched() -> Launch:
    """Read the launcher's variables; rank 0 of 1 without a launcher.

    Raises:
        ValueError: several processes were started but cannot meet. Each would train by itself and
            write to the same folder.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        if missing := [name for name in ("RANK", "WORLD_SIZE") if name not in env]:
            raise ValueError(
                f"of RANK and WORLD_SIZE, the variable {missing[0]} is not set: start with torchrun"
            )
        size = int(env["WORLD_SIZE"])
        rank = int(env["RANK"])
        local_size = int(env.get("LOCAL_WORLD_SIZE", size))
        return Launch(rank, size, int(env.get("LOCAL_RANK", rank % local_size)), local_size)
    if (size := _slurm_tasks()) > 1:
        machines = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", 1)))
        local_size = -(-size // machines)
        rank = int(env["SLURM_PROCID"])
        local_rank = int(env.get("SLURM_LOCALID", rank % local_size))
        return Launch(rank, size, local_rank, local_size, _slurm_url(size, machines))
    for name in _MPI_SIZES:
        if int(env.get(name, 1)) > 1:
            raise ValueError(
                f"an MPI launcher started {env[name]} processes ({name}), which cannot meet: start "
                "with torchrun or srun"
            )
    return Launch()


def require_one_process() -> None:
    """Raise ValueError if a launcher started several processes: all would do the same work."""
    if (size := launched().size) > 1:
        raise ValueError(
            f"this command runs as one process, but {size} were started: start it without "
            "torchrun, or with one task of srun"
        )


def _slurm_tasks() -> int:
    """The number of tasks of the srun that started this process; 1 without srun.

    Batch scripts and interactive shells also see SLURM_NTASKS of their job, but are one process.
    Only processes that srun started have SLURM_STEP_ID.
    """
    env = os.environ
    if "SLURM_PROCID" not in env or "SLURM_STEP_ID" not in env:
        return 1
    return int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", 1)))


def _slurm_url(size: int, machines: int) -> str:
    env = os.environ
    address = env.get("MASTER_ADDR")
    if address is None:
        hosts = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST"))
        address = "127.0.0.1" if machines == 1 else hosts and first_host(hosts)
    if not address:
        raise ValueError(
            f"srun started {size} tasks on {machines} machines, but no variable says where they "
            "meet: export MASTER_ADDR=$(scontrol show hostnames | head -n 1) before srun"
        )
    # The same port on all ranks, and a different one for each step of each job.
    number = int(env.get("SLURM_JOB_ID", 0)) + 7919 * int(env.get("SLURM_STEP_ID", 0))
    port = env.get("MASTER_PORT", _FIRST_PORT + number % _PORTS)
    return f"tcp://{address}:{port}"


def first_host(hosts: str) -> str:
    """The first host of SLURM's compressed list: "gpu[03-07,12],login1" → "gpu03"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])
