"""Runs the instructions that decide the flow of a program, and counts how often every block is issued.

All threads of a program at once, as arrays; threads that part meet again at the lowest address. A register is None
where it depends on data in floating point: what branches on that goes the shorter way, but for loops, which are an
error. The meaning of instructions is that of the PTX they come from; those that no kernel has needed are an error, too.
"""

from __future__ import annotations

import bisect
import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sass.code import Block, Instruction, UnknownInstruction, is_predicate, target_of
from sass.flow import Lengths, Slice, is_constant, is_opaque, loops

PARAMETERS = 0x210  # where the parameters lie in the constant bank of sm_90
WARP = 32
MOST_BLOCKS = 5_000_000  # of one program; more is a loop that does not end
U = np.uint64
LOW = U(0xFFFFFFFF)
TOP = U(1 << 31)
THIRTY_TWO = U(32)

Values = np.ndarray | None  # a value per thread, or what depends on data


class UnknownFlow(RuntimeError):
    """A loop whose end depends on data."""


@dataclass(frozen=True)
class Region:
    """A tensor's memory."""

    begin: int
    bytes: int
    integer: bool


class Memory:
    """What programs may read: tensors, of which those of integers have values."""

    def __init__(self, regions: Sequence[Region]):
        self.regions = sorted(set(regions), key=lambda r: (r.begin, r.bytes))
        self.begins = [r.begin for r in self.regions]

    def region_of(self, address: int) -> Region:
        for i in range(bisect.bisect_right(self.begins, address) - 1, -1, -1):
            if address < self.regions[i].begin + self.regions[i].bytes:
                return self.regions[i]
        raise UnknownFlow(f"a decision reads {address:#x}, which is in no tensor")

    def read(self, addresses: np.ndarray, active: np.ndarray, size: int) -> np.ndarray | None:
        """Integers of ``size`` bytes; None where they are floating point."""
        result = np.zeros(len(addresses), dtype=U)
        for address in np.unique(addresses[active]):
            if not self.region_of(int(address)).integer:
                return None
            value = int.from_bytes(ctypes.string_at(int(address), size), "little")
            result[addresses == address] = value
        return result


