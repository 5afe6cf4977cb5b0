"""The layouts of data sets: which images are fitted, which are tested, and where their masks are found."""

from __future__ import annotations

import numpy as np
import pytest
from data_sets import SIZE, image, mvtec, mvtec2, save_mask, visa

from murf_fast.anomaly import categories

pytest.importorskip("PIL.Image")


def file_names(paths):
    return [p.name for p in paths]


def mask_names(category):
    return {(s.kind, s.path.name): s.mask and s.mask.name for s in category.test}


def test_mvtec(tmp_path):
    mvtec(tmp_path, "nut")
    mvtec(tmp_path, "bolt", train=2)
    (tmp_path / "notes").mkdir()
    bolt, nut = categories(tmp_path)
    assert (bolt.name, nut.name) == ("bolt", "nut")
    assert file_names(nut.train) == ["000.png", "001.png", "002.png"]
    assert mask_names(nut) == {
        **{(kind, f"00{i}.png"): f"00{i}_mask.png" for kind in ("cut", "dent") for i in range(2)},
        ("good", "000.png"): None,
        ("good", "001.png"): None,
    }
    assert all(s.mask is None or s.mask.parent.name == s.kind for s in nut.test)
    assert categories(tmp_path / "nut") == [nut]


def test_masks_of_equal_names_and_other_suffixes(tmp_path):
    folder = mvtec(tmp_path)
    for path in (folder / "ground_truth" / "cut").iterdir():
        path.rename(path.with_name(path.name.replace("_mask", "")))
    (folder / "test" / "cut" / "000.png").rename(folder / "test" / "cut" / "000.bmp")
    assert mask_names(categories(folder)[0])["cut", "000.bmp"] == "000.png"


def test_mvtec2(tmp_path):
    mvtec2(tmp_path)
    (can,) = categories(tmp_path)
    assert len(can.train) == 3
    assert mask_names(can) == {("bad", "000_regular.png"): "000_regular_mask.png", ("good", "000_regular.png"): None}


def test_visa_by_its_split_and_without(tmp_path):
    folder = visa(tmp_path / "split")
    expected = {("good", "0000.JPG"): None, ("good", "0005.JPG"): None, ("Anomaly", "000.JPG"): "000.png"}
    for data in (tmp_path / "split", folder):
        (candle,) = categories(data)
        assert file_names(candle.train) == ["0001.JPG", "0002.JPG", "0003.JPG", "0004.JPG"]
        assert mask_names(candle) == expected
    visa(tmp_path / "none", split=False)
    (candle,) = categories(tmp_path / "none")
    assert file_names(candle.train) == ["0000.JPG", "0001.JPG", "0002.JPG", "0003.JPG", "0005.JPG"]
    assert mask_names(candle) == {("good", "0004.JPG"): None, ("Anomaly", "000.JPG"): "000.png"}


def test_a_split_that_names_what_is_not_there(tmp_path):
    folder = visa(tmp_path)
    (folder / "Data" / "Images" / "Normal" / "0002.JPG").unlink()
    with pytest.raises(ValueError, match=r"0002\.JPG, which is not there"):
        categories(tmp_path)
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,split\n")
    (tmp_path / "split_csv" / "1cls.csv").write_text("object,split\ncandle,train\n")
    with pytest.raises(ValueError, match="has no column image, label, mask"):
        categories(tmp_path)


def test_plain_folders(tmp_path):
    """Good images beside defects; every fifth good one is tested. Masks in ``masks``, or beside the image."""
    for i in range(6):
        image(tmp_path / "good" / f"{i}.png", i)
    save_mask(tmp_path / "masks" / "scratch" / "a.png", image(tmp_path / "scratch" / "a.png", 10, defect=True))
    save_mask(tmp_path / "hole" / "b_mask.png", image(tmp_path / "hole" / "b.png", 11, defect=True))
    (category,) = categories(tmp_path)
    assert file_names(category.train) == ["0.png", "1.png", "2.png", "3.png", "5.png"]
    assert mask_names(category) == {
        ("good", "4.png"): None,
        ("hole", "b.png"): "b_mask.png",
        ("scratch", "a.png"): "a.png",
    }


def test_plain_folders_with_images_to_train_on(tmp_path):
    image(tmp_path / "train" / "good" / "0.png", 0)
    image(tmp_path / "good" / "1.png", 1)
    save_mask(tmp_path / "ground_truth" / "scratch" / "a.png", image(tmp_path / "scratch" / "a.png", 2, defect=True))
    (category,) = categories(tmp_path)
    assert file_names(category.train) == ["0.png"]
    assert mask_names(category) == {("good", "1.png"): None, ("scratch", "a.png"): "a.png"}


def test_what_is_missing_is_named(tmp_path):
    folder = mvtec(tmp_path)
    (folder / "ground_truth" / "dent" / "001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"dent/001\.png is a defect's image without a mask; expected 001_mask or 001"):
        categories(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        categories(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="known layout: MVTec AD"):
        categories(tmp_path / "empty")
    folder = mvtec(tmp_path / "untrained")
    for path in (folder / "train" / "good").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="has no normal image to fit"):
        categories(folder)


def test_masks_are_those_of_their_images(tmp_path):
    folder = mvtec(tmp_path)
    expected = image(tmp_path / "again.png", 20, defect=True)
    (category,) = categories(folder)
    samples = {(s.kind, s.path.stem): s for s in category.test}
    np.testing.assert_array_equal(samples["cut", "000"].read_mask(SIZE), expected)
    assert not samples["good", "000"].read_mask(SIZE).any()
    assert samples["cut", "000"].is_defect
    assert not samples["good", "000"].is_defect
    with pytest.raises(ValueError, match=r"000_mask\.png has 28 x 42 pixels, its image .*000\.png 28 x 43"):
        samples["cut", "000"].read_mask((28, 43))


@pytest.mark.parametrize(
    "row", ["candle,TESTS,normal,a.png,", "candle,test", "candle,test,odd,a.png,", "candle,train,normal,,"]
)
def test_a_split_with_a_wrong_row(tmp_path, row):
    visa(tmp_path)
    path = tmp_path / "split_csv" / "1cls.csv"
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(ValueError, match=r"line \d+ of .*1cls.csv must name"):
        categories(tmp_path)
