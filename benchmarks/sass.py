"""What the addresses of shared memory are computed from, in NVIDIA's machine code (SASS).

ptxas can mistake one register for another. That of CUDA 12.8, in Triton 3.6, does so in kernels
with many wgmma descriptors: it computes a descriptor from a register that holds half of a global
pointer, or nothing on some path, and the kernel reads outside its shared memory. PTX, registers
and spills show nothing of it.

An address of shared memory depends on constants, the number of the thread and counters of loops.
Here the origins of every register are followed through all instructions and paths, without any
values: an address that comes from a kernel's argument, from memory or from nowhere is wrong. One
that comes from another address is not noticed.
"""

import re
from typing import NamedTuple

# Where a value came from, other than the special registers, which count by their names.
_UNDEFINED, _ARGUMENT, _MEMORY = "nothing", "an argument", "memory"
_STRAYS = {_UNDEFINED, _ARGUMENT, _MEMORY}
# The predicate of the one thread that acts for its warp: what it does is done.
_ELECTED = "elected"

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*([^;]*);")
_REGISTER = re.compile(r"\b(U?R)(\d+)\b")
_PREDICATE = re.compile(r"U?P[0-9T]")
_TARGET = re.compile(r"\((\.L_\S+)\)")
# Instructions without a result, or with predicates as the only results.
_NO_RESULT = re.compile(
    r"ST|RED|BRA|BAR|EXIT|MEMBAR|FENCE|WARP|LDGSTS|LDGDEP|DEPBAR|CALL|RET|BSSY|BSYNC|NOP|CCTL|"
    r"ERRBAR|SYNCS|UTC|BMOV|NANOSLEEP|\w*SETP|U?PLOP3|FCHK|R2P"
)
_LOADS = re.compile(r"LD[GSLT]|LD\b|ATOM")
_SHARED = re.compile(r"LDS|STS|LDSM|STSM|LDGSTS|ATOMS|SYNCS|UTC\w*MMA|UTCBAR|HGMMA")

Origins = frozenset[str]
_NOTHING: Origins = frozenset((_UNDEFINED,))


class _Instruction(NamedTuple):
    address: str
    guard: str
    opcode: str
    operands: list[str]


class _State:
    """Origins of each register; and of those written under a predicate, in either case."""

    def __init__(self) -> None:
        self.origins: dict[str, Origins] = {}
        # Predicate → the place that computed its value, and whether it is that value's negation.
        self.predicates: dict[str, tuple[str, bool]] = {}
        # Register → such a place, the register's origins if the value is true, and if not.
        self.guarded: dict[str, tuple[str, Origins, Origins]] = {}

    def copy(self) -> "_State":
        other = _State()
        other.origins, other.guarded = dict(self.origins), dict(self.guarded)
        other.predicates = dict(self.predicates)
        return other

    def of(self, register: str, known: tuple[str, bool] | None = None) -> Origins:
        """known: a value of a predicate, and whether it is false where the register is read."""
        if known and register in self.guarded and self.guarded[register][0] == known[0]:
            return self.guarded[register][2 if known[1] else 1]
        return self.origins.get(register, _NOTHING)

    def value(self, guard: str, place: str) -> tuple[str, bool]:
        """The value of a predicate, which an instruction at `place` reads."""
        name = guard.lstrip("!")
        if name not in self.predicates:
            self.set_predicate(name, place, None)
        computed, negated = self.predicates[name]
        return computed, negated != guard.startswith("!")

    def write(self, register: str, origins: Origins, known: tuple[str, bool] | None) -> None:
        """known: the predicate under which it is written, as in `of`."""
        if known in (None, (_ELECTED, False)):
            self.guarded.pop(register, None)
            self.origins[register] = origins
            return
        computed, negated = known
        before = self.of(register, (computed, not negated))
        self.guarded[register] = computed, *((before, origins) if negated else (origins, before))
        self.origins[register] = origins | before

    def set_predicate(self, name: str, place: str, value: tuple[str, bool] | None) -> None:
        """A predicate gets a value that another one has too, or with None a new one."""
        if value is None:
            value = f"{place} {name}", False
            self._forget(value[0])
        self.predicates[name] = value

    def _forget(self, computed: str) -> None:
        self.guarded = {r: case for r, case in self.guarded.items() if case[0] != computed}
        self.predicates = {p: v for p, v in self.predicates.items() if v[0] != computed}

    def given(self, guard: str, place: str) -> "_State":
        """The state where a predicate is known."""
        other = self.copy()
        computed, negated = other.value(guard, place)
        for register, (needed, true, false) in self.guarded.items():
            if needed == computed:
                other.origins[register] = false if negated else true
                del other.guarded[register]
        return other

    def join(self, other: "_State") -> bool:
        """Take another path's origins too. Whether that adds any."""
        added = False
        for register in self.origins.keys() | other.origins.keys():
            before, more = self.of(register), other.of(register)
            if not more <= before or register not in self.origins:
                self.origins[register] = before | more
                added = True
        for mine, others in ((self.guarded, other.guarded), (self.predicates, other.predicates)):
            for name in [n for n, value in mine.items() if others.get(n) != value]:
                del mine[name]
                added = True
        return added