class Program:
    """A kernel's code, ready to be run for any program of any launch."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        slice_, self.back = Slice(blocks), loops(blocks)
        self.lengths = Lengths(blocks)
        for start in {start for start, _ in self.back}:
            if slice_.ends_by_data(blocks[start].last):
                raise UnknownFlow(f"a loop that ends by data: {blocks[start].last.text}")
        wanted = slice_.wanted
        self.steps = [[_step(i) for i in b.instructions if i.address in wanted and i.name not in FLOW] for b in blocks]
        self.at = {b.instructions[0].address: b.index for b in blocks}
        self.jump = [self._jump(b) for b in blocks]

    def _jump(self, block: Block) -> Callable:
        """The next block of every thread; -1 is the end."""
        last, following = block.last, block.index + 1
        if last.name == "RET":
            register = _getter(last.operands[0].split()[0])

            def back(state):
                return np.array([self.at[int(a)] for a in register(state)])

            return back
        if last.name not in ("BRA", "CALL", "EXIT"):
            return lambda state: following
        there = -1 if last.name == "EXIT" else self.at[target_of(last)]
        if last.guard is None and not (last.name == "BRA" and len(last.operands) > 1):
            return lambda state: there
        conditions = [_predicate(("!" if last.negated else "") + last.guard)] if last.guard else []
        if last.name == "BRA" and len(last.operands) > 1:
            conditions.append(_predicate(last.operands[0]))
        likely, repeats = self.lengths.shorter(block.index), any((block.index, s) in self.back for s in block.after)

        def either(state):
            met = None
            for condition in conditions:
                value = condition(state)
                if value is None:
                    if repeats:
                        raise UnknownFlow(f"a loop that ends by data: {last.text}")
                    state.guessed.add(block.index)
                    return likely
                met = value if met is None else met & value
            return np.where(met, there, following)

        return either

    def issued(
        self, warps: int, place: tuple[int, int, int], parameters: bytes, memory: Memory
    ) -> tuple[np.ndarray, set[int]]:
        """How often the warps of the program at ``place`` issue each block, and the blocks that branch on data."""
        state = State(warps * WARP, place, parameters, memory)
        issued = np.zeros(len(self.blocks), dtype=np.int64)
        at = np.zeros(state.threads, dtype=np.int64)
        block, together, rounds = 0, True, 0
        while True:
            rounds += 1
            if rounds > MOST_BLOCKS:
                raise UnknownFlow("a program that does not end")
            if together:
                state.active = None
                issued[block] += warps
            else:
                running = at[at >= 0]
                if not running.size:
                    return issued, state.guessed
                block = int(running.min())
                state.active = at == block
                issued[block] += int(state.active.reshape(warps, WARP).any(1).sum())
            for step in self.steps[block]:
                step(state)
            following = self.jump[block](state)
            if not isinstance(following, int) and together and (following == following[0]).all():
                following = int(following[0])
            if together and isinstance(following, int):
                if following < 0:
                    return issued, state.guessed
                block = following
                continue
            if together:
                at[:] = following
            else:
                at = np.where(state.active, following, at)
            together = bool((at == at[0]).all())
            if together:
                block = int(at[0])
                if block < 0:
                    return issued, state.guessed


class State:
    """Registers, shared memory and constants of one program."""

    def __init__(self, threads: int, place: tuple[int, int, int], parameters: bytes, memory: Memory):
        self.threads, self.place, self.memory = threads, place, memory
        self.values: dict[str, Values] = {}
        self.zeros = np.zeros(threads, dtype=U)
        self.true = np.ones(threads, dtype=bool)
        self.active: np.ndarray | None = None  # None: all
        self.constants = bytes(PARAMETERS) + parameters
        self.shared = np.zeros(0, dtype=np.uint8)
        self.known = np.zeros(0, dtype=bool)  # of shared memory
        self.guessed: set[int] = set()

    def register(self, name: str) -> Values:
        return self.values.get(name, self.zeros)

    def predicate(self, name: str) -> Values:
        value = self.values.get(name, self)
        return ~self.true if value is self else value

    def full(self, value: int) -> np.ndarray:
        return np.full(self.threads, value, dtype=U)

    def constant(self, offset: int) -> np.ndarray:
        return self.full(int.from_bytes(self.constants[offset : offset + 4].ljust(4, b"\0"), "little"))

    def grow(self, end: int) -> None:
        if end > len(self.shared):
            more = max(end, 2 * len(self.shared)) - len(self.shared)
            self.shared = np.concatenate([self.shared, np.zeros(more, dtype=np.uint8)])
            self.known = np.concatenate([self.known, np.zeros(more, dtype=bool)])


FLOW = ("BRA", "EXIT", "RET", "CALL")


def _step(instruction: Instruction) -> Callable[[State], None]:
    """A function that does what the instruction does, for the threads that it runs for."""
    compute = _opaque if is_opaque(instruction) else MEANINGS.get(instruction.name)
    if compute is None:
        raise UnknownInstruction(instruction.text)
    compute = compute(instruction)
    guard = None
    if instruction.guard is not None:
        guard = _predicate(("!" if instruction.negated else "") + instruction.guard)
    names = instruction.writes
    if instruction.name in ("STS", "STSM", "LDGSTS"):
        names = ()

    def step(state: State) -> None:
        mask = state.active
        if guard is not None:
            met = guard(state)
            if met is None:
                for name in names:
                    state.values[name] = None
                return
            mask = met if mask is None else mask & met
            if not mask.any():
                return
        results = compute(state, mask)
        for name in names:
            value = results.get(name)
            if value is None or mask is None:
                state.values[name] = value
                continue
            old = state.predicate(name) if "P" in name else state.register(name)
            state.values[name] = None if old is None else np.where(mask, value, old)

    return step


def _opaque(instruction: Instruction) -> Callable:
    return lambda state, mask: {}


# Operands


def _predicate(text: str) -> Callable[[State], Values]:
    name, negated = text.lstrip("!"), text.startswith("!")
    if name in ("PT", "UPT"):
        return (lambda state: ~state.true) if negated else (lambda state: state.true)

    def value(state: State) -> Values:
        found = state.predicate(name)
        return found if found is None or not negated else ~found

    return value


def _getter(text: str, exact: bool = False) -> Callable[[State], Values]:
    """A 32-bit operand. ``exact``: a negated one as 2^32 less the value, for sums that carry."""
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        number = int(text, 16) & 0xFFFFFFFF
        return lambda state: state.full(number)
    if match := re.fullmatch(r"(-?)c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        offset = int(match[2], 16)
        inner = lambda state: state.constant(offset)  # noqa: E731
    elif match := re.fullmatch(r"([-~]?)(U?R(?:\d+|Z)|SRZ)(?:\.64)?", text):
        name = match[2]
        inner = _register(name)
    else:
        raise UnknownInstruction(f"operand {text}")
    if match[1] == "~":
        return _of(lambda x: x ^ LOW, inner)
    if match[1] == "-":
        return _of((lambda x: U(1 << 32) - x) if exact else (lambda x: (U(1 << 32) - x) & LOW), inner)
    return inner


def _register(name: str) -> Callable[[State], Values]:
    if name in ("RZ", "URZ", "SRZ"):
        return lambda state: state.zeros
    return lambda state: state.register(name)


def _pair(text: str) -> Callable[[State], Values]:
    """A 64-bit operand in two registers."""
    if text in ("RZ", "URZ"):
        return lambda state: state.zeros
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        offset = int(match[1], 16)
        return lambda state: state.constant(offset) | state.constant(offset + 4) << THIRTY_TWO
    match = re.fullmatch(r"(U?R)(\d+)(?:\.64)?", text)
    if not match:
        raise UnknownInstruction(f"operand {text}")
    low, high = match[1] + match[2], f"{match[1]}{int(match[2]) + 1}"
    return _of(lambda a, b: a | b << THIRTY_TWO, lambda s: s.register(low), lambda s: s.register(high))


def _of(function: Callable, *getters: Callable[[State], Values]) -> Callable[[State], Values]:
    """``function`` of operands; None if one of them is."""

    def value(state: State) -> Values:
        values = [get(state) for get in getters]
        return None if any(v is None for v in values) else function(*values)

    return value


def _signed(x: np.ndarray) -> np.ndarray:
    return ((x ^ TOP) - TOP).view(np.int64)


def _sources(i: Instruction) -> list[str]:
    """Operands that are read, predicates behind them left out."""
    return [o for o in i.operands[i.targets :] if not _is_condition(o)]


def _conditions(i: Instruction) -> list[str]:
    return [o for o in i.operands[i.targets :] if _is_condition(o)]


def _is_condition(operand: str) -> bool:
    return is_predicate(operand.lstrip("!"))


def _one(i: Instruction, value: Callable[[State], Values]) -> Callable:
    """An instruction that writes one register."""
    names = i.writes
    return lambda state, mask: dict.fromkeys(names, value(state))


def _wide(i: Instruction, value: Callable[[State], Values]) -> Callable:
    """One that writes two; a third name is the carry, which the value has in its place."""
    names = [n for n in i.writes if "P" not in n]

    def compute(state, mask):
        found = value(state)
        return {} if found is None else dict(zip(names, (found & LOW, found >> THIRTY_TWO), strict=False))

    return compute


# Instructions


def _move(i: Instruction) -> Callable:
    return _one(i, _getter(i.operands[1]))


def _load_constant(i: Instruction) -> Callable:
    match = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", i.operands[1])
    if not match or set(i.modifiers) - {"64", "128"}:
        raise UnknownInstruction(i.text)
    offset, names = int(match[1], 16), i.writes
    return lambda state, mask: {name: state.constant(offset + 4 * n) for n, name in enumerate(names)}


def _zeros(i: Instruction) -> Callable:
    if i.operands[1] != "SRZ":
        raise UnknownInstruction(i.text)
    return _one(i, lambda state: state.zeros)


def _special(i: Instruction) -> Callable:
    name = i.operands[1]
    if name == "SR_TID.X":
        return _one(i, lambda state: np.arange(state.threads, dtype=U))
    if name == "SR_LANEID":
        return _one(i, lambda state: np.arange(state.threads, dtype=U) % U(WARP))
    if name.startswith("SR_CTAID."):
        axis = "XYZ".index(name[-1])
        return _one(i, lambda state: state.full(state.place[axis]))
    if name in ("SR_CgaCtaId", "SR_TID.Y", "SR_TID.Z"):
        return _one(i, lambda state: state.zeros)
    raise UnknownInstruction(i.text)


def _add(i: Instruction) -> Callable:
    """IADD3: a + b + c, carries out and, with X, in."""
    if "64" in i.modifiers:
        return _wide(i, _of(lambda *x: sum(x[1:], x[0]), *(_pair_or_number(o) for o in _sources(i))))
    carried = [_predicate(p) for p in _conditions(i)] if "X" in i.modifiers else []
    total = _of(
        lambda *x: sum((v.astype(U) for v in x[1:]), x[0].astype(U)),
        *(_getter(o, exact=True) for o in _sources(i)),
        *carried,
    )
    return _with_carries(i, total)


def _pair_or_number(text: str) -> Callable:
    return _getter(text) if text.startswith("0x") else _pair(text)


def _with_carries(i: Instruction, total: Callable[[State], Values]) -> Callable:
    register = i.operands[i.targets_first]
    carries = [o for o in i.operands[: i.targets] if is_predicate(o)]

    def compute(state, mask):
        value = total(state)
        if value is None:
            return {}
        results = {register: value & LOW}
        for n, name in enumerate(carries):
            results[name] = (value >> THIRTY_TWO) > U(n)
        return results

    return compute


def _multiply(i: Instruction) -> Callable:
    a, b, c = _sources(i)
    unsigned = "U32" in i.modifiers
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        if i.targets > 1:
            raise UnknownInstruction(i.text)

        def product(x, y, z):
            return (x * y if unsigned else (_signed(x) * _signed(y)).view(U)) + z

        value = _of(product, _getter(a), _getter(b), _pair(c))
        return _wide(i, value) if "WIDE" in i.modifiers else _one(i, _of(lambda x: x >> THIRTY_TWO, value))
    carried = [_predicate(p) for p in _conditions(i)]
    if carried and "X" not in i.modifiers:
        raise UnknownInstruction(i.text)
    return _one(
        i,
        _of(
            lambda x, y, z, *more: (x * y + z + sum(m.astype(U) for m in more)) & LOW if more else (x * y + z) & LOW,
            *(_getter(o) for o in (a, b, c)),
            *carried,
        ),
    )


def _compare(i: Instruction) -> Callable:
    """ISETP: the comparison, joined with a predicate; with EX that of high words after that of low ones."""
    relation, *rest = i.modifiers
    unsigned, extended = "U32" in rest, "EX" in rest
    join = next(m for m in rest if m in ("AND", "OR", "XOR"))
    a, b = (_getter(o) for o in _sources(i))
    joined, *low = (_predicate(p) for p in _conditions(i))
    first, second = i.operands[:2]
    if extended != bool(low):
        raise UnknownInstruction(i.text)

    def compare(x, y, more, *carry):
        left, right = (x, y) if unsigned else (_signed(x), _signed(y))
        met = RELATIONS[relation](left, right)
        if carry:
            equal = left == right
            if relation in ("EQ", "NE"):
                met = (equal & carry[0]) if relation == "EQ" else (~equal | carry[0])
            else:
                met = RELATIONS[relation[0] + "T"](left, right) | (equal & carry[0])
        return [JOINS[join](value, more) for value in (met, ~met)]

    value = _of(compare, a, b, joined, *low)

    def compute(state, mask):
        found = value(state)
        return {} if found is None else {first: found[0], second: found[1]}

    return compute


RELATIONS = {
    "EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal,
}  # fmt: skip
JOINS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


def _shifted_add(i: Instruction) -> Callable:
    """LEA: (a << s) + b, or with HI the high word of that of a pair."""
    sources, carried = _sources(i), [_predicate(p) for p in _conditions(i)]
    shift = U(int(sources[-1], 16))
    if "HI" not in i.modifiers:
        a, b = sources[:2]
        total = _of(lambda x, y: ((x << shift) & LOW) + y, _getter(a), _getter(b, exact=True))
        return _with_carries(i, total)
    if "SX32" in i.modifiers:
        high = _of(lambda x: ((_signed(x) << np.int64(shift)) >> np.int64(32)).view(U) & LOW, _getter(sources[0]))
    else:
        high = _of(
            lambda x, z: ((x | z << THIRTY_TWO) << shift) >> THIRTY_TWO, _getter(sources[0]), _getter(sources[2])
        )
    total = _of(
        lambda x, y, *more: sum((m.astype(U) for m in more), x + y), high, _getter(sources[1], exact=True), *carried
    )
    return _with_carries(i, total)


def _logic(i: Instruction) -> Callable:
    a, b, c, table = _sources(i)
    table = int(table, 16)
    (more,) = (_predicate(p) for p in _conditions(i))

    def combine(x, y, z):
        result = np.zeros_like(x)
        for n in range(8):
            if table >> n & 1:
                term = (x if n & 4 else x ^ LOW) & (y if n & 2 else y ^ LOW)
                result |= term & (z if n & 1 else z ^ LOW)
        return result

    value = _of(combine, _getter(a), _getter(b), _getter(c))
    register = i.operands[i.targets_first]

    def compute(state, mask):
        found = value(state)
        if found is None:
            return {}
        results = {register: found}
        if i.targets_first:
            also = more(state)
            results[i.operands[0]] = None if also is None else (found != 0) | also
        return results

    return compute


def _predicate_logic(i: Instruction) -> Callable:
    a, b, c = (_predicate(p) for p in _conditions(i))
    tables = [int(t, 16) for t in _sources(i)]

    def combine(table):
        def of(x, y, z):
            result = np.zeros_like(x)
            for n in range(8):
                if table >> n & 1:
                    result |= (x if n & 4 else ~x) & (y if n & 2 else ~y) & (z if n & 1 else ~z)
            return result

        return _of(of, a, b, c)

    values = [combine(t) for t in tables]
    return lambda state, mask: {name: value(state) for name, value in zip(i.operands[:2], values, strict=True)}


def _shift(i: Instruction) -> Callable:
    low, by, high = _sources(i)
    direction, kind, *rest = i.modifiers
    upper = "HI" in rest
    if set(rest) - {"HI"} or (direction, kind, upper) == ("L", "U32", True):
        raise UnknownInstruction(i.text)

    def shift(x, s, z):
        s = np.minimum(s, U(63))
        if direction == "L":
            pair = (x | z << THIRTY_TWO) << s
        elif kind in ("S32", "S64"):
            pair = ((x | z << THIRTY_TWO).view(np.int64) >> s.view(np.int64)).view(U)
        else:
            pair = (x | z << THIRTY_TWO) >> s
        return pair >> THIRTY_TWO if upper else pair & LOW

    return _one(i, _of(shift, _getter(low), _getter(by), _getter(high)))


def _extend(i: Instruction) -> Callable:
    a, bits = _sources(i)
    bits = int(bits, 16)
    keep, sign = U((1 << bits) - 1), U(1 << (bits - 1))
    if "U32" in i.modifiers:
        return _one(i, _of(lambda x: x & keep, _getter(a)))
    return _one(i, _of(lambda x: (((x & keep) ^ sign) - sign) & LOW, _getter(a)))


def _select(i: Instruction) -> Callable:
    a, b = (_getter(o) for o in _sources(i))
    return _one(i, _of(lambda p, x, y: np.where(p, x, y), _predicate(_conditions(i)[0]), a, b))


def _permute(i: Instruction) -> Callable:
    if i.modifiers:
        raise UnknownInstruction(i.text)
    a, selector, b = _sources(i)

    def permute(x, s, y):
        pair, result = x | y << THIRTY_TWO, np.zeros_like(x)
        for n in range(4):
            nibble = (s >> U(4 * n)) & U(15)
            byte = (pair >> (U(8) * (nibble & U(7)))) & U(255)
            byte = np.where(nibble & U(8), np.where(byte & U(128), U(255), U(0)), byte)
            result |= byte << U(8 * n)
        return result

    return _one(i, _of(permute, _getter(a), _getter(selector), _getter(b)))


def _absolute(i: Instruction) -> Callable:
    return _one(i, _of(lambda x: np.abs(_signed(x)).view(U) & LOW, _getter(i.operands[1])))


def _population(i: Instruction) -> Callable:
    return _one(i, _of(lambda x: np.bitwise_count(x & LOW).astype(U), _getter(i.operands[1])))


def _extreme(i: Instruction) -> Callable:
    """VIMNMX, and VIADDMNMX of a sum."""
    if set(i.modifiers) - {"U32", "U16x2"} or len(i.modifiers) > 1:
        raise UnknownInstruction(i.text)
    *summed, last = (_getter(o) for o in _sources(i))

    def extreme(least, y, *x):
        a, y = sum(x[1:], x[0]) & LOW, y
        if "U16x2" in i.modifiers:  # of both halves
            low, high = ((a & part, y & part) for part in (U(0xFFFF), U(0xFFFF0000)))
            return np.where(least, np.minimum(*low) | np.minimum(*high), np.maximum(*low) | np.maximum(*high))
        if "U32" in i.modifiers:
            return np.where(least, np.minimum(a, y), np.maximum(a, y))
        a, y = _signed(a), _signed(y)
        return np.where(least, np.minimum(a, y), np.maximum(a, y)).view(U) & LOW

    return _one(i, _of(extreme, _predicate(_conditions(i)[0]), last, *summed))


def _extreme_of_three(i: Instruction) -> Callable:
    if set(i.modifiers) - {"U32"}:
        raise UnknownInstruction(i.text)

    def extreme(least, *x):
        if "U32" not in i.modifiers:
            x = [_signed(v) for v in x]
        return np.where(least, np.minimum.reduce(x), np.maximum.reduce(x)).view(U) & LOW

    return _one(i, _of(extreme, _predicate(_conditions(i)[0]), *(_getter(o) for o in _sources(i))))


def _plus(i: Instruction) -> Callable:
    a, b = (_getter(o) for o in _sources(i))
    return _one(i, _of(lambda x, y: (x + y) & LOW, a, b))


def _to_float(i: Instruction) -> Callable:
    """I2F, rounded up where an integer division asks for it."""
    if not set(i.modifiers) <= {"RP", "U32"}:
        raise UnknownInstruction(i.text)

    def convert(x):
        exact = (x.view(np.int64) if "U32" in i.modifiers else _signed(x)).astype(np.float64)
        rounded = exact.astype(np.float32)
        if "RP" in i.modifiers:
            rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
        return _bits(rounded)

    return _one(i, _of(convert, _getter(i.operands[1])))


def _reciprocal(i: Instruction) -> Callable:
    """As a float32 division rounds it: an integer division takes it for a first guess."""
    with np.errstate(divide="ignore"):
        return _one(i, _of(lambda x: _bits(np.float32(1) / _floats(x)), _getter(i.operands[1])))


def _to_integer(i: Instruction) -> Callable:
    if not {"U32", "TRUNC"} <= set(i.modifiers) <= {"FTZ", "U32", "TRUNC", "NTZ"}:
        raise UnknownInstruction(i.text)
    return _one(
        i,
        _of(lambda x: np.clip(np.trunc(_floats(x).astype(np.float64)), 0, 2**32 - 1).astype(U), _getter(i.operands[1])),
    )


def _floats(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.float32)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32).astype(U)


def _halves(i: Instruction) -> Callable:
    if not is_constant(i):
        raise UnknownInstruction(i.text)
    high, low = (int(np.float16(float(o)).view(np.uint16)) for o in i.operands[3:5])
    return _one(i, lambda state: state.full(high << 16 | low))


def _uniform(i: Instruction) -> Callable:
    """R2UR: the first running thread's value, for all of a warp."""
    get = _getter(i.operands[1])

    def compute(state, mask):
        value = get(state)
        if value is None:
            return {}
        rows = value.reshape(-1, WARP)
        first = 0 if mask is None else mask.reshape(-1, WARP).argmax(1)
        return {i.operands[0]: np.repeat(rows[np.arange(len(rows)), first], WARP)}

    return compute


