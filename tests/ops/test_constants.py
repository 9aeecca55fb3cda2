"""Numbers that Python and csrc/ both hold, and cannot share."""

import re
from pathlib import Path

import pytest
import torch

from simclr_fast import ops
from simclr_fast.ops.lars import LarsFlag

CSRC = Path(__file__).resolve().parents[2] / "csrc"
needs_extension = pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")


def test_lars_flags_equal_those_in_cpp():
    body = re.search(r"enum LarsFlag : int32_t \{(.*?)\}", (CSRC / "lars.h").read_text(), re.S)[1]
    flags = {name.upper(): int(value) for name, value in re.findall(r"lars_(\w+) = (\d+)", body)}
    assert flags == {flag.name: flag.value for flag in LarsFlag}


@needs_extension
def test_lars_hyperparameters_are_in_the_order_of_the_struct():
    from simclr_fast.optim.lars_native import _hyperparameters
    from simclr_fast.optim.lars_torch import Batch

    body = re.search(r"struct LarsGroup \{\s*double (.*?);", (CSRC / "lars.h").read_text(), re.S)[1]
    names = [name.strip() for name in body.split(",")]
    group = {name: float(i) for i, name in enumerate(names)}
    batch = Batch([], [], [], group, group["dampening"], group["weight_decay"], True)
    assert _hyperparameters(batch) == list(range(len(names)))


@needs_extension
@pytest.mark.parametrize("num_rows", [2, 8, 254, 500, 1428, 1430, 1432, 2000, 2002])
def test_the_size_of_kept_values_equals_that_in_cpp(num_rows):
    z, temperature = torch.randn(num_rows, 501), torch.tensor(0.5)
    for dim in (1, num_rows // 4 or 1, (num_rows + 3) // 4, 501):
        out = ops.nt_xent.LossOutput(
            *ops.nt_xent.loss(z[:, :dim], None, temperature, ops.nt_xent.MEAN, False, False, True)
        )
        assert out.kept.numel() == ops.nt_xent.kept_size(num_rows, dim)


@needs_extension
def test_reductions_equal_those_in_cpp():
    z, temperature = torch.randn(10, 3), torch.tensor(0.5)
    rows, mean, total = (
        ops.nt_xent.LossOutput(*ops.nt_xent.loss(z, None, temperature, code, False, False)).loss
        for code in (ops.nt_xent.NONE, ops.nt_xent.MEAN, ops.nt_xent.SUM)
    )
    torch.testing.assert_close(rows.mean(), mean)
    torch.testing.assert_close(rows.sum(), total)
