"""Kernels for sm_90 go through an assembler that keeps their operands, and code that has lost some is found."""

from __future__ import annotations

import os
from dataclasses import dataclass

import offline
import pytest

pytestmark = pytest.mark.skipif(bool(offline.missing_tools()), reason=str(offline.missing_tools()))
VARIABLE = "TRITON_PTXAS_PATH"


@dataclass(frozen=True)
class Target:
    arch: int
    backend: str = "cuda"


@pytest.fixture
def assembler(monkeypatch):
    """The module, with what `ptxas` Triton names while it compiles."""
    from triton import knobs

    from murf_fast.kernels import assembler

    monkeypatch.delenv(VARIABLE, raising=False)
    assembler._better.cache_clear()
    yield assembler, knobs.nvidia
    assembler._better.cache_clear()


def compiled(assembler, target: Target, **options) -> tuple[str, dict]:
    """The assembler's version during a compilation, and its options."""
    module, nvidia = assembler
    seen = []
    module.compiled(lambda src, target, options: seen.append((nvidia.ptxas.version, options)), None, target, options)
    return seen[0]


def test_an_assembler_that_loses_operands_is_not_used(assembler, monkeypatch):
    _, nvidia = assembler
    before = nvidia.ptxas.version
    version, options = compiled(assembler, Target(90))
    assert tuple(map(int, version.split("."))) >= (12, 9)
    assert (before == version) == ("ptx_options" not in options)
    assert nvidia.ptxas.version == before
    assert VARIABLE not in os.environ


@pytest.mark.parametrize("target", [Target(80), Target(89), Target(100), Target(120), Target(90, "hip")], ids=str)
def test_others_stay_with_their_own(assembler, target):
    assert compiled(assembler, target) == (assembler[1].ptxas.version, {})


def test_what_another_assembler_made_is_told_apart(assembler):
    module, _ = assembler
    if not module.needs_other(Target(90)):
        pytest.skip("this Triton brings a newer assembler")
    options = {"num_warps": 4, "ptx_options": "--fmad=false"}
    assert compiled(assembler, Target(90), **options)[1] == module.marked(Target(90), options)
    assert module.marked(Target(90), options)["ptx_options"] == f"--fmad=false {module.MARK}"


def test_a_compilation_that_fails_leaves_the_assembler(assembler):
    module, nvidia = assembler
    before = nvidia.ptxas

    def fail(src, target, options):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        module.compiled(fail, None, Target(90), {})
    assert nvidia.ptxas == before
    assert VARIABLE not in os.environ


def test_without_a_newer_assembler_the_user_is_told(assembler, monkeypatch):
    module, _ = assembler
    monkeypatch.setattr(module, "_version", lambda tool: (12, 8))
    with pytest.warns(UserWarning, match="known to lose operands of matrix products: set TRITON_PTXAS_PATH"):
        assert compiled(assembler, Target(90))[1] == {}


# As cuobjdump prints it: the address of shared memory in the low words of descriptors, for a factor in registers.
WHOLE = """
        /*0000*/                   UMOV UR4, 0x400 ;
        /*0010*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR4 ;
        /*0020*/                   UMOV UR7, 0xc0000010 ;
        /*0030*/                   UMOV UR10, UR6 ;
        /*0040*/                   UIADD3 UR10, UP0, UR10, 0x20, URZ ;
        /*0050*/                   UMOV UR11, 0xc0000010 ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56 ;
        /*0070*/                   HGMMA.64x16x16.F32.BF16 R56, R28, gdesc[UR8].tnspB, R56, gsb0 ;
        /*0080*/                   EXIT ;
"""


def strays_of(text: str) -> list[str]:
    from sass.code import blocks_of, instructions
    from sass.descriptors import strays

    return strays(blocks_of(instructions(text)))


def test_descriptors_of_shared_memory():
    assert strays_of(WHOLE) == []


@pytest.mark.parametrize("lost", ["ULDC UR10, c[0x0][0x248]", "UMOV UR10, URZ", "UMOV UR12, UR6"])
def test_a_descriptor_that_has_lost_its_address(lost):
    """A parameter's register, none, and one that nobody has written."""
    (found,) = strays_of(WHOLE.replace("UMOV UR10, UR6", lost))
    assert "gdesc[UR8]" in found


def test_both_factors_in_shared_memory():
    both = WHOLE.replace("R28, gdesc[UR8].tnspB, R56, gsb0", "gdesc[UR8], R56, gsb0")
    (found,) = strays_of(both)  # the left one is in UR8, which nobody has written
    assert "gdesc[UR8]" in found
    assert strays_of(both.replace("UMOV UR7,", "UMOV UR8, UR6 ;\n        /*0025*/    UMOV UR7,")) == []
