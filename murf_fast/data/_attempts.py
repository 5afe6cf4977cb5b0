"""What a worker has at hand, on disk while it has, so that the worker after it knows what it died of.

An image that takes its worker down, beyond what decoders of their own catch, would do so for ever, as its shard is
given out again. A batch that ``DEATHS`` workers died of is looked at image by image; an image that as many died of by
itself is given up, and so is a whole batch that one more dies of though none of its images is to blame.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from murf_fast._files import PART, read_json
from murf_fast.data._records import DAMAGES, record_name

FOLDER = "attempts"
DEATHS = 2


class Attempts:
    """Those at one shard.

    Args:
        folder: Of the extraction; what is kept lies in ``attempts``, and goes with :func:`forget`.
        shard: Its number.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self._path = folder / FOLDER / record_name(shard)
        self._deaths: dict[str, int] = {}
        self._given_up: dict[int, str] = {}
        with contextlib.suppress(FileNotFoundError):
            self._read()

    @property
    def is_first(self) -> bool:
        """Whether no worker died of the shard yet."""
        return not self._deaths

    def given_up(self, position: int) -> str | None:
        """Why an image of the shard is no longer tried; None: it is."""
        return self._given_up.get(position)

    def one_by_one(self, positions: Sequence[int]) -> bool:
        """Whether the images at these positions are to be tried by themselves before they are together."""
        return self._deaths.get(_key(positions), 0) >= DEATHS

    def begin(self, positions: Sequence[int]) -> None:
        """Notes what is at hand from here on."""
        self._path.parent.mkdir(exist_ok=True)
        given_up = [[position, reason] for position, reason in self._given_up.items()]
        content = {"at": list(positions), "deaths": self._deaths, "given_up": given_up}
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}{PART}")
        part.write_text(json.dumps(content))
        os.replace(part, self._path)

    def end(self) -> None:
        """The shard is done, or what ended it is no death."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            told = read_json(self._path.parent, self._path.name)
            at, deaths, given_up = told["at"], dict(told["deaths"]), {int(p): str(r) for p, r in told["given_up"]}
        except FileNotFoundError:
            raise
        except DAMAGES:
            return  # the shard is tried as if for the first time
        key = _key(at)
        deaths[key] = deaths.get(key, 0) + 1
        self._deaths, self._given_up = deaths, given_up
        if len(at) == 1 and deaths[key] >= DEATHS:
            given_up[at[0]] = f"{deaths[key]} workers died of it"
        elif deaths[key] > DEATHS:
            given_up.update(dict.fromkeys(at, f"{deaths[key]} workers died of its batch, and of none of its images"))


def forget(folder: Path) -> None:
    """All that was noted of an extraction: deaths count within one run."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


def _key(positions: Sequence[int]) -> str:
    return " ".join(map(str, positions))