def _shuffle(i: Instruction) -> Callable:
    kind, (a, by, limits) = i.modifiers[0], i.operands[2:]
    if kind not in ("IDX", "BFLY") or limits != "0x1f":
        raise UnknownInstruction(i.text)
    lanes = np.arange(WARP)

    def shuffle(x, s):
        rows, s = x.reshape(-1, WARP), s.reshape(-1, WARP).astype(np.int64) % WARP
        other = s if kind == "IDX" else lanes[None, :] ^ s
        return np.take_along_axis(rows, other, 1).reshape(-1)

    value = _of(shuffle, _getter(a), _getter(by))
    return lambda state, mask: {i.operands[1]: value(state), i.operands[0]: state.true}


def _reduce(i: Instruction) -> Callable:
    operation, get = i.modifiers[0], _getter(i.operands[1])
    signed = "S32" in i.modifiers
    reduce = {"MAX": np.max, "MIN": np.min, "SUM": np.sum}.get(operation)
    if reduce is None:
        raise UnknownInstruction(i.text)

    def compute(state, mask):
        value = get(state)
        if value is None:
            return {}
        numbers = _signed(value) if signed else value.view(np.int64)
        rows = numbers.reshape(-1, WARP)
        if mask is not None:
            idle = {"MAX": -(1 << 40), "MIN": 1 << 40, "SUM": 0}[operation]
            rows = np.where(mask.reshape(-1, WARP), rows, idle)
        return {i.operands[0]: np.repeat(reduce(rows, axis=1), WARP).view(U) & LOW}

    return compute