def stray_addresses(sass: str) -> list[str]:
    """The instructions whose shared-memory address comes from an argument, from memory or from a
    register that nothing wrote, and the register. sass: of one kernel, from `nvdisasm -c`."""
    code, labels = _parse(sass)
    found: dict[int, _State] = {0: _State()}
    waiting, targets = [0], set(labels.values())
    strays = {}
    while waiting:
        place = waiting.pop()
        state = found[place].copy()
        while True:
            instruction = code[place]
            for register in _address_registers(instruction):
                wrong = state.of(register) & _forbidden(instruction.opcode)
                if wrong:
                    strays[instruction.address, register] = (
                        f"{instruction.address} {instruction.opcode}: {register} comes from "
                        + " or ".join(sorted(wrong))
                    )
            _step(instruction, state)
            ways = _ways(instruction, place, labels, state)
            # Straight on, until another path may come in.
            if len(ways) == 1 and ways[0][0] == place + 1 and place + 1 not in targets:
                place += 1
                continue
            break
        for target, there in ways:
            if target >= len(code):
                continue
            if target not in found:
                found[target] = there.copy()
                waiting.append(target)
            elif found[target].join(there):
                waiting.append(target)
    return [strays[key] for key in sorted(strays)]


def _parse(sass: str) -> tuple[list[_Instruction], dict[str, int]]:
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            labels[label[1]] = len(code)
        elif m := _LINE.search(line):
            guard = "" if m[2] in (None, "PT", "UPT") else m[2]
            text = re.sub(r"\s+[&?].*", "", m[4])
            operands = [x.strip() for x in re.split(r",(?![^\[]*\])", text) if x.strip()]
            code.append(_Instruction(m[1], guard, m[3], operands))
    return code, labels


def _forbidden(opcode: str) -> set[str]:
    # Addresses of tensor memory are handed out at run time and read from shared memory.
    return _STRAYS - {_MEMORY} if opcode.startswith("UTC") else _STRAYS


def _address_registers(instruction: _Instruction) -> list[str]:
    """The registers of an instruction's shared-memory address or descriptors."""
    opcode, operands = instruction.opcode, instruction.operands
    if not _SHARED.match(opcode):
        return []
    text = ", ".join(operands)
    descriptors = [int(n) for n in re.findall(r"gdesc\[UR(\d+)\]", text)]
    if opcode.startswith("HGMMA"):
        # Four registers: descriptors of A and B. A may be in registers R instead.
        first = 2 if _REGISTER.match(operands[1]) else 0
        return [f"UR{n + k}" for n in descriptors for k in range(first, 4)]
    if descriptors:
        return [f"UR{n + k}" for n in descriptors for k in range(2)]
    address = re.search(r"\[([^\]]*)\]", text)
    return [m[0] for m in _REGISTER.finditer(address[1])] if address else []


def _step(instruction: _Instruction, state: _State) -> None:
    address, guard, opcode, operands = instruction
    predicates = 0
    while predicates < len(operands) and _PREDICATE.fullmatch(operands[predicates]):
        predicates += 1
    # A carry follows the result.
    carries = 1
    while carries < len(operands) and _PREDICATE.fullmatch(operands[carries]):
        carries += 1
    known = state.value(guard, address) if guard else None
    if opcode.startswith("STL"):
        stored = _names(operands[1], _width(opcode))
        for slot, register in zip(_slots(operands[0], len(stored)), stored, strict=True):
            state.write(slot, state.of(register, known), known)
    # Of PLOP3's predicates the first two are results.
    changed = operands[: min(predicates, 2)] or operands[1:carries]
    written = _written(opcode, operands[predicates:], state, known)
    if not opcode.startswith("BRA"):
        for name in changed:
            state.set_predicate(name, address, None if guard else _known(instruction, state))
    for register, origins in written.items():
        state.write(register, origins, known)


