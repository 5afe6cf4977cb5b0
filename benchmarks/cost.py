"""What the launches of a call cost on a GPU, as far as their code tells: instructions, bytes and products."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from launches import Launch, extent
from sass.code import Instruction, UnknownInstruction, blocks_of, disassembled, instructions, resources
from sass.run import WARP, Memory, Program
from torch import Tensor

SAMPLES, MORE_SAMPLES, SPREAD = 4, 32, 0.01  # programs that are run of a launch; more if the first differ by so much
GROUPS = 12  # launches of a kernel that differ; of more, only the samples are run
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass
class Cost:
    """Of all launches of one kernel in a call."""

    kernel: str
    launches: int = 0
    programs: int = 0
    instructions: float = 0.0  # issued by warps
    read: int = 0  # bytes, every tensor once
    written: int = 0
    flops: dict[str, float] = field(default_factory=dict)  # by what they run on
    registers: int = 0  # a thread; the largest of its compilations, and of its shared memory
    shared: int = 0
    stack: int = 0  # bytes of a thread: registers that were spilled
    decided_by_data: bool = False  # whether a branch was taken to go the shorter way


def costs(launches: Sequence[Launch], programs: dict[str, Program]) -> list[Cost]:
    """One for every kernel, in the order of their first launches. ``programs`` keeps what was disassembled."""
    found = []
    for name in dict.fromkeys(launch.kernel.name for launch in launches):
        own = [launch for launch in launches if launch.kernel.name == name]
        cost = Cost(name, len(own), sum(launch.programs for launch in own))
        _count_instructions(cost, own, programs)
        _count_bytes(cost, own)
        _describe(cost, own)
        found.append(cost)
    return found


def _describe(cost: Cost, launches: list[Launch]) -> None:
    for kernel in {launch.kernel.hash: launch.kernel for launch in launches}.values():
        used = resources(kernel.asm["cubin"])
        cost.registers, cost.stack = max(cost.registers, used["reg"]), max(cost.stack, used["stack"] + used["local"])
        cost.shared = max(cost.shared, kernel.metadata.shared)


def program_of(launch: Launch, programs: dict[str, Program]) -> Program:
    kernel = launch.kernel
    if kernel.hash not in programs:
        programs[kernel.hash] = Program(blocks_of(instructions(disassembled(kernel.asm["cubin"]))))
    return programs[kernel.hash]


def _count_instructions(cost: Cost, launches: list[Launch], programs: dict[str, Program]) -> None:
    """A sample of the programs stands for all, spread evenly by the golden ratio, which meets no period of tiles."""
    for group, count in _alike(launches):
        total = sum(launch.programs for launch in group)
        ends = np.cumsum([launch.programs for launch in group])
        order = dict.fromkeys(int(math.modf((i + 0.5) * GOLDEN)[0] * total) for i in range(min(MORE_SAMPLES, total)))
        sample: list[tuple[int, dict[str, float]]] = []
        for place in order:
            if len(sample) == SAMPLES:
                least, most = (bound(issued for issued, _ in sample) for bound in (min, max))
                if most - least <= SPREAD * most:
                    break
            which = int(np.searchsorted(ends, place, side="right"))
            launch = group[which]
            issued, flops, guessed = _run(launch, place - int(ends[which]) + launch.programs, programs)
            cost.decided_by_data |= guessed
            sample.append((issued, flops))
        weight = count * total / len(sample)
        for issued, flops in sample:
            cost.instructions += weight * issued
            for unit, number in flops.items():
                cost.flops[unit] = cost.flops.get(unit, 0.0) + weight * number


def _run(launch: Launch, place: int, programs: dict[str, Program]) -> tuple[int, dict[str, float], bool]:
    """Instructions and floating-point operations of one program, and whether data decided a branch."""
    program = program_of(launch, programs)
    issued, guessed = program.issued(
        launch.kernel.metadata.num_warps, launch.place(place), launch.packed(), Memory(launch.regions())
    )
    total, flops = 0, {}
    for block, times in zip(program.blocks, issued.tolist(), strict=True):
        total += times * block.issued
        for unit, number in _flops(block.instructions).items():
            flops[unit] = flops.get(unit, 0.0) + times * number
    return total, flops, bool(guessed)


def _alike(launches: list[Launch]) -> list[tuple[list[Launch], int]]:
    """Launches to be sampled together, and how many stand behind each: those of the same code, grid and integers are
    one; if too many differ, those of the same code are one population.
    """
    found: dict[tuple, list[Launch]] = {}
    for launch in launches:
        numbers = tuple(value for kind, value in launch.arguments if kind[0] != "*")
        # Lists of integers decide how long a loop is.
        lists = tuple(t.data_ptr() for t in launch.tensors if t is not None and not t.dtype.is_floating_point)
        found.setdefault((launch.kernel.hash, launch.grid, numbers, lists), []).append(launch)
    if len(found) <= GROUPS:
        return [([same[0]], len(same)) for same in found.values()]
    codes: dict[str, list[Launch]] = {}
    for launch in launches:
        codes.setdefault(launch.kernel.hash, []).append(launch)
    return [(same, 1) for same in codes.values()]


def _flops(code: list[Instruction]) -> dict[str, float]:
    """Floating-point operations of products that a warp does in passing: a fused multiply-add is two."""
    found: dict[str, float] = {}
    for i in code:
        if i.name in ("HMMA", "HGMMA"):
            unit, count = "tf32" if "TF32" in i.modifiers else "half", _matrix_flops(i)
        elif i.name in ("FFMA", "FADD", "FMUL"):
            unit, count = "float32", (2 if i.name == "FFMA" else 1) * WARP
        elif i.name in ("DFMA", "DADD", "DMUL"):
            unit, count = "float64", (2 if i.name == "DFMA" else 1) * WARP
        elif i.name in ("DMMA", "IMMA", "QGMMA", "IGMMA", "BGMMA"):
            raise UnknownInstruction(i.text)
        else:
            continue
        found[unit] = found.get(unit, 0.0) + count
    return found


def _matrix_flops(i: Instruction) -> float:
    """HMMA.16816: 16 x 8 x 16 of a warp. HGMMA.64x128x16: of four warps."""
    if i.name == "HGMMA":
        m, n, k = map(int, i.modifiers[0].split("x"))
        return 2 * m * n * k / 4
    m, n, k = re.fullmatch(r"(16)(8)(\d+)", i.modifiers[0]).groups()
    return 2 * int(m) * int(n) * int(k)


def _count_bytes(cost: Cost, launches: list[Launch]) -> None:
    """Every tensor once, as if the caches held what is read again. Launches of one kernel that share a tensor are parts
    of one result, unless one of them changes what it reads: then each is a pass of its own.
    """
    seen: set[tuple] = set()
    for n, launch in enumerate(launches):
        loaded, stored = directions(launch.kernel.asm["ttir"])
        passes = bool(loaded & stored)
        for place, (kind, tensor) in enumerate(launch.arguments):
            if kind[0] != "*" or tensor is None:
                continue
            what = (tensor.data_ptr(), extent(tensor) if tensor.numel() else 0, tensor.dtype, n if passes else 0)
            for direction, places in (("read", loaded), ("written", stored)):
                if place in places and (direction, what) not in seen:
                    seen.add((direction, what))
                    setattr(cost, direction, getattr(cost, direction) + _bytes(tensor))


def _bytes(tensor: Tensor) -> int:
    """Of the elements that differ by their address."""
    shape = [n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s]
    return math.prod(shape) * tensor.element_size() if tensor.numel() else 0


@cache
def directions(ttir: str) -> tuple[set[int], set[int]]:
    """Places of the parameters that are loaded from and stored to, by following pointers through Triton's IR."""
    head = re.search(r"tt\.func public @\w+\((.*)\) attributes", ttir)[1]
    names = re.findall(r"(%[\w#]+): ", head)
    roots: dict[str, set[int]] = {name: {place} for place, name in enumerate(names)}
    loaded: set[int] = set()
    stored: set[int] = set()
    for line in ttir.splitlines():
        line = line.split(" loc(")[0]
        if match := re.match(r"\s*tt\.store (%[\w#]+),", line):
            stored |= _found(roots, match[1], line)
        elif match := re.match(r"\s*(%[\w#]+) = tt\.load (%[\w#]+)", line):
            loaded |= _found(roots, match[2], line)
        elif match := re.match(r"\s*(%[\w#]+) = tt\.atomic_rmw \w+, \w+, \w+, (%[\w#]+),", line):
            both = _found(roots, match[2], line)
            loaded, stored = loaded | both, stored | both
        elif re.search(r"tt\.(atomic|descriptor)", line):
            raise NotImplementedError(line)
        elif (match := re.match(r"\s*(%[\w#]+)(?::\d+)? = \S+ (.*)", line)) and "!tt.ptr" in line:
            result = set().union(*(roots.get(name.split("#")[0], set()) for name in re.findall(r"%[\w#]+", match[2])))
            pointers = {place for place in result if f"{names[place]}: !tt.ptr" in head}
            roots[match[1]] = pointers
    return loaded, stored


def _found(roots: dict[str, set[int]], name: str, line: str) -> set[int]:
    places = roots.get(name)
    if not places:
        raise LookupError(f"where does this point? {line.strip()}")
    return places
