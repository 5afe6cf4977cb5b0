"""Models as graphs of ``torch.export`` for any batch and size, saved, packaged and run in another process."""

from __future__ import annotations

import copy
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from families import SMALL
from test_export import ours
from torch import Tensor, nn
from torch.export import Dim, export
from util import assert_within_budget
from whole_graphs import needs_graph_of_murf

import murf_fast
from murf_fast import backends
from murf_fast.nn import JAFAR, NAF, AnyUp, DepthHead, JBUStack, SegmentationHead

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting") or bool(backends.native_problems()),
    reason="needs torch 2.7 and the C++ extension",
)

OPEN = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
NORMALIZATION = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Method(nn.Module):
    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, images: Tensor) -> Tensor:
        return getattr(self.model, self.name)(images)


class AtTheImage(nn.Module):
    """NAF and JAFAR are told the output's size."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        return self.model(image, features, tuple(image.shape[2:]))


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def r(*shape: int) -> Tensor:
    return torch.randn(shape)


def murf(head: str = "segment", **resolutions) -> murf_fast.MuRF:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**SMALL | {"num_hidden_layers": 1})
    columns = 2 * config.hidden_size
    head = DepthHead(columns, 16, depth_range=(0.1, 10)) if head == "depth" else SegmentationHead(columns, 7)
    return murf_fast.MuRF(frozen(transformers.Dinov2Model(config)), head=frozen(head), **resolutions, **NORMALIZATION)


def upsamplers() -> dict[str, tuple]:
    """Model, example, and inputs of another batch and other sizes."""
    torch.manual_seed(0)
    pair = (r(2, 3, 32, 40), r(2, 8, 5, 6)), (r(3, 3, 48, 36), r(3, 8, 6, 5))
    wide = (r(2, 3, 160, 150), r(2, 8, 11, 12)), (r(3, 3, 188, 166), r(3, 8, 12, 10))
    return {
        "AnyUp": (AnyUp(qk_dim=32), *pair),
        "JAFAR": (AtTheImage(JAFAR(8, qk_dim=32)), *pair),
        "JBUStack": (JBUStack(8), *(example[::-1] for example in pair)),
        "NAF": (AtTheImage(NAF(32)), *wide),
    }


def exported(model: nn.Module, example: tuple, **options):
    with torch.no_grad():
        return export(model, example, dynamic_shapes=(OPEN,) * len(example), **options)


@pytest.mark.parametrize("name", ["AnyUp", "JAFAR", "JBUStack", "NAF"])
def test_upsamplers(name):
    model, *inputs = upsamplers()[name]
    program = exported(frozen(model), inputs[0])
    nodes, run = ours(program), program.module()
    assert nodes
    assert {node.args[-1] for node in nodes} == {"auto"}
    if name != "JBUStack":  # encoded by passes over the pixels, not by convolutions that a graph was traced through
        assert any(str(n.target).split(".")[1] in ("image_queries", "naf_queries") for n in nodes)
    for arguments in inputs:
        with torch.no_grad():
            assert torch.equal(run(*arguments), model(*arguments))
    with torch.no_grad(), murf_fast.use_backend("reference"):
        result, same_dtype = run(*inputs[1]), model(*inputs[1])
        oracle = model.double()(*(x.double() for x in inputs[1]))
    assert_within_budget(result, oracle, same_dtype)


def test_windows_that_depend_on_sizes_say_so():
    model = frozen(AnyUp(qk_dim=32, windows="natten"))
    with pytest.raises(ValueError, match="`kernel_size` must be known when a graph is exported"):
        exported(model, (r(2, 3, 32, 40), r(2, 8, 5, 6)))


@pytest.mark.parametrize("method", ["features", "segment", "depth"])
@pytest.mark.parametrize("resolutions", [{"sizes": (24, 32)}, {"scales": (0.5, 1.0)}], ids=["sizes", "scales"])
def test_murf(resolutions, method):
    model = murf(method, **resolutions)
    # At scale 1 the example has the grid of the table of positions, in one direction and in both.
    program = exported(Method(model, method), (images(2, 3, SMALL["image_size"], 27),))
    nodes, run = ours(program), program.module()
    assert nodes
    assert {node.args[-1] for node in nodes} == {"auto"}
    for x in (images(2, 3, 24, 27), images(3, 3, 36, 41), images(1, 3, 24, 24)):
        with torch.no_grad():
            result = run(x)
            if method == "segment":
                assert torch.equal(result, model.segment(x))
                continue
            with murf_fast.use_backend("reference"):
                same_dtype = getattr(model, method)(x)
                oracle = getattr(copy.deepcopy(model).double(), method)(x)
        assert oracle.dtype == torch.float64
        assert_within_budget(result, oracle, same_dtype)  # the products of a traced pass are those of whole buffers


@needs_graph_of_murf
def test_murf_by_dynamo():
    model = murf(sizes=(24, 32))
    run = exported(Method(model, "segment"), (images(2, 3, 24, 27),), strict=True).module()
    x = images(3, 3, 36, 41)
    assert torch.equal(run(x), model.segment(x))


def in_another_process(script: str, *arguments) -> None:
    ran = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_a_saved_graph_runs_in_another_process(tmp_path):
    model, example, other = upsamplers()["AnyUp"]
    torch.export.save(exported(frozen(model), example), tmp_path / "anyup.pt2")
    with torch.no_grad():
        torch.save((other, model(*other)), tmp_path / "data.pt")
    script = """
