"""One encoded image of a source, and all of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

FILE, TAR, PARQUET = "file", "tar", "parquet"


class Item(NamedTuple):
    """Where the bytes of an image lie.

    Attributes:
        name: What it is called in results; no two of a source have one name.
        kind: ``"file"``, ``"tar"`` or ``"parquet"``.
        path: The file that holds it.
        at: First byte of a tar's member, row group of a table; 0 of a file.
        count: Bytes of a file or a member; the row within its group of a table.
    """

    name: str
    kind: str
    path: str
    at: int
    count: int  # type: ignore[assignment]  # a tuple counts


@dataclass(frozen=True)
class Source:
    """The images in their order, and what else tells one source from another.

    Attributes:
        others: Files that are no images and are left alone.
        column: Of a table's images.
        told: Names and sizes of files that hold many.
    """

    items: list[Item]
    others: int = 0
    column: str | None = None
    told: list[tuple[str, int]] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Of names, order and sizes, wherever the source lies; pixels are not looked at."""
        digest = hashlib.sha256(repr((self.column, self.told)).encode())
        for item in self.items:
            digest.update(repr((item.name, item.kind, item.at, item.count)).encode(errors="surrogatepass"))
        return digest.hexdigest()
