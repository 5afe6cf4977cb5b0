from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing import get_context
from util import assert_within_budget

from murf_fast import NearestIndex, k_center_greedy, nearest_distance, reference
from murf_fast.anomaly import PRESETS, MultiResolutionDetector, ScoringRules, ShardedIndex, mean_top, reweighted_score
from murf_fast.anomaly._images import Size
from murf_fast.nn import MultiResolutionEncoder
from murf_fast.ops import _cells

transformers = pytest.importorskip("transformers", reason="needs transformers for a vision transformer")
pytest.importorskip("safetensors")
GOLDEN = Path(__file__).parent / "golden"
OPTIONS = {"layers": (0, 2), "scales": (0.5, 1.0), "pixels": None}


def model(seed=0):
    torch.manual_seed(seed)
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=3, patch_size=4, image_size=24
    )
    return transformers.Dinov2Model(config).eval()


def images(n, seed=0, size=(32, 40)):
    g = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.rand(n, 3, 4, 5, generator=g), size, mode="bilinear")
    return [(255 * image).to(torch.uint8) for image in smooth]


@pytest.fixture(scope="module")
def fitted():
    return MultiResolutionDetector(model(), **OPTIONS).fit(images(3))


def by_hand(train, image, dtype):
    """MRF-AD in plain PyTorch: resize, encode, nearest row, upsample, mean."""
    vit = model().to(dtype)
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def features(x, scale):
        x = (x[None].to(dtype) / 255 - mean) / std
        size = tuple(int(n * scale) // 4 * 4 for n in x.shape[2:])
        hidden = vit(F.interpolate(x, size, mode="bilinear"), output_hidden_states=True).hidden_states
        grid = (size[0] // 4, size[1] // 4)
        return [hidden[layer + 1][0, 1:] for layer in (0, 2)], grid

    maps = []
    with torch.no_grad():
        for scale in (0.5, 1.0):
            banks = [torch.cat(rows) for rows in zip(*(features(t, scale)[0] for t in train), strict=True)]
            rows, grid = features(image, scale)
            for q, bank in zip(rows, banks, strict=True):
                d = reference.nearest_distance(q, bank)[0].view(1, 1, *grid)
                maps.append(F.interpolate(d, image.shape[1:], mode="bilinear"))
    return torch.stack(maps).mean(0)[0, 0]


def test_is_the_paper_s_method(fitted):
    image = images(1, seed=5)[0]
    found = fitted.score(image)
    assert found.map.shape == (32, 40)
    oracle, same_dtype = (by_hand(images(3), image, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(found.map, oracle, same_dtype)
    assert fitted.images_ == 3
    assert [b.shape[0] for b in fitted.banks_] == [3 * 4 * 5, 3 * 4 * 5, 3 * 8 * 10, 3 * 8 * 10]


def test_small_images_share_passes(monkeypatch):
    """In the order of the images, whose rows are those of one image after another; without what no patch counts of."""
    sizes = [(32, 40), (24, 28), (40, 32), (24, 28), (96, 88)]
    several = [images(1, seed, size)[0] for seed, size in enumerate(sizes)]
    options = {"foreground": lambda image: torch.full(image.shape[1:], image.shape[1:] != (40, 32))}

    def fit(patches):
        encoder = MultiResolutionEncoder(
            model(),
            scales=(0.5, 1.0),
            layers=(0, 2),
            norm=False,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            tokens_per_pass=patches,
        )
        calls, run = [], encoder.forward
        monkeypatch.setattr(encoder, "forward", lambda x: calls.append(len(x)) or run(x))
        done = []
        detector = MultiResolutionDetector(encoder, pixels=None, **options)
        detector.fit(iter(several), progress=lambda count, _: done.append(count))
        assert done == [1, 2, 3, 4, 5]
        return detector.banks_, calls

    banks, calls = fit(300)
    alone, calls_alone = fit(1)
    assert (calls, calls_alone) == ([3, 1], [1, 1, 1, 1])
    for bank, rows in zip(banks, alone, strict=True):
        torch.testing.assert_close(bank, rows)


def test_a_training_image_is_normal_and_a_spot_is_not(fitted):
    seen = images(3)[1]
    normal = fitted.score(seen)
    assert float(normal.map.max()) < 1e-3
    spoiled = seen.clone()
    spoiled[:, 8:16, 24:32] = 255 - spoiled[:, 8:16, 24:32]
    found = fitted.score(spoiled)
    assert found.score > normal.score
    y, x = divmod(int(found.map.argmax()), 40)
    assert 4 <= y < 20
    assert 20 <= x < 36


def test_one_scale_only(fitted):
    image = images(1, seed=5)[0]
    single = fitted.score_each_scale(image)
    assert len(single) == 3
    assert torch.equal(single[2].map, fitted.score(image).map)
    assert single[2].score == fitted.score(image).score
    torch.testing.assert_close((single[0].map + single[1].map) / 2, fitted.score(image).map)
    half = MultiResolutionDetector(model(), **{**OPTIONS, "scales": (0.5,)}).fit(images(3)).score(image)
    torch.testing.assert_close(single[0].map, half.map)
    assert single[0].score == pytest.approx(half.score)


def test_kinds_of_images_give_the_same(fitted):
    pil = pytest.importorskip("PIL.Image")
    image = images(1, seed=5)[0]
    array = image.permute(1, 2, 0).numpy()
    expected = fitted.score(image).map
    for other in (image[None], array, pil.fromarray(array)):
        assert torch.equal(fitted.score(other).map, expected)
    assert torch.allclose(fitted.score(image.float() / 255).map, expected, atol=1e-4)


def test_save_and_load(fitted, tmp_path):
    fitted.save(tmp_path / "bank")
    loaded = MultiResolutionDetector.load(tmp_path / "bank", model())
    image = images(1, seed=5)[0]
    assert torch.equal(loaded.score(image).map, fitted.score(image).map)
    assert loaded.score(image).score == fitted.score(image).score
    assert loaded.images_ == 3


@pytest.mark.parametrize("rules", list(PRESETS))
def test_presets(rules, tmp_path):
    detector = MultiResolutionDetector(model(), **OPTIONS, rules=rules, index="coreset", coreset=0.3).fit(images(2))
    assert [len(b) for b in detector.banks_] == [12, 12, 48, 48]
    found = detector.score(images(1, seed=5)[0])
    assert bool(found.map.isfinite().all())
    assert 0 < found.score < float("inf")
    detector.save(tmp_path)
    assert MultiResolutionDetector.load(tmp_path, model()).rules == PRESETS[rules]


@pytest.mark.parametrize("projection", [None, "sparse"])
def test_coresets_tell_of_their_progress(projection):
    options, told = {**OPTIONS, "index": "coreset", "coreset": 0.3, "projection": projection}, []
    detector = MultiResolutionDetector(model(), **options).fit(
        images(2), coreset_progress=lambda *pair: told.append(pair)
    )
    assert told == sorted(set(told))
    assert told[-1] == (120, 120)
    rows = MultiResolutionDetector(model(), **OPTIONS).fit(images(2)).banks_
    for bank, coreset in zip(rows, detector.banks_, strict=True):
        assert torch.equal(coreset, bank[k_center_greedy(bank, fraction=0.3, projection=projection)])


def test_approximate_index():
    pytest.importorskip("faiss")
    exact = MultiResolutionDetector(model(), **OPTIONS).fit(images(2))
    ivf = MultiResolutionDetector(model(), **OPTIONS, index="ivf").fit(images(2))
    image = images(1, seed=5)[0]
    # 32 of at most 80 lists are searched: some neighbours are missed, none is invented.
    assert bool((ivf.score(image).map >= exact.score(image).map - 1e-3).all())


@pytest.mark.parametrize("rules", [ScoringRules(k=3), ScoringRules(metric="l2sq", image_score="top1%")])
def test_rules_of_one_s_own(rules, tmp_path):
    detector = MultiResolutionDetector(model(), **OPTIONS, rules=rules).fit(images(2), folder=tmp_path / "rows")
    image = images(1, seed=5)[0]
    found = detector.score(image)
    detector.save(tmp_path / "bank")
    loaded = MultiResolutionDetector.load(tmp_path / "bank", model())
    assert torch.equal(loaded.score(image).map, found.map)
    # Fitting again into the same folder leaves what is mapped alone.
    detector.fit(images(2), folder=tmp_path / "rows", overwrite=True)
    assert torch.equal(detector.score(image).map, found.map)


def test_patchcore_s_image_score_needs_whole_banks():
    with pytest.raises(ValueError, match='"reweighted" scores need index="exact", "cells" or "coreset"'):
        MultiResolutionDetector(model(), **OPTIONS, rules="patchcore", index="ivf")


def test_foreground():
    def left_half(image):
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[:, : image.shape[2] // 2] = True
        return mask

    detector = MultiResolutionDetector(model(), **OPTIONS, foreground=left_half).fit(images(2))
    assert [len(b) for b in detector.banks_] == [2 * 4 * 3, 2 * 4 * 3, 2 * 8 * 5, 2 * 8 * 5]
    found = detector.score(images(1, seed=5)[0])
    assert float(found.map[:, 30:].abs().max()) == 0
    assert float(found.map[:, :15].min()) > 0


def test_prescaling():
    image = torch.rand(1, 3, 100, 50)
    assert Size(None, enlarge=True).prescaled(image) is image
    assert Size(5200, enlarge=True).prescaled(image) is image
    assert Size(20000, enlarge=True).prescaled(image).shape == (1, 3, 200, 100)
    small = Size(1250).prescaled(torch.full((1, 3, 100, 50), 51, dtype=torch.uint8))
    assert small.shape == (1, 3, 50, 25)
    assert torch.allclose(small, torch.tensor(0.2))


@pytest.mark.parametrize("shorter", [16, 56])
def test_a_shorter_side_is_that_of_pillow(shorter):
    """As torchvision's Resize with bicubic interpolation, which AnomalyDINO and SuperAD use; but for its rounding."""
    pil = pytest.importorskip("PIL.Image")
    # Pillow cuts off what overshoots between the axes: here nothing does.
    pixels = np.random.default_rng(0).integers(90, 160, (31, 45, 3), dtype=np.uint8)
    size = (shorter, 45 * shorter // 31)
    assert Size(None, shorter_side=shorter).of(31, 45) == size
    assert Size(None, shorter_side=shorter).of(45, 31) == size[::-1]
    found = Size(None, shorter_side=shorter).prescaled(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    expected = np.asarray(pil.fromarray(pixels).resize(size[::-1], pil.Resampling.BICUBIC))
    assert np.abs(255 * found[0].permute(1, 2, 0).numpy() - expected).max() <= 1.5  # two roundings of Pillow
    edge = torch.arange(40).ge(20).float()[:, None].expand(1, 3, 40, 30)
    steps = Size(None, shorter_side=shorter).prescaled(edge)
    assert (steps.min(), steps.max()) == (0, 1)


def test_progress_and_bank_folder(tmp_path):
    told = []
    detector = MultiResolutionDetector(model(), **OPTIONS)
    detector.fit(images(2), folder=tmp_path, progress=lambda *pair: told.append(pair))
    assert told == [(1, 2), (2, 2)]
    names = ["bank-000", "bank-001", "bank-002", "bank-003", "detector"]
    assert sorted(p.stem for p in tmp_path.iterdir()) == names
    detector.fit((image for image in images(2)), progress=lambda *pair: told.append(pair))
    assert told[2:] == [(1, None), (2, None)]


def test_golden_of_patchcore():
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "anomaly__patchcore.npz").items()}
    index = NearestIndex(data["bank"])
    distances, indices = nearest_distance(data["embedding"], index)
    scores = distances[:, 0].view(3, 11, 9)
    assert torch.allclose(scores, data["patch_scores.f64"].view(3, 11, 9), rtol=0, atol=1e-5)
    rows = data["embedding"].view(3, 99, -1)
    for i in range(3):
        one = (rows[i], distances.view(3, 99)[i], indices.view(3, 99)[i], index)
        assert reweighted_score(*one) == pytest.approx(float(data["pred_score.f64"][i]), abs=1e-5)
        assert reweighted_score(*one, neighbors=1) == pytest.approx(float(data["pred_score_1.f64"][i]), abs=1e-5)


def test_golden_mean_of_the_top_hundredth():
    data = {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "anomaly__knn.npz").items()}
    many, few = data["anomalydino.L2.k5"], data["anomalydino.L2_normalized.k1"][:73]
    for scores, expected in zip((many, few), data["mean_top1p"].tolist(), strict=True):
        assert mean_top(scores) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"index": "hnsw"}, ValueError, "`index` must be one of"),
        ({"rules": "mine"}, ValueError, "`rules` must be one of"),
        ({"pixels": 0}, ValueError, "`pixels` must be positive"),
        (
            {"pixels": 5},
            ValueError,
            r"at least one patch, 16 \(five megapixels are 5e6",
        ),
        ({"coreset": 0}, ValueError, r"`coreset` must be in \(0, 1\]"),
        ({"projection": "dense"}, ValueError, "`projection` must be"),
        ({"foreground": 3}, TypeError, "`foreground` must be callable, got int"),
        ({"background": "red"}, ValueError, "`background` must be"),
        ({"layers": (3,)}, ValueError, "`layers` must be indices of 3 blocks"),
    ],
)
def test_bad_options(options, error, words):
    with pytest.raises(error, match=words):
        MultiResolutionDetector(model(), **{**OPTIONS, **options})


