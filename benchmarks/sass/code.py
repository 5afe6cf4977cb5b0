"""SASS as cuobjdump prints it: instructions, what they read and write, and the blocks they form (sm_90)."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?)(U?P\w+) )?([A-Z0-9_.a-z]+)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bU?(?:R\d+|P\d+)\b")
ENDS = ("BRA", "EXIT", "RET", "CALL")
# Instructions that write nothing that a branch could read: memory, barriers, the flow itself.
SILENT = (
    "BAR", "BRA", "BREAK", "BSSY", "BSYNC", "CALL", "CCTL", "DEPBAR", "ERRBAR", "EXIT", "FENCE", "LDGDEPBAR", "LDGSTS",
    "MEMBAR", "NOP", "RED", "RET", "STG", "STS", "STSM", "UTMACMDFLUSH", "WARPGROUP", "WARPSYNC", "YIELD",
)  # fmt: skip
# Those that write one 32-bit register; and two.
SINGLE = (
    "F2FP", "FADD", "FFMA", "FLO", "FMNMX", "FMUL", "FSEL", "HADD2", "HFMA2", "HMUL2", "HMNMX2", "I2FP", "I2IP",
    "IABS", "IADD3", "IMAD", "LEA", "LOP3", "MOV", "MUFU", "P2R", "POPC", "PRMT", "R2UR", "REDUX", "S2R", "S2UR",
    "SEL", "SGXT", "SHF", "SHFL", "UFLO", "UIMAD", "ULEA", "ULOP3", "UMOV", "UPOPC", "UPRMT", "USEL", "USGXT",
    "USHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3", "VOTE", "VOTEU",
)  # fmt: skip
DOUBLE = ("DADD", "DFMA", "DMUL", "DMNMX")
PREDICATES = ("ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3", "FCHK", "R2P")


class UnknownInstruction(NotImplementedError):
    """An instruction whose meaning is not written down here, where it matters."""


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str | None  # the predicate that it runs under
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @cached_property
    def targets(self) -> int:
        """How many of the operands, from the first on, are written."""
        if self.name in SILENT or not self.operands or self.operands[0][0] in "[dc":
            return 0
        if self.name in ("SHFL", "PLOP3", "UPLOP3"):
            return 2
        if self.name in ("VOTE", "VOTEU"):
            return len(self.operands) - 1
        count = 1
        if is_predicate(self.operands[0]) and self.name in ("LOP3", "ULOP3"):
            count = 2
        while count < len(self.operands) and is_predicate(self.operands[count]) and self.name != "SEL":
            count += 1
        return count

    @cached_property
    def width(self) -> int:
        """32-bit registers of the first written operand."""
        name, modifiers = self.name, self.modifiers
        if name in DOUBLE or "WIDE" in modifiers:
            return 2
        if name in ("LDC", "ULDC", "LDG", "LDL", "LDS", "UIADD3"):
            return 4 if "128" in modifiers else 2 if "64" in modifiers else 1
        if name == "CS2R":
            return 1 if "32" in modifiers else 2
        if name in ("F2F", "I2F", "FRND"):
            return 2 if modifiers[:1] == ("F64",) or (name == "FRND" and "F64" in modifiers) else 1
        if name == "F2I":
            return 2 if "U64" in modifiers or "S64" in modifiers else 1
        if name == "LDSM":
            return int(modifiers[-1]) if modifiers[-1] in "24" else 1
        if name == "HMMA":
            return 4 if "F32" in modifiers else 2
        if name == "HGMMA":
            columns = int(modifiers[0].split("x")[1])
            return columns // 2 if "F32" in modifiers else columns // 4
        if name in SINGLE or name in PREDICATES:
            return 1
        raise UnknownInstruction(f"how many registers does it write? {self.text}")

    @cached_property
    def writes(self) -> tuple[str, ...]:
        if self.name == "STL":
            return self.slots
        if self.name == "R2P":
            return tuple(f"P{i}" for i in range(7) if int(self.operands[2], 16) >> i & 1)
        found = []
        for place, operand in enumerate(self.operands[: self.targets]):
            if is_predicate(operand):
                found.append(operand)
            elif match := re.match(r"(U?R)(\d+)", operand):
                found += [
                    f"{match[1]}{int(match[2]) + i}" for i in range(self.width if place == self.targets_first else 1)
                ]
        return tuple(r for r in found if r not in ("PT", "UPT"))

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The words of local memory that a spill goes to (STL) or comes from (LDL), as if they were registers."""
        match = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", self.operands[0 if self.name == "STL" else 1])
        if not match:
            raise UnknownInstruction(self.text)
        words = 4 if "128" in self.modifiers else 2 if "64" in self.modifiers else 1
        return tuple(f"L{int(match[1] or '0', 16) + 4 * n}" for n in range(words))

    @property
    def targets_first(self) -> int:
        """Place of the written register among the operands."""
        return 1 if self.targets > 1 and is_predicate(self.operands[0]) else 0


