"""Which process this is: torchrun's, srun's, or the only one; what cannot work is refused."""

import pytest

from simclr_fast.utils.launch import Launch, first_host, launched, require_one_process

VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_LOCALID"),
    *("SLURM_NNODES", "SLURM_STEP_NUM_NODES", "SLURM_NODELIST", "SLURM_STEP_NODELIST"),
    *("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"),
)
SRUN = {
    "SLURM_JOB_ID": "31",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


@pytest.fixture
def given(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def give(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return give


def test_without_a_launcher_there_is_one_process(given):
    assert launched() == Launch(0, 1, 0, 1)
    require_one_process()


def test_torchrun_gives_the_rank(given):
    given(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4", **SRUN)
    assert launched() == Launch(5, 8, 1, 4, "env://")
    with pytest.raises(ValueError, match="one process, but 8 were started"):
        require_one_process()


def test_half_of_torchruns_variables_are_refused(given):
    given(WORLD_SIZE="8")
    with pytest.raises(ValueError, match="RANK is not set"):
        launched()


def test_srun_gives_the_rank_and_a_common_url(given):
    given(**SRUN)
    first = launched()
    assert (first.rank, first.size, first.local_rank, first.local_size) == (5, 8, 1, 4)
    assert first.url.startswith("tcp://gpu03:")
    with pytest.raises(ValueError, match="one process, but 8 were started"):
        require_one_process()
    # Another step of the job has another port.
    given(SLURM_STEP_ID="1")
    assert launched().url != first.url
    given(MASTER_ADDR="10.0.0.7", MASTER_PORT="29501")
    assert launched().url == "tcp://10.0.0.7:29501"


def test_srun_on_one_machine_meets_there(given):
    given(**SRUN | {"SLURM_STEP_NUM_NODES": "1"})
    assert launched().url.startswith("tcp://127.0.0.1:")
    assert launched().local_size == 8


def test_srun_without_a_host_is_refused(given):
    given(**{name: value for name, value in SRUN.items() if "NODELIST" not in name})
    with pytest.raises(ValueError, match=r"srun started 8 tasks on 2 machines.*MASTER_ADDR"):
        launched()


def test_a_batch_script_is_one_process(given):
    """It sees its job's number of tasks, but srun did not start it."""
    given(SLURM_JOB_ID="31", SLURM_NTASKS="8", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert launched().size == 1


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_mpi_is_refused(given, name):
    given(**{name: "4"})
    with pytest.raises(ValueError, match=f"4 processes .{name}.*torchrun"):
        launched()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-07,12],login1", "gpu03"),
        ("gpu[7,9]", "gpu7"),
        ("a1,a2", "a1"),
        ("rack[0-1]n[12-13]-ib,x", "rack0n12-ib"),
    ],
)
def test_the_first_host_of_a_slurm_list(hosts, first):
    assert first_host(hosts) == first