def _vote(i: Instruction) -> Callable:
    if i.modifiers not in (("ANY",), ("ALL",)) or i.targets != 1:
        raise UnknownInstruction(i.text)
    get, any_of = _predicate(i.operands[-1]), i.modifiers == ("ANY",)

    def compute(state, mask):
        value = get(state)
        if value is None:
            return {}
        running = state.true if mask is None else mask
        rows = ((value & running) if any_of else (value | ~running)).reshape(-1, WARP)
        return {i.operands[0]: np.repeat(rows.any(1) if any_of else rows.all(1), WARP)}

    return compute


def _pack_predicates(i: Instruction) -> Callable:
    _, kept, bits = i.operands[1:]
    if i.modifiers:
        raise UnknownInstruction(i.text)
    bits, get = int(bits, 16), _getter(kept)

    def compute(state, mask):
        value = get(state)
        flags = {n: state.predicate(f"P{n}") for n in range(7) if bits >> n & 1}
        if value is None or any(f is None for f in flags.values()):
            return {}
        value = value & ~U(bits)
        for n, flag in flags.items():
            value = value | flag.astype(U) << U(n)
        return {i.operands[0]: value}

    return compute


def _unpack_predicates(i: Instruction) -> Callable:
    get = _getter(i.operands[1])

    def compute(state, mask):
        value = get(state)
        return {} if value is None else {name: (value >> U(int(name[1:]))) & U(1) > 0 for name in i.writes}

    return compute


