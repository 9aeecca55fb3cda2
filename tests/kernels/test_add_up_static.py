"""The order of memory operations by which the last program adds up what all programs left."""

import re

import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from simclr_fast.kernels.nt_xent_tiles import add_up  # noqa: E402


@triton.jit
def sums_kernel(x_ptr, part_ptr, counter_ptr, out_ptr):
    value = tl.sum(tl.load(x_ptr + tl.arange(0, 256)), axis=0)
    add_up(value, part_ptr, counter_ptr, out_ptr, 0.5, 1024)


@triton.jit
def careless_kernel(x_ptr, part_ptr, counter_ptr, out_ptr):
    """The planted fault: without barrier and order another program's value may be missing."""
    value = tl.sum(tl.load(x_ptr + tl.arange(0, 256)), axis=0)
    tl.store(part_ptr + tl.program_id(0), value)
    if tl.atomic_add(counter_ptr, 1, sem="relaxed") == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + tl.arange(0, 256)), axis=0))


# A program's threads have stored, then one of them counts, releasing and acquiring for all, and
# only then do all read, from L2.
ORDER = (
    r"st\.global\.b32.*bar\.sync.*atom\.global\.gpu\.acq_rel\.add\.u32.*bar\.sync.*ld\.global\.cg"
)


def is_ordered(kernel, arch):
    pointers = {"x_ptr": "*fp32", "part_ptr": "*fp32", "out_ptr": "*fp32", "counter_ptr": "*i32"}
    source = ASTSource(kernel, signature={name: pointers[name] for name in kernel.arg_names})
    text = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    return re.search(ORDER, text, re.DOTALL) is not None


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_programs_meet_in_order(arch):
    assert is_ordered(sums_kernel, arch)
    assert not is_ordered(careless_kernel, arch)
