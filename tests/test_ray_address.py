"""Addresses of clusters are tried before Ray is, which needs minutes to give up."""

from __future__ import annotations

import socket

import pytest

from murf_fast._ray_address import check_address


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def free() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", [None, "auto", "local"])
def test_clusters_that_ray_finds_by_itself(address):
    check_address(address)


def test_who_listens(listener, monkeypatch):
    check_address(listener)
    check_address(f"ray://{listener}")
    monkeypatch.setenv("RAY_ADDRESS", listener)
    check_address(None)


def test_nobody_listens(monkeypatch):
    address = free()
    with pytest.raises(ValueError, match=f"^Ray: no cluster answers at {address}: "):
        check_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=rf"at {address} \(\$RAY_ADDRESS\): "):
        check_address(None)
    check_address("auto")  # what is given goes before what is set


def test_no_such_machine():
    with pytest.raises(ValueError, match=r"^Ray: no cluster answers at no-such-machine\.invalid:6379: "):
        check_address("no-such-machine.invalid:6379")


@pytest.mark.parametrize("address", ["http://foo", "foo", ":6379", "foo:port", "http://foo:80"])
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match=f"^Ray: an address is auto or HOST:PORT, got {address}$"):
        check_address(address)
