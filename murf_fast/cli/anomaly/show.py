"""``murf-fast anomaly show``: what a saved detector is, without its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from murf_fast.anomaly import _description, _files
from murf_fast.anomaly._growing import unfinished
from murf_fast.cli.anomaly._configuration import described
from murf_fast.cli.anomaly._cost import in_bytes
from murf_fast.cli.anomaly._images import counted, shown
from murf_fast.cli.anomaly.fit import tell_range


def show(bank: Path, as_json: bool, console: Console) -> None:
    """Prints the index of a saved detector; rows are not read."""
    told = _description.told(_files.folder_of(bank))
    if not told["intact"]:
        raise ValueError(f"{shown(bank)}: the index is damaged, its checksum is another")
    if as_json:
        plain = {**told, "rules": dataclasses.asdict(told["rules"]), "normal": _plain(told["normal"])}
        console.file.write(json.dumps(plain, indent=1) + "\n")
        return
    rows, size = (
        sum(b["shape"][0] for b in told["banks"]),
        sum((bank / b["file"]).stat().st_size for b in told["banks"]),
    )
    lines = [
        f"{counted(told['images'], 'image')}, {counted(len(told['banks']), 'bank')}, {rows:,} rows, {in_bytes(size)}",
        f"model: {told['model'] or 'not told'}, {told['type'] or 'type not told'}, {told['fingerprint'][:12]}",
        *described(told),
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True, highlight=False)
    tell_range(told["normal"], console)
    if (bank / _files.UNFINISHED).exists():
        done = unfinished(bank)["images"]
        console.print(f"an addition stopped after {counted(done, 'image')}: `murf-fast anomaly add --resume` goes on")


def _plain(normal: Any) -> dict[str, Any] | None:
    return None if normal is None else dataclasses.asdict(normal)
