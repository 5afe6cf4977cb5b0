"""The image files that the commands are given, by themselves and in folders."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from murf_fast import _pillow
from murf_fast._image_paths import SUFFIXES, images_below
from murf_fast._image_paths import shown as shown
from murf_fast.anomaly.detector import MultiResolutionDetector
from murf_fast.cli.demo.run import MOST_PATCHES

LISTED = 20  # broken files that are printed; files of scores hold all


@dataclass(frozen=True)
class ImageFile:
    """An image and the name of what is written for it: its path below the folder that was given, without suffix.

    ``folders`` are the names of that folder and of those below it; of a file that was given, of the one it is in.
    """

    path: Path
    name: Path
    folders: tuple[str, ...]


def find(given: Sequence[Path], console: Console) -> list[ImageFile]:
    """The images of files and folders, subfolders too. Hidden files are no images, nor is what has another suffix.

    Raises:
        ValueError: A path is not there, or none of them is or holds an image.
    """
    missing = [path for path in given if not path.exists()]
    if missing:
        raise ValueError(f"no such file or folder: {', '.join(map(shown, missing))}")
    found: list[tuple[Path, Path, tuple[str, ...]]] = []
    others = 0
    for path in given:
        if not path.is_dir():
            found.append((path, Path(path.name), (path.resolve().parent.name,)))
            continue
        images, other = images_below(path)
        others += other
        # Of several folders each keeps its name, so that equal names in them stay apart.
        own = path.resolve().name
        above = Path(own) if len(given) > 1 else Path()
        below = [p.relative_to(path) for p in images]
        found += [(p, above / b, (own, *b.parent.parts)) for p, b in zip(images, below, strict=True)]
    if not found:
        raise ValueError(f"{', '.join(map(shown, given))} holds no image ({', '.join(SUFFIXES)})")
    if others:
        console.print(f"{others} other files are left alone", markup=False)
    return _named(found)


def readable(files: list[ImageFile], skip_broken: bool, *, decode: bool) -> tuple[list[ImageFile], dict[Path, str]]:
    """Those that can be decoded (by their headers, opened), and what is wrong with the others. All are tried at once.

    Raises:
        ValueError: Files are broken and not skipped, or all are; the message names them.
    """
    surveyed = zip(files, _pillow.survey([file.path for file in files], decode=decode), strict=True)
    broken = {file.path: str(found) for file, found in surveyed if isinstance(found, Exception)}
    if broken:
        lines = list(broken.values())[:LISTED]
        more = [f"and {len(broken) - LISTED} more"] if len(broken) > LISTED else []
        text = "\n".join(shown(line) for line in (*lines, *more))
        if not skip_broken or len(broken) == len(files):
            advice = "" if skip_broken else "; --skip-broken leaves them out"
            raise ValueError(f"{len(broken)} of {len(files)} images cannot be read{advice}:\n{text}")
    return [file for file in files if file.path not in broken], broken


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tell_skipped(broken: dict[Path, str], console: Console) -> None:
    """The list at the end."""
    if broken:
        console.print(f"left out, as they cannot be read: {counted(len(broken), 'image')}", markup=False)
        for reason in list(broken.values())[:LISTED]:
            console.print(f"  {shown(reason)}", markup=False, soft_wrap=True)
        if len(broken) > LISTED:
            console.print(f"  and {len(broken) - LISTED} more", markup=False)


def grids(detector: MultiResolutionDetector, files: Iterable[ImageFile]) -> list[list[tuple[int, int]]]:
    """The patches of every image at every scale, by the headers; raises where one would run for very long."""
    found = []
    for file in files:
        of_image = detector.grids(_pillow.size(file.path), shown(file.path))
        most = max(math.prod(grid) for grid in of_image)
        if most > MOST_PATCHES:
            raise ValueError(
                f"{shown(file.path)} has {most:,} patches at the largest scale, more than {MOST_PATCHES:,}; make the "
                "banks with fewer --pixels or smaller --scales"
            )
        found.append(of_image)
    return found


def _named(found: list[tuple[Path, Path, tuple[str, ...]]]) -> list[ImageFile]:
    """Names without suffixes where these do not tell files apart. The same file given twice is one image."""
    found = list(dict.fromkeys(found))
    count = Counter(name.with_suffix("") for _, name, _ in found)
    files = [ImageFile(p, n.with_suffix("") if count[n.with_suffix("")] == 1 else n, own) for p, n, own in found]
    twice = [name for name, n in Counter(file.name for file in files).items() if n > 1]
    if twice:
        raise ValueError(f"two images have the name {shown(twice[0])}; give their folders instead")
    return files
