"""Whether something listens where a cluster of Ray is said to be: Ray itself would try for minutes."""

from __future__ import annotations

import os
import socket

NO_PLACES = ("auto", "local")  # Ray's words for a cluster that it finds or starts by itself
CLIENT = "ray://"
SECONDS = 10.0


def place(address: str | None) -> str:
    """What an address, or else ``$RAY_ADDRESS``, is called in messages; empty where Ray is to find a cluster itself."""
    if address is not None:
        return "" if address in NO_PLACES else address
    given = os.environ.get("RAY_ADDRESS", "")
    return f"{given} ($RAY_ADDRESS)" if given and given not in NO_PLACES else ""


def check_address(address: str | None) -> None:
    """Raises a ValueError where the address is none, or nobody listens there."""
    where = place(address)
    if not where:
        return
    host, _, port = where.partition(" ")[0].removeprefix(CLIENT).rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise ValueError(f"Ray: an address is auto or HOST:PORT, got {where}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"Ray: no cluster answers at {where}: {error}") from error