# Memory


def _address(text: str) -> Callable[[State], Values]:
    """``[R4+UR6+0x10]`` in shared memory."""
    terms = text.strip("[]").split("+")
    return _of(lambda *x: sum(x[1:], x[0]) & LOW, *(_getter(t.removesuffix(".X4").removesuffix(".X16")) for t in terms))


def _size(i: Instruction) -> tuple[int, int]:
    """Bytes of a word, and words."""
    for name, size in (("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if name in i.modifiers:
            return size, 1
    return 4, 4 if "128" in i.modifiers else 2 if "64" in i.modifiers else 1


def _load_global(i: Instruction) -> Callable:
    match = re.fullmatch(r"desc\[UR\d+\]\[(U?R\d+)\.64(?:\+(UR\d+))?(?:\+(-?0x[0-9a-f]+))?\]", i.operands[1])
    if not match or "S8" in i.modifiers or "S16" in i.modifiers:
        raise UnknownInstruction(i.text)
    base, more, offset = _pair(match[1]), _getter(match[2] or "RZ"), int(match[3] or "0", 16)
    size, _ = _size(i)
    names = i.writes

    def compute(state, mask):
        at, added = base(state), more(state)
        if at is None or added is None:
            return {}
        results = {}
        for n, name in enumerate(names):
            addresses = at + added + U((offset + 4 * n) % (1 << 64))
            results[name] = state.memory.read(addresses, state.true if mask is None else mask, size)
        return results

    return compute


def _load_shared(i: Instruction) -> Callable:
    at, (size, _), names = _address(i.operands[1]), _size(i), i.writes
    if "S8" in i.modifiers or "S16" in i.modifiers:
        raise UnknownInstruction(i.text)

    def compute(state, mask):
        addresses = at(state)
        if addresses is None:
            return {}
        addresses = (addresses if mask is None else np.where(mask, addresses, U(0))).astype(np.int64)
        state.grow(int(addresses.max()) + 4 * len(names))
        results = {}
        for n, name in enumerate(names):
            value, known = np.zeros(state.threads, dtype=U), state.true
            for byte in range(size):
                value |= state.shared[addresses + 4 * n + byte].astype(U) << U(8 * byte)
                known = known & state.known[addresses + 4 * n + byte]
            running = known if mask is None else known[mask]
            results[name] = value if running.all() else None
        return results

    return compute


def _store_shared(i: Instruction) -> Callable:
    at, (size, words) = _address(i.operands[0]), _size(i)
    match = re.match(r"(U?R)(\d+|Z)", i.operands[1])
    names = ["RZ"] * words if match[2] == "Z" else [f"{match[1]}{int(match[2]) + n}" for n in range(words)]
    values = [_getter(name) for name in names]

    def compute(state, mask):
        addresses = at(state)
        if addresses is None:
            state.known[:] = False
            return {}
        running = state.true if mask is None else mask
        addresses = addresses[running].astype(np.int64)
        state.grow(int(addresses.max()) + 4 * words)
        for n, get in enumerate(values):
            value = get(state)
            for byte in range(size):
                state.known[addresses + 4 * n + byte] = value is not None
                if value is not None:
                    state.shared[addresses + 4 * n + byte] = (value[running] >> U(8 * byte)) & U(255)
        return {}

    return compute


def _spill(i: Instruction) -> Callable:
    match = re.fullmatch(r"R(\d+|Z)", i.operands[1])
    values = [_register(f"R{int(match[1]) + n}" if match[1] != "Z" else "RZ") for n in range(len(i.slots))]
    return lambda state, mask: {slot: value(state) for slot, value in zip(i.slots, values, strict=True)}


def _restore(i: Instruction) -> Callable:
    names = dict(zip(i.writes, i.slots, strict=True))
    return lambda state, mask: {name: state.register(slot) for name, slot in names.items()}


def _forget_shared(i: Instruction) -> Callable:
    """Stores of whole matrices and copies from global memory hold data; what else is there is not known any more."""

    def compute(state, mask):
        state.known[:] = False
        return {}

    return compute


MEANINGS = {
    "BAR": lambda i: lambda state, mask: {},
    "CS2R": _zeros,
    "F2I": _to_integer,
    "HFMA2": _halves,
    "I2F": _to_float,
    "IABS": _absolute,
    "IADD3": _add,
    "IMAD": _multiply,
    "ISETP": _compare,
    "LDC": _load_constant,
    "LDG": _load_global,
    "LDGSTS": _forget_shared,
    "LDL": _restore,
    "LDS": _load_shared,
    "LEA": _shifted_add,
    "LOP3": _logic,
    "MOV": _move,
    "MUFU": _reciprocal,
    "P2R": _pack_predicates,
    "PLOP3": _predicate_logic,
    "POPC": _population,
    "PRMT": _permute,
    "R2P": _unpack_predicates,
    "R2UR": _uniform,
    "REDUX": _reduce,
    "S2R": _special,
    "S2UR": _special,
    "SEL": _select,
    "SGXT": _extend,
    "SHF": _shift,
    "SHFL": _shuffle,
    "STL": _spill,
    "STS": _store_shared,
    "STSM": _forget_shared,
    "UIADD3": _add,
    "UIMAD": _multiply,
    "UISETP": _compare,
    "ULDC": _load_constant,
    "ULEA": _shifted_add,
    "ULOP3": _logic,
    "UMOV": _move,
    "UPLOP3": _predicate_logic,
    "UPRMT": _permute,
    "USEL": _select,
    "USGXT": _extend,
    "USHF": _shift,
    "VIADD": _plus,
    "VIADDMNMX": _extreme,
    "VIMNMX": _extreme,
    "VIMNMX3": _extreme_of_three,
    "VOTE": _vote,
    "VOTEU": _vote,
}
