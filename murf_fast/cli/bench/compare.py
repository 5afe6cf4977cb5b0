"""What became slower between two records of the benchmarks.

A machine has slow days: its clock, its neighbours and its memory change what every call takes. So a case is *slower*
only if both of this hold, with the times of ours ``t`` and of the best contender ``p`` that both runs have, each run's
own best, as medians and 20th to 80th percentiles:

1. The time itself grew beyond what either run saw: the new 20th percentile lies above the old 80th, ``t20' > t80``.
2. The ratio to the best contender of the same run fell beyond what either run saw, too: its largest new value lies
   below its smallest old one, ``p80' / t20' < p20 / t80``. Had the machine slowed down, the contender would have, too.

*Faster* is the same with the two runs exchanged. A median that moved by less than :data:`LEAST` is neither: two
processes lay out their memory differently, which no spread within one of them shows. A case without a common contender
is *unjudged*: its time alone cannot tell the kernel from the machine.

Between two machines times mean nothing: there the second condition alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from murf_fast.cli.bench.records import Record

LEAST = 0.05


@dataclass(frozen=True)
class Change:
    """One case in both records.

    Attributes:
        name: "operation: case".
        verdict: "slower", "faster", "same" or "unjudged".
        before, after: Times of ours (``median_s``, ``p20_s``, ``p80_s``).
        against: The best common contender of the old and of the new run; None if they have none in common.
        ratios: Its median time over ours, old and new.
    """

    name: str
    verdict: str
    before: dict[str, Any]
    after: dict[str, Any]
    against: tuple[str, str] | None = None
    ratios: tuple[float, float] | None = None

    @property
    def loss(self) -> float:
        """By what the ratio was divided."""
        return self.ratios[0] / self.ratios[1] if self.ratios else 1.0


def changes(old: Record, new: Record, *, other_machine: bool = False) -> list[Change]:
    """Every case that both records have, judged by this module's rule; slower ones first, the worst at the top."""
    found = [
        _judged(name, old.cases[name], case, other_machine) for name, case in new.cases.items() if name in old.cases
    ]
    order = ("slower", "faster", "unjudged", "same")
    return sorted(found, key=lambda c: (order.index(c.verdict), -c.loss if c.verdict == "slower" else c.loss))


def _judged(name: str, old: dict[str, Any], new: dict[str, Any], other_machine: bool) -> Change:
    before, after = old["contenders"]["murf_fast"], new["contenders"]["murf_fast"]
    common = [n for n in peers(old) if n in peers(new)]
    if not common:
        return Change(name, "unjudged", before, after)
    then, now = (best(case, common) for case in (old, new))
    p, q = old["contenders"][then], new["contenders"][now]
    verdict = "same"
    if _grew(before, after, p, q, other_machine):
        verdict = "slower"
    elif _grew(after, before, q, p, other_machine):
        verdict = "faster"
    ratios = (p["median_s"] / before["median_s"], q["median_s"] / after["median_s"])
    return Change(name, verdict, before, after, (then, now), ratios)


def _grew(
    before: dict[str, Any], after: dict[str, Any], p: dict[str, Any], q: dict[str, Any], other_machine: bool
) -> bool:
    """Whether ours (``before``, ``after``) became slower beside its contender (``p``, ``q``)."""
    time_grew = after["median_s"] > (1 + LEAST) * before["median_s"] and after["p20_s"] > before["p80_s"]
    ratio_fell = p["median_s"] / before["median_s"] > (1 + LEAST) * q["median_s"] / after["median_s"]
    ratio_fell = ratio_fell and p["p20_s"] / before["p80_s"] > q["p80_s"] / after["p20_s"]
    return ratio_fell and (time_grew or other_machine)


def peers(case: dict[str, Any]) -> list[str]:
    """Contenders that do the same work as ours: not the part of it that a case is timed beside."""
    part = case["beside"][0] if case.get("beside") else None
    return [name for name in case["contenders"] if name not in ("murf_fast", part)]


def best(case: dict[str, Any], names: list[str]) -> str:
    """The fastest of ``names`` in this run."""
    return min(names, key=lambda name: case["contenders"][name]["median_s"])
