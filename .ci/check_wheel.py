"""Run with an installed wheel first on the path: whether it is complete and works.

Arguments: the folder it lies in; "native" for a wheel with the extension, "pure" for one built without a compiler.
"""

import sys
import warnings
import zipfile
from pathlib import Path


def main(installed: Path, kind: str) -> None:
    # The tree's editable install would lend the wheel what it lacks.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]

    import torch

    import murf_fast
    from murf_fast import _extension, backends, kernels

    source = Path(__file__).resolve().parents[1]
    (wheel,) = installed.parent.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())

    expected = {str(p.relative_to(source)) for p in (source / "murf_fast").rglob("*.py") if p.parent.name != "kernels"}
    expected |= {f"murf_fast/{p.relative_to(source)}" for p in (source / "kernels").rglob("*.py")}
    expected |= {str(p.relative_to(source)) for p in (source / "murf_fast" / "assets").iterdir()}
    information = next(n.partition("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
    expected |= {"murf_fast/py.typed", *(f"{information}/licenses/{name}" for name in ("LICENSE", "NOTICE"))}
    missing = sorted(expected - names)
    assert not missing, f"not in the wheel: {missing}"
    stale = sorted(n for n in names if n.endswith(".py") and n not in expected)
    assert not stale, f"in the wheel, but not in the source: {stale}"

    for module in (murf_fast, kernels):
        assert Path(module.__file__).resolve().is_relative_to(installed), f"{module.__name__} is {module.__file__}"
    extensions = [n for n in names if "_native" in n and not n.endswith(".py")]
    features = [torch.rand(1, 3, n, n) for n in (2, 3)]
    reference = murf_fast.upsample_concat(features, (5, 7), backend="reference")
    if kind == "native":
        assert len(extensions) == 1, f"extensions in the wheel: {extensions}"
        assert Path(_extension.module().__file__).resolve().is_relative_to(installed), _extension.module().__file__
        torch.testing.assert_close(murf_fast.upsample_concat(features, (5, 7), backend="native"), reference)
        how = f"the native backend works from {extensions[0]}"
    else:
        assert not extensions, f"built without a compiler, yet it holds {extensions}"
        assert "not built" in "; ".join(backends.reasons_against("native", "cpu"))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                assert torch.equal(murf_fast.upsample_concat(features, (5, 7)), reference)
        assert len(told) == 1, [str(w.message) for w in told]
        assert "C++20 compiler" in str(told[0].message)
        how = "no extension; the reference answers with one warning"
    print(f"{wheel.name} ({kind}): {len(names)} files, complete; {how}")


main(Path(sys.argv[1]).resolve(), sys.argv[2])