def test_bad_rules():
    with pytest.raises(ValueError, match="`metric` must be one of"):
        ScoringRules(metric="ip")
    with pytest.raises(ValueError, match="`image_score` must be one of"):
        ScoringRules(image_score="mean")


def test_bad_images(fitted):
    with pytest.raises(ValueError, match="at least one image"):
        MultiResolutionDetector(model(), **OPTIONS).fit([])
    with pytest.raises(ValueError, match=r"fit\(\) or load\(\) first"):
        MultiResolutionDetector(model(), **OPTIONS).score(images(1)[0])
    with pytest.raises(ValueError, match=r"a tensor \(3, H, W\), .*, got shape \(2, 32, 40\)"):
        fitted.score(images(1)[0][:2])
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\)"):
        fitted.score(np.zeros((32, 40, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"mask of the image's size, \(32, 40\), got \(3, 4\)"):
        MultiResolutionDetector(model(), **OPTIONS, foreground=lambda image: torch.ones(3, 4)).fit(images(1))
    with pytest.raises(ValueError, match="an image must be finite"):
        fitted.score(torch.full((3, 32, 40), torch.nan))


@pytest.fixture
def saved(fitted, tmp_path):
    fitted.save(tmp_path)
    return tmp_path


def test_refuses_what_it_did_not_write(saved):
    with pytest.raises(ValueError, match="made with another encoder"):
        MultiResolutionDetector.load(saved, model(seed=1))
    with pytest.raises(ValueError, match=r"holds no detector: detector\.json is missing"):
        MultiResolutionDetector.load(saved / "other", model())
    description = json.loads((saved / "detector.json").read_text())
    for change, words in (
        ({"version": 99}, "has version 99, expected 1 to 4"),
        ({"format": "zip"}, "was not written by a detector"),
        ({"foreground": True}, "made with a `foreground` function"),
    ):
        (saved / "detector.json").write_text(json.dumps({**description, **change}))
        with pytest.raises(ValueError, match=words):
            MultiResolutionDetector.load(saved, model())
    (saved / "detector.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        MultiResolutionDetector.load(saved, model())


@pytest.mark.parametrize("length", [4, 40, 400, None])
def test_refuses_truncated_banks(saved, length):
    bank = saved / "bank-001.safetensors"
    if length is None:
        bank.unlink()
    else:
        bank.write_bytes(bank.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"bank-001\.safetensors is damaged or missing"):
        MultiResolutionDetector.load(saved, model())


def test_banks_are_plain_safetensors(saved, fitted):
    from safetensors.torch import load_file

    assert torch.equal(load_file(saved / "bank-000.safetensors")["rows"], fitted.banks_[0])
    (size,) = struct.unpack("<Q", (saved / "bank-000.safetensors").read_bytes()[:8])
    assert size % 8 == 0


def _rank(rank, folder, results):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(0)
    bank, query = torch.randn(101, 16, generator=g), torch.randn(40, 16, generator=g)
    bank[70:75] = bank[3:8]  # ties between ranks
    query[:5] = bank[70:75]
    index = ShardedIndex(bank[:63] if rank == 0 else bank[63:])
    for k in (1, 3, 50):
        for metric in ("l2", "l2sq"):
            sharded, whole = index.search(query, k=k, metric=metric), nearest_distance(query, bank, k=k, metric=metric)
            results.put((rank, k, all(torch.equal(a, b) for a, b in zip(sharded, whole, strict=True))))
    detector = MultiResolutionDetector.load(f"{folder}/bank", model(), group=dist.group.WORLD)
    alone = MultiResolutionDetector.load(f"{folder}/bank", model())
    image = images(1, seed=5)[0]
    results.put((rank, "detector", torch.equal(detector.score(image).map, alone.score(image).map)))
    try:
        index.search(query, k=102)
    except ValueError as error:
        results.put((rank, "k", "at most the 101 rows" in str(error)))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch comes without gloo")
def test_banks_on_two_ranks(fitted, tmp_path):
    fitted.save(tmp_path / "bank")
    context = get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, str(tmp_path), results)) for rank in range(2)]
    for p in processes:
        p.start()
    found = [results.get(timeout=200) for _ in range(16)]
    for p in processes:
        p.join(timeout=60)
        assert p.exitcode == 0
    assert all(equal for *_, equal in found), found


def test_cells_change_no_score(tmp_path, monkeypatch):
    """Before and after a way to the disk, and with images added. Banks of a few rows have none of their own accord."""
    monkeypatch.setattr(_cells, "FEW_ROWS", 0)
    monkeypatch.setattr(_cells, "ROWS_PER_CELL", 3)
    first, more, image = images(4), images(2, seed=9), images(1, seed=5)[0]
    cells = MultiResolutionDetector(model(), **OPTIONS, index="cells").fit(first)
    cells.save(tmp_path)
    plain = MultiResolutionDetector(model(), **OPTIONS).fit(first)
    for subject in (cells, MultiResolutionDetector.load(tmp_path, model())):
        assert_scored_alike(subject, plain, image)
    assert_scored_alike(cells.add(more), plain.add(more), image)


def assert_scored_alike(cells, plain, image):
    found, expected = cells.score(image), plain.score(image)
    assert torch.equal(found.map, expected.map)
    assert found.score == expected.score
    assert all(index.cells is not None for index in cells._indices)
