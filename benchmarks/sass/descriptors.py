"""Whether the products of warp groups read what their kernel has put into shared memory (sm_90).

HGMMA takes its operands in shared memory by descriptors in uniform registers, low words of which hold an address. ptxas
12.8 has been seen to keep such words for a loop and to lose what they start from: the products then read some other
place, and no tool but the wrong result says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from sass.code import Block, Instruction
from sass.flow import Slice, reads
from sass.run import PARAMETERS

BASE = "0x400"  # where the shared memory of a program begins: what Triton keeps of it lies behind the system's own
DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")


def strays(blocks: Sequence[Block]) -> list[str]:
    """Instructions with a descriptor that does not come from the base of shared memory, or comes from a parameter."""
    slice_ = Slice(blocks)
    products = [i for b in blocks for i in b.instructions if i.name == "HGMMA"]
    return [i.text for i in products if not all(_is_shared(slice_, i, word) for word in _addresses(i))]


def _addresses(product: Instruction) -> Iterator[str]:
    """The low words of an instruction's descriptors: of the left factor, unless that is in registers, and the right."""
    for place, operand in enumerate(product.operands):
        if match := DESCRIPTOR.match(operand):
            first = int(match[1])
            yield f"UR{first + 2}"
            if place == 1:
                yield f"UR{first}"


def _is_shared(slice_: Slice, product: Instruction, word: str) -> bool:
    """Whether all that the word is made of, but for conditions, leads to the base, and nothing to a parameter."""
    pending, seen, has_base = [(product, word)], set(), False
    while pending:
        reader, register = pending.pop()
        definitions = slice_.definitions(reader, register)
        if not definitions:
            return False
        for address in definitions - seen:
            seen.add(address)
            definition = slice_.instruction(address)
            read = definition.operands[definition.targets :]
            if any(int(m[1], 16) >= PARAMETERS for m in map(CONSTANT.search, read) if m):
                return False
            has_base |= BASE in read
            pending += [(definition, r) for r in reads(definition) if "P" not in r]
    return has_base
