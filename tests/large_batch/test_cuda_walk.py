"""Whole training steps on device "cuda" without a GPU: what waits, dtypes, layouts, operations."""

import json
import sys

import pytest
import torch
from cuda_walk_steps import FAULTS, GRAPH_FAULTS, main
from rank_runs import on_ranks

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="a torch that is built for CUDA"),
    pytest.mark.skipif(sys.platform != "linux", reason="changes a loaded library in memory"),
]
DTYPE = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Where the host may wait for the GPU in a step whose caller does not know the ranks' rows.
MAY_WAIT_UNTOLD = {
    "utils/distributed.py:gather_row_counts": "ranks may hold different numbers of rows",
}
# Copies between host and GPU that nothing waits for.
MAY_COPY = {
    "elsewhere": "the views' parameters, from pinned memory",
    "augment/views.py:_upload": "the views' constants, from pinned memory",
    "large_batch/store.py:_move_out": "kept values, on a stream of their own",
    "large_batch/store.py:_move_back": "kept values, on a stream of their own",
}
# Launches of one forward and backward of resnet10 with its NORMS batch norms; lockstep: in two
# micro-batches.
NORMS = 14
BUDGET = {
    1: {"plain": 156, "replay": 240, "lockstep": 450},
    8: {"plain": 222, "replay": 264, "lockstep": 491},
}


def walked(folder, world, *cases):
    """What `cuda_walk_steps` saw. A process of its own, as the walk changes torch."""
    on_ranks(main, (world, cases, folder / "seen.json"), 1)
    return json.loads((folder / "seen.json").read_text())


def places(found, allowed):
    """Of `found`, what happened in no function of `allowed`."""
    where = {what: what.partition(" @ ")[2].split(" in ")[0] for what in found}
    return {what: n for what, n in found.items() if where[what] not in allowed}


def check(case, seen, world):
    assert "error" not in seen, (case, seen["error"])
    assert not places(seen["waits"], MAY_WAIT_UNTOLD if "untold" in case else {}), case
    assert not places(seen["copies"], MAY_COPY), case
    mode, dtype, *_ = case.split()
    assert seen["outputs"] == [DTYPE[dtype]] * 2, case
    assert set(seen["convolutions"]) == {f"{DTYPE[dtype]} channels_last"}, case
    assert not seen["wrong gradients"], case
    if mode == "host":
        assert any("store.py:_move_out" in what for what in seen["copies"]), seen["copies"]
    assert seen["gradient"] <= BUDGET[world].get(mode, 1e9), case


def check_capture(case, seen):
    """A capture may neither wait nor copy between host and GPU, not even from pinned memory."""
    assert "error" not in seen, (case, seen["error"])
    found = seen["captured"]
    assert not found["waits"], case
    assert not found["copies"], case
    assert {"convolution", "convolution_backward"} <= found["operations"].keys(), case
    assert not seen["wrong gradients"], case


def check_all(found, cases, world):
    for case in cases:
        check(case, found[case], world)


def assert_layer(seen, collectives):
    """Launches and collectives of one global batch norm."""
    assert "error" not in seen, seen
    assert seen["forward"][0] <= 4
    assert seen["backward"][0] <= 3
    assert [seen[way][1] for way in ("forward", "backward")] == [collectives] * 2


def test_a_step_on_one_gpu(tmp_path):
    cases = "plain bf16", "replay bf16", "lockstep bf16", "plain fp16", "grad-cache bf16"
    captures = "graph bf16", "graph fp16"
    found = walked(tmp_path, 1, *cases, *captures, "evaluate", "layer", *FAULTS, *GRAPH_FAULTS)
    assert_layer(found["layer"], 0)
    check_all(found, cases, 1)
    for fault in FAULTS:
        with pytest.raises(AssertionError):
            check("plain bf16", found[fault], 1)
    assert "same device" in found["wrong device"]["error"]
    for case in captures:
        check_capture(case, found[case])
    for fault in GRAPH_FAULTS:
        assert "error" not in found[fault]
        with pytest.raises(AssertionError, match=fault):
            check_capture(fault, found[fault])
    evaluated = found["evaluate"]
    assert evaluated["features"] == ["torch.float32", "cuda"]
    assert not evaluated["waits"]
    assert list(evaluated["convolutions"]) == ["bfloat16"]


def test_a_step_on_eight_gpus(tmp_path):
    cases = "plain bf16", "replay bf16", "lockstep bf16", "plain bf16 untold"
    found = walked(tmp_path, 8, *cases, "layer")
    assert_layer(found["layer"], 1)
    check_all(found, cases, 8)
    for case in cases:
        collectives = found[case]["collectives"].items()
        assert sum(n for what, n in collectives if "batch_norm.py:_gathered" in what) == NORMS


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 8])
def test_further_dtypes_and_modes(world, tmp_path):
    modes = "plain", "replay", "lockstep", "lean", "host", "grad-cache"
    cases = [f"{mode} {dtype}" for mode in modes for dtype in DTYPE]
    check_all(walked(tmp_path, world, *cases), cases, world)