def _written(
    opcode: str, operands: list[str], state: _State, known: tuple[str, bool] | None
) -> dict[str, Origins]:
    """The registers that an instruction writes, and their origins."""
    result = None if _NO_RESULT.match(opcode) or not operands else operands[0]
    if result is None or not _REGISTER.fullmatch(result):
        return {}
    registers, sources = _names(result, _width(opcode)), operands[1:]
    if opcode.startswith("LDL"):
        # A spilled register comes back.
        slots = _slots(sources[0], len(registers))
        return {r: state.of(slot, known) for r, slot in zip(registers, slots, strict=True)}
    return dict.fromkeys(registers, _origins(opcode, sources, state, known))


def _names(first: str, count: int) -> list[str]:
    """Registers that follow each other, from one of them."""
    m = _REGISTER.match(first)
    return [f"{m[1]}{int(m[2]) + k}" for k in range(count)] if m else [first] * count


def _slots(address: str, count: int) -> list[str]:
    """Words of a thread's stack, from an operand like [R1+0x10]."""
    m = re.fullmatch(r"\[(\w+)(?:\+(-?0x[0-9a-f]+))?\]", address)
    if m is None:
        return [address] * count
    return [f"{m[1]} {int(m[2] or '0', 16) + 4 * k}" for k in range(count)]


def _known(instruction: _Instruction, state: _State) -> tuple[str, bool] | None:
    """The value of the predicate that an instruction writes, if that value has a name."""
    address, _, opcode, operands = instruction
    if opcode == "ELECT":
        return _ELECTED, False
    if not opcode.startswith("PLOP3") or operands[1:4] != ["PT"] * 3:
        return None
    # The truth table of a copy, and of a negation.
    sign = {"0x80": "", "0x40": "!"}.get(operands[5])
    return None if sign is None else state.value(sign + operands[4], address)


def _origins(
    opcode: str, sources: list[str], state: _State, known: tuple[str, bool] | None
) -> Origins:
    if _LOADS.match(opcode):
        return frozenset((_MEMORY,))
    if opcode.startswith(("S2R", "S2UR", "CS2R")):
        return frozenset((sources[-1],))
    origins: set[str] = set()
    for place, source in enumerate(sources):
        if "c[" in source:
            origins.add(_ARGUMENT)
        pair = ".64" in opcode or (".WIDE" in opcode and place == 2)
        for m in _REGISTER.finditer(source):
            for k in range(2 if pair else 1):
                origins |= state.of(f"{m[1]}{int(m[2]) + k}", known)
    return frozenset(origins)


def _width(opcode: str) -> int:
    """Registers that an instruction writes. Those of matrix products are no addresses."""
    if opcode.startswith("LDSM"):
        return int(opcode[-1]) if opcode[-2] == "." else 1
    if ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode or opcode == "CS2R" else 1


def _ways(
    instruction: _Instruction, place: int, labels: dict[str, int], state: _State
) -> list[tuple[int, _State]]:
    """Where the program goes on. A called division goes on behind the call."""
    address, guard, opcode, operands = instruction
    if opcode.startswith(("EXIT", "RET")):
        return [(place + 1, state.given(_negated(guard), address))] if guard else []
    text = ", ".join(operands)
    # ptxas also leaves a loop by a call, to a place that does not return.
    local = _TARGET.search(text) if opcode.startswith(("BRA", "CALL")) else None
    if local is None:
        return [(place + 1, state)]
    target = labels[local[1]]
    also = re.match(r"!?U?P\d", text)
    if not guard and also:
        guard = also[0]
    if guard and not (also and instruction.guard) and ".DIV" not in opcode:
        return [
            (target, state.given(guard, address)),
            (place + 1, state.given(_negated(guard), address)),
        ]
    return [(target, state), *([(place + 1, state)] if also or ".DIV" in opcode else [])]


def _negated(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"
