"""Which instructions decide where branches go, and the shorter of two ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sass.code import REGISTER, Block, Instruction

DECISIONS = ("BRA", "EXIT", "RET")
# What is computed from data, in floating point: where the search for what decides a branch ends.
OPAQUE = (
    "DADD", "DFMA", "DMUL", "DMNMX", "DSETP", "F2F", "F2FP", "FADD", "FCHK", "FFMA", "FMNMX", "FMUL", "FRND",
    "FSEL", "FSETP", "HADD2", "HMUL2", "HMNMX2", "HSETP2", "HMMA", "HGMMA", "LDSM", "I2FP",
)  # fmt: skip


def reads(instruction: Instruction) -> set[str]:
    """Registers and predicates that an instruction needs, its guard among them."""
    found = set() if instruction.guard in (None, "PT", "UPT") else {instruction.guard}
    if is_opaque(instruction):
        return found
    if instruction.name == "LDL":
        return found | set(instruction.slots)
    if instruction.name == "P2R":
        found |= {f"P{i}" for i in range(7)}
    for operand in instruction.operands[instruction.targets :]:
        for match in re.finditer(r"(U?[RP])(\d+)(\.64)?", operand):
            kind, number, wide = match.groups()
            count = 2 if wide or _is_wide(instruction, operand) else 1
            found |= {f"{kind}{int(number) + i}" for i in range(count)}
    if instruction.name in ("STS", "STG", "STL"):
        kind, number = re.match(r"(U?R)(\d+|Z)", instruction.operands[-1]).groups()
        if number != "Z":
            words = 4 if "128" in instruction.modifiers else 2 if "64" in instruction.modifiers else 1
            found |= {f"{kind}{int(number) + i}" for i in range(words)}
    return {r for r in found if REGISTER.fullmatch(r)}


def _is_wide(instruction: Instruction, operand: str) -> bool:
    """Whether the operand is a pair of registers: the sum of a wide product."""
    if "WIDE" in instruction.modifiers or ("HI" in instruction.modifiers and instruction.name in ("IMAD", "UIMAD")):
        return operand is instruction.operands[instruction.targets + 2]
    return instruction.name == "UIADD3" and "64" in instruction.modifiers


def is_opaque(instruction: Instruction) -> bool:
    if instruction.name == "MUFU":
        return instruction.modifiers != ("RCP",)
    if instruction.name == "HFMA2":
        return not is_constant(instruction)
    if instruction.name in ("I2F", "F2I"):
        return "F64" in instruction.modifiers
    return instruction.name in OPAQUE


def is_constant(instruction: Instruction) -> bool:
    """``HFMA2.MMA R, -RZ, RZ, a, b`` moves two constants of half precision."""
    return instruction.name == "HFMA2" and instruction.operands[1:3] == ("-RZ", "RZ")


class Slice:
    """The instructions that the decisions of a program depend on."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        self.wanted: set[int] = set()  # addresses
        self._place = {i.address: (b.index, n) for b in blocks for n, i in enumerate(b.instructions)}
        self._entered: dict[tuple[int, str], frozenset[int]] = {}
        self._code = {i.address: i for b in blocks for i in b.instructions}
        pending = [i for b in blocks for i in b.instructions if i.name in DECISIONS]
        shared = False
        seen = {i.address for i in pending}
        while pending:
            instruction = pending.pop()
            self.wanted.add(instruction.address)
            needed = set()
            for register in reads(instruction):
                needed |= self.definitions(instruction, register)
            if instruction.name == "LDS" and not shared:
                shared = True
                needed |= {i.address for i in self._code.values() if i.name in ("STS", "STSM", "LDGSTS")}
            for address in needed - seen:
                seen.add(address)
                pending.append(self._code[address])

    def instruction(self, address: int) -> Instruction:
        return self._code[address]

    def definitions(self, instruction: Instruction, register: str) -> set[int]:
        """Addresses of the instructions whose value of the register may reach this one."""
        index, place = self._place[instruction.address]
        found: set[int] = set()
        if not self._backwards(self.blocks[index].instructions[:place], register, found):
            found |= self._entering(index, register)
        return found

    def ends_by_data(self, jump: Instruction) -> bool:
        """Whether a comparison of floating-point numbers decides about a jump."""
        pending, seen = [jump], set()
        while pending:
            instruction = pending.pop()
            seen.add(instruction.address)
            if is_opaque(instruction):
                return True
            predicates = [r for r in reads(instruction) if "P" in r]
            found = set().union(*(self.definitions(instruction, r) for r in predicates))
            pending += [self._code[address] for address in found - seen]
        return False

    def _backwards(self, code: list[Instruction], register: str, found: set[int]) -> bool:
        for instruction in reversed(code):
            if register in instruction.writes:
                found.add(instruction.address)
                if instruction.guard is None:
                    return True
        return False

    def _entering(self, index: int, register: str) -> frozenset[int]:
        key = (index, register)
        if key not in self._entered:
            found: set[int] = set()
            visited, pending = set(), list(self.blocks[index].before)
            while pending:
                block = pending.pop()
                if block in visited:
                    continue
                visited.add(block)
                if not self._backwards(self.blocks[block].instructions, register, found):
                    pending += self.blocks[block].before
            self._entered[key] = frozenset(found)
        return self._entered[key]


def loops(blocks: list[Block]) -> set[tuple[int, int]]:
    """The edges that lead back to the head of a loop, as (from, to)."""
    return _edges_back(lambda index: blocks[index].after)


def _edges_back(following: Callable[[int], Sequence[int]]) -> set[tuple[int, int]]:
    found, open_, done = set(), {0}, set()
    pending = [(0, iter(following(0)))]
    while pending:
        index, successors = pending[-1]
        for successor in successors:
            if successor in open_:
                found.add((index, successor))
            elif successor >= 0 and successor not in done:
                open_.add(successor)
                pending.append((successor, iter(following(successor))))
                break
        else:
            pending.pop()
            open_.remove(index)
            done.add(index)
    return found


class Lengths:
    """Instructions of the longest way from a block to the end of the program that enters no loop twice."""

    def __init__(self, blocks: list[Block]):
        self.blocks = blocks
        # Of the program without the ways from a function back to each of its callers.
        self.back = _edges_back(self._following)
        self._known = {-1: 0}

    def of(self, index: int) -> int:
        pending = [index]
        while pending:
            at = pending[-1]
            missing = [] if at in self._known else [n for n in self._onwards(at) if n not in self._known]
            if missing:
                pending += missing
                continue
            if at not in self._known:
                lengths = [self._known[n] for n in self._onwards(at)]
                called = self.blocks[at].last.name == "CALL"
                self._known[at] = self.blocks[at].issued + (sum(lengths) if called else max(lengths, default=0))
            pending.pop()
        return self._known[index]

    def _following(self, index: int) -> list[int]:
        """The blocks, one of which comes next; both of a call: the function, and what follows it."""
        block = self.blocks[index]
        if block.last.name == "RET":
            return []
        if block.last.name == "CALL":
            return [block.after[0], index + 1]
        return block.after

    def _onwards(self, index: int) -> list[int]:
        return [s for s in self._following(index) if (index, s) not in self.back]

    def shorter(self, start: int) -> int:
        """The successor from which less is left to do.

        What a branch on data guards is a rare case that is computed again, or a last resort of a division.
        """
        return min(self.blocks[start].after, key=self.of)