def is_predicate(operand: str) -> bool:
    return re.fullmatch(r"U?P(\d+|T)", operand) is not None


@dataclass
class Block:
    """Instructions that run one after the other; the last may lead elsewhere."""

    index: int
    instructions: list[Instruction]
    after: list[int] = field(default_factory=list)  # blocks; -1 is the end of the program
    before: list[int] = field(default_factory=list)

    @property
    def last(self) -> Instruction:
        return self.instructions[-1]

    @cached_property
    def issued(self) -> int:
        """What a warp issues: all but padding."""
        return sum(i.name != "NOP" for i in self.instructions)


def disassembled(cubin: bytes) -> str:
    return _cuobjdump("--dump-sass", cubin)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory (spills), of a thread."""
    report = _cuobjdump("--dump-resource-usage", cubin)
    return {name.lower(): int(re.search(rf"\b{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}


def _cuobjdump(what: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout


def instructions(text: str) -> list[Instruction]:
    found = []
    for line in text.splitlines():
        if match := LINE.match(line):
            address, negated, guard, name, operands = match.groups()
            first, *modifiers = name.split(".")
            parts = tuple(o.replace(".reuse", "") for o in re.split(r",\s*", operands)) if operands else ()
            found.append(
                Instruction(
                    int(address, 16),
                    guard,
                    bool(negated),
                    first,
                    tuple(modifiers),
                    parts,
                    line.split("*/", 1)[1].split("/*")[0].strip(),
                )
            )
    if not found:
        raise ValueError("no SASS")
    return found


def target_of(jump: Instruction) -> int:
    """Address of a BRA or CALL."""
    return int(jump.operands[-1], 16)


def blocks_of(code: list[Instruction]) -> list[Block]:
    """The blocks by rising address, with their edges. A RET may return to behind any CALL."""
    starts = {code[0].address}
    for i, instruction in enumerate(code):
        if instruction.name in ENDS:
            if instruction.name in ("BRA", "CALL"):
                starts.add(target_of(instruction))
            if i + 1 < len(code):
                starts.add(code[i + 1].address)
        elif instruction.name in ("BRX", "JMP", "JMX", "KILL") or instruction.name.endswith("BRA"):
            raise UnknownInstruction(instruction.text)
    blocks: list[Block] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append(Block(len(blocks), []))
        blocks[-1].instructions.append(instruction)
    at = {b.instructions[0].address: b.index for b in blocks}
    returns = [b.index + 1 for b in blocks if b.last.name == "CALL"]
    for block in blocks:
        last = block.last
        always = last.guard is None and last.name in ENDS and not _conditional(last)
        if last.name in ("BRA", "CALL"):
            block.after.append(at[target_of(last)])
        elif last.name == "EXIT":
            block.after.append(-1)
        elif last.name == "RET":
            block.after += returns
        if not always and block.index + 1 < len(blocks):
            block.after.append(block.index + 1)
    for block in blocks:
        for successor in block.after:
            if successor >= 0:
                blocks[successor].before.append(block.index)
    return blocks


def _conditional(jump: Instruction) -> bool:
    """Whether an operand, not the guard, decides: ``BRA.U !UP0, 0x...``."""
    return jump.name == "BRA" and len(jump.operands) > 1
