"""The tables' cases: both codes compute the same, and what a case is said to take is what it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from util import assert_gradient_within_budget, assert_within_budget

from murf_fast import reference
from murf_fast.cli.tables import case, upsampling, vits
from murf_fast.cli.tables.case import OURS, PLAIN, Setting, Work
from murf_fast.cli.tables.counted import counted
from murf_fast.cli.tables.kinds import featsharp14, mrfad, murf2
from murf_fast.cli.tables.upsamplers import UPSAMPLERS, anyup_attention, pairs
from murf_fast.nn import NAF, AnyUp, JBUStack
from murf_fast.nn.guided._anyup_forward import window_rule
from murf_fast.nn.guided.jbu_level import Drawn
from murf_fast.reference.anyup import attend
from murf_fast.reference.naf import naf, naf_queries_and_keys

OWN = "table_models:vit"


def built(table, setting, **labels):
    """The parts of the only case with these labels, by code and dtype."""

    def of(code, dtype):
        chosen = dataclasses.replace(setting, dtype=dtype)
        (found,) = (c for c in case.table(table).cases(chosen) if {**c.labels, **labels, "code": code} == c.labels)
        return found.build()

    return of(OURS, torch.float32), of(PLAIN, torch.float32), of(PLAIN, torch.float64)


@pytest.mark.parametrize("method", sorted(UPSAMPLERS))
def test_upsamplers_compute_the_same(method, monkeypatch):
    monkeypatch.setattr(upsampling, "CHANNELS", 48)
    table = "jbu" if method == "jbu-shared" else "anyup10"
    every = built(table, Setting(sizes=(48,), models=(method,)))
    ours, plain, exact = every
    assert list(ours) == list(case.table(table).parts)
    assert_within_budget(ours["forward"](), exact["forward"](), plain["forward"](), method)
    gradients = [parts["backward"]() for parts in every]
    reached = [i for i, g in enumerate(gradients[2]) if g is not None and g.abs().max() > 0]
    assert len(reached) > 0.7 * len(gradients[2])
    scales = [gradients[2][i].abs().max() for i in reached]
    # One budget for all parameters, each by its largest gradient.
    joined = [torch.cat([(g[i] / s).flatten() for i, s in zip(reached, scales, strict=True)]) for g in gradients]
    assert_gradient_within_budget(joined[0], joined[2], joined[1], method)


@pytest.mark.parametrize(
    ("table", "sizes", "labels", "part"),
    [
        ("encoder", (84,), {}, "encode"),
        ("murf2", (28, 56, 84), {"resolution": "56"}, "inference"),
        ("murf2", (28, 56, 84), {"resolution": "28 + 56 + 84"}, "inference"),
        ("featsharp14", (56,), {"method": featsharp14.SHARP}, "image"),
        ("featsharp14", (56, 112), {"size": 112, "method": featsharp14.SHARP}, "image"),
        ("featsharp14", (56, 112), {"size": 112, "method": featsharp14.WHOLE}, "image"),
    ],
)
def test_encoders_compute_the_same(table, sizes, labels, part):
    pytest.importorskip("transformers")
    ours, plain, exact = built(table, Setting(sizes=sizes, model=OWN), **labels)
    assert list(ours) == list(case.table(table).parts)
    assert_within_budget(ours[part](), exact[part](), plain[part](), str(labels))


def test_heads_are_trained_by_the_same_gradients():
    pytest.importorskip("transformers")
    ours, plain, exact = built("murf2", Setting(sizes=(28, 56, 84), model=OWN), resolution="28 + 56 + 84")
    for found in zip(*(parts["training"]() for parts in (ours, exact, plain)), strict=True):
        assert_gradient_within_budget(*found)


def test_detectors_compute_the_same():
    pytest.importorskip("transformers")
    maps = []
    for parts in built("mrfad", Setting(sizes=(112,), model=OWN)):
        assert list(parts) == list(mrfad.TABLE.parts)
        for call in parts.values():
            result = call()
        maps.append(result.map if hasattr(result, "map") else result[0, 0])
    ours, plain, exact = maps
    assert exact.max() > exact.min() > 0
    assert_within_budget(ours, exact, plain)


def test_layers_of_a_detector_are_those_of_the_paper():
    assert mrfad._layers(12) == [7, 9, 11]
    assert mrfad._layers(24) == [15, 19, 23]
    assert mrfad._layers(1) == [0]


@pytest.mark.parametrize("layout", ["cyx", "yxc"])
def test_own_forwards_see_the_image(layout, monkeypatch):
    """Patches that a family turns into pixels again are those of the image."""
    pytest.importorskip("transformers")
    import table_models

    model, seen = table_models.vit(), []
    kind = type(vits.resolved(model)[1](model))
    monkeypatch.setattr(kind, "call_model", lambda self, model, patches, grid: seen.append(self.pixels(patches, grid)))
    original = kind.__init__
    monkeypatch.setattr(
        kind, "__init__", lambda self, *a, **k: (original(self, *a, **k), setattr(self, "layout", layout))[0]
    )
    image = torch.randn(2, 3, 28, 42)
    vits._own_forward(model, image)
    assert torch.equal(seen[0], image)


def test_operations_and_peak_memory_are_counted():
    def function(a, b):
        c = a @ b
        d = c + 1
        del c
        return (d * 2).sum()

    work = counted(function, torch.empty(8, 16), torch.empty(16, 4))
    assert work.operations == 2 * 8 * 16 * 4
    assert work.bytes == 2 * 4 * 8 * 4 + 4  # never three of the results at once; and their sum


def test_views_take_no_memory():
    work = counted(lambda x: x.reshape(4, 4).T[1:] + 0, torch.empty(16))
    assert work.bytes == 12 * 4


def test_attention_of_anyup_by_the_formula():
    model, grid, size = AnyUp(), (5, 4), (35, 28)
    rule = window_rule("dense", 0.1, size, grid)
    q, k, v = torch.empty(1, 128, *size), torch.empty(1, 128, *grid), torch.empty(1, 40, *grid)
    work = counted(lambda m, *x: attend(dict(m.named_parameters()), *x, rule, 4), model.requires_grad_(False), q, k, v)
    assert work.operations == anyup_attention(model, 40, grid, size)


def test_windows_spare_the_pairs_outside_them():
    size, grid = (35, 28), (9, 11)
    for rule in (window_rule(name, 0.1, size, grid) for name in ("dense", "natten")):
        rows, columns = (table.multiplicity() for table in rule.tables(size, grid))
        seen = rows[:, None, :, None] * columns[None, :, None]
        assert pairs(rule, size, grid) == seen.sum() < seen.size


def test_operations_of_naf_without_windows():
    """All keys less those outside the windows is what attention to the windows takes."""
    channels, grid, size = 48, (11, 12), (44, 36)
    model, rule = NAF(kernel_size=9), window_rule("natten", 0.4, size, grid)
    image, features = torch.empty(1, 3, *size), torch.empty(1, channels, *grid)
    whole = counted(lambda m, *x: naf(m.state_dict(), *x, rule), model, image, features).operations
    encoders = counted(lambda m, x: naf_queries_and_keys(m.state_dict(), x, size, grid, 4), model, image).operations
    seen = pairs(murf_windows(size, grid), size, grid)
    ours = whole - UPSAMPLERS["naf"].saved(model, channels, grid, size)
    assert ours == encoders + 2 * seen * (256 + channels)


def murf_windows(size, grid):
    from murf_fast import windows

    return windows.neighborhood(size, grid, 9)


def test_operations_of_bilateral_levels():
    """Kernels by the counter; their taps as the unfolded reference has them, which a counter sees."""
    channels, grid = 8, (4, 5)
    module = UPSAMPLERS["jbu"].make(channels, grid)
    size = tuple(16 * n for n in grid)
    assert isinstance(module.stack, JBUStack)

    def unfolded(module, source, image):
        for level in module.stack.levels:
            guidance = torch.nn.functional.adaptive_avg_pool2d(image, [2 * n for n in source.shape[2:]])
            params = Drawn.of(level, guidance).params
            source = reference.joint_bilateral_upsample(source, guidance, params)
        return source

    def ours(module, source, image):
        """The last convolution in front of the levels."""
        return unfolded(module, module.stack.fixup_proj(source), image)

    source, image = torch.empty(1, channels, *grid), torch.empty(1, 3, *size)
    plain = counted(lambda m, s, i: UPSAMPLERS["jbu"].plain(m, i, s), module.eval(), source, image).operations
    where = (module, channels, grid, size)
    expected = counted(ours, module, source, image).operations
    assert plain + UPSAMPLERS["jbu"].elementwise(*where) - UPSAMPLERS["jbu"].saved(*where) == expected


def test_facts_of_a_case():
    """Parameters of the released AnyUp; operations that grow as the pixels do where the windows do."""
    cases = case.table("anyup10").cases(Setting(sizes=(64, 128), models=("anyup", "bilinear")))
    found = {(c.labels["size"], c.labels["method"], c.labels["code"]): c for c in cases}
    assert len(found) == 8
    model = AnyUp()
    small, large = (found[size, "AnyUp", OURS].facts for size in (64, 128))
    assert small["parameters"] == sum(p.numel() for p in model.parameters())
    assert 4 <= large["operations"] / small["operations"] < 16
    for size in (64, 128):
        ours, plain = (found[size, "AnyUp", code] for code in (OURS, PLAIN))
        assert ours.facts["operations"] <= plain.facts["operations"]
        assert ours.work.operations <= plain.work.operations
        assert 0 < ours.work.bytes <= plain.work.bytes
    assert found[64, "bilinear", OURS].facts == {"parameters": 0, "operations": 0}


def test_head_parameters_of_the_paper(monkeypatch):
    """0.39 and 1.18 million: the column of MuRF's Table 2."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(murf2, "counted_or_problem", lambda *inputs: (Work(), None))
    cases = case.table("murf2").cases(Setting(sizes=(266, 518, 784), models=("B",)))
    found = {c.labels["resolution"]: round(c.facts["parameters"] / 1e6, 2) for c in cases}
    assert found == {"266": 0.39, "518": 0.39, "784": 0.39, "266 + 518 + 784": 1.18}


def test_crossover():
    def at(*ratios):
        return featsharp14.crossover(range(1, 1 + len(ratios)), ratios)

    assert at(2.0, 1.5, 1.1) is None
    assert at(0.9, 0.5) == 1.0
    assert at(2.0, 0.5) == 1.5
    assert 2.0 < at(3.0, 2.0, 0.9, 0.4) < 3.0
    assert at(0.9, 1.2, 0.9) > 2.0  # the last time it crosses