import sys, torch, murf_fast
inputs, expected = torch.load(sys.argv[2])
run = torch.export.load(sys.argv[1]).module()
assert torch.equal(run(*inputs), expected)
"""
    in_another_process(script, tmp_path / "anyup.pt2", tmp_path / "data.pt")


def asks_for_an_executable_stack(library: bytes) -> bool:
    """Of a 64-bit ELF file: no header that speaks of the stack, or one with the flag for execution."""
    assert library[:5] == b"\x7fELF\2"
    (first,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    headers = dict(struct.unpack_from("<II", library, first + i * size) for i in range(count))
    return bool(headers.get(0x6474E551, 1) & 1)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++ by g++")
def test_a_package_of_aotinductor_runs_in_another_process(tmp_path):
    model = murf(sizes=(24, 32))
    program = exported(Method(model, "segment"), (images(2, 3, 24, 27),))
    # As docs/guides/export.md says: glibc from 2.41 on loads no library that asks for an executable stack.
    may_choose = hasattr(torch._inductor.config.aot_inductor, "use_consts_asm_build")  # torch 2.8 has it not
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "murf.pt2"),
        inductor_configs={"aot_inductor.use_consts_asm_build": False} if may_choose else {},
    )
    if may_choose and sys.platform == "linux":
        with zipfile.ZipFile(tmp_path / "murf.pt2") as package:
            libraries = [package.read(name) for name in package.namelist() if name.endswith(".so")]
        assert libraries
        assert not any(asks_for_an_executable_stack(library) for library in libraries)
    x = images(3, 3, 36, 41)
    torch.save((x, model.segment(x)), tmp_path / "data.pt")
    script = """
import sys, torch, murf_fast
if torch.__version__.startswith("2.10."):
    import torch._inductor.codecache  # which this torch needs to load a package, and does not import
x, expected = torch.load(sys.argv[2])
run = torch._inductor.aoti_load_package(sys.argv[1])
for name in ("native", "reference"):
    with murf_fast.use_backend(name):
        labels = run(x)
        labels = labels[0] if isinstance(labels, (list, tuple)) else labels
        assert labels.dtype == torch.uint8 and torch.equal(labels, expected), name
"""
    in_another_process(script, tmp_path / "murf.pt2", tmp_path / "data.pt")
