"""The check of shared-memory addresses in machine code finds wrong ones and passes right ones."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from simclr_fast.benchmarks.gpu_static import nt_xent_static
from simclr_fast.benchmarks.sass import stray_addresses


def listing(code: str) -> str:
    """Instructions, one a line, as nvdisasm writes them; labels end with a colon."""
    lines = []
    for number, line in enumerate((*code.strip().splitlines(), "EXIT")):
        text = line.strip()
        address = f"        /*{16 * number:04x}*/                   "
        lines.append(text if text.endswith(":") else f"{address}{text} ;")
    return "\n".join(lines)


# What ptxas of CUDA 12.8 makes of gradient_kernel for sm_90 (float32, tf32x3, 64 × 16 tiles of 32
# features, eight warps), shortened: the base of a descriptor is in UR5, and UR11 is read for it.
CUDA_12_8 = """
    UMOV UR4, 0x400
    S2UR UR9, SR_CgaCtaId
    ULEA UR4, UR9, UR4, 0x18
    ULDC.64 UR10, c[0x0][0x210]
    @P2 BRA `(.L_x_6)
    UIADD3 UR5, UR4, 0x4000, URZ
    UIADD3 UR11, UP0, UR11, 0x2, URZ
    USHF.R.U32.HI UR5, URZ, 0x4, UR5
    UIADD3.X UR18, UR18, -0x7fffffe0, URZ, UP0, !UPT
    USGXT.U32 UR5, UR5, 0xe
    UMOV UR6, UR11
    UMOV UR7, UR18
.L_x_7:
    UMOV UR50, UR5
    UMOV UR51, 0x80000020
    HGMMA.64x16x8.F32.TF32 R32, R44, gdesc[UR48], R32
    HGMMA.64x16x8.F32.TF32 R32, R40, gdesc[UR4], R32
    @P1 BRA `(.L_x_7)
.L_x_6:
"""


def test_the_wrong_descriptor_of_cuda_12_8_is_found():
    found = stray_addresses(listing(CUDA_12_8))
    assert [x.split(": ")[1] for x in found] == [
        "UR6 comes from an argument",
        "UR7 comes from nothing",
    ]
    right = CUDA_12_8.replace("UP0, UR11, 0x2", "UP0, UR5, 0x2").replace("UR18, UR18", "UR18, URZ")
    assert not stray_addresses(listing(right))


SOUND = {
    "a thread's address": """
        S2R R0, SR_TID.X
        LEA R1, R0, UR4, 0x2
        STS [R1+0x80], R9
        LDSM.16.M88.4 R4, [R1+UR4]
    """,
    "a guarded address, under its guard": """
        @P5 LOP3.LUT R2, R2, 0xf, RZ, 0xc0, !PT
        @!P5 LOP3.LUT R3, R0, 0xf, RZ, 0xc0, !PT
        @!P5 IMAD.SHL.U32 R2, R3, 0x4, RZ
        @P5 BRA `(.L_x_0)
        STS [R2], R9
    .L_x_0:
    """,
    "copies of one predicate": """
        PLOP3.LUT P5, PT, PT, PT, UP0, 0x80, 0x0
        @P5 IMAD.SHL.U32 R2, R0, 0x4, RZ
        PLOP3.LUT P5, PT, PT, PT, UP0, 0x40, 0x0
        @P5 BRA `(.L_x_0)
        LDS R9, [R2]
    .L_x_0:
    """,
    "a loop that ends by a call": """
        PLOP3.LUT P1, PT, PT, PT, UP0, 0x80, 0x0
        @P1 MOV R2, R0
        @P1 CALL.REL.NOINC `(.L_x_0)
        BRA `(.L_x_1)
    .L_x_0:
        STS [R2], R9
    .L_x_1:
    """,
    "the elected thread": """
        ELECT P2, URZ, PT
        @P2 R2UR UR8, R0
        @P2 R2UR UR9, R0
        UTCHMMA gdesc[UR8], gdesc[UR8], tmem[UR6], tmem[UR10], idesc[UR11], UPT
    """,
    "a spilled register": """
        STL [R1+0x8], R0
        MOV R0, c[0x0][0x210]
        LDL.LU R2, [R1+0x8]
        LDGSTS.E.128 [R2+0x800], [R4.64], P0
    """,
}
WRONG = {
    "memory": ("LDG.E R2, [R4.64]\nSTS [R2], R9", "R2 comes from memory"),
    "the other predicate": (
        SOUND["a guarded address, under its guard"].replace("@P5 BRA", "@!P5 BRA"),
        "R2 comes from nothing",
    ),
    "a new value of the predicate": (
        "@P5 MOV R2, R0\nISETP.NE.U32.AND P5, PT, R0, RZ, PT\n@!P5 BRA `(.L_x_0)\n"
        "STS [R2], R9\n.L_x_0:",
        "R2 comes from nothing",
    ),
    "what a loop that ends by a call leaves": (
        SOUND["a loop that ends by a call"].replace("@P1 CALL", "@!P1 CALL"),
        "R2 comes from nothing",
    ),
    "another word of the stack": (
        SOUND["a spilled register"].replace("[R1+0x8], R0", "[R1+0x4], R0"),
        "R2 comes from nothing",
    ),
    "one way round a loop": (
        "MOV R2, R0\n.L_x_0:\nSTS [R2], R9\nIADD3 R2, R2, c[0x0][0x1a8], RZ\n@P0 BRA `(.L_x_0)",
        "R2 comes from an argument",
    ),
}
START = "S2R R0, SR_TID.X\nUMOV UR4, 0x400\n"


@pytest.mark.parametrize("name", SOUND)
def test_right_addresses_pass(name):
    assert not stray_addresses(listing(START + SOUND[name]))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_addresses_are_found(name):
    code, message = WRONG[name]
    found = stray_addresses(listing(START + code))
    assert len(found) == 1
    assert found[0].endswith(message)


@pytest.mark.parametrize(
    ("arch", "dtype", "precision", "instructions"),
    [
        (80, torch.half, "ieee", ("LDSM", "LDS", "STS", "LDGSTS")),
        (90, torch.float32, "tf32x3", ("HGMMA", "LDSM", "LDS", "STS", "LDGSTS")),
        (100, torch.half, "ieee", ("UTCHMMA", "SYNCS")),
    ],
)
def test_every_address_of_a_kernel_is_looked_at(arch, dtype, precision, instructions):
    """Before one of each kind, its address register is loaded with an argument."""
    static = nt_xent_static("gradient", arch, dtype, 128, precision)
    assert not static.strays
    lines = static.sass.splitlines()
    for name in instructions:
        places = [
            n
            for n, line in enumerate(lines)
            if re.search(rf"\*/\s+{name}\b[^;]*\[U?R\d", line) and ".reuse" not in line
        ]
        place = places[len(places) // 2]
        register = re.search(r"\[(U?R)(\d+)", lines[place])
        number = int(register[2]) + (3 if name == "HGMMA" else 0)
        load = f"        /*ffff*/  MOV {register[1]}{number}, c[0x0][0x210] ;"
        assert stray_addresses("\n".join((*lines[:place], load, *lines[place:])))
