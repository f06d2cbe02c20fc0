"""Workers listen where the others can reach them."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore

from lightning_async_localsgd.membership.address import Route, choose_addresses, route_to


def test_a_worker_listens_at_the_near_end_of_its_way_to_the_store() -> None:
    routes = [Route("10.0.0.1", "10.0.0.1"), Route("10.0.0.2", "10.0.0.1"), Route("fd00::3", "fd00::1")]
    assert choose_addresses(routes) == ["10.0.0.1", "10.0.0.2", "fd00::3"]


def test_on_the_host_of_the_store_it_listens_where_the_others_see_that_host() -> None:
    here, elsewhere = Route("127.0.0.1", "127.0.1.1"), Route("10.0.0.2", "10.0.0.1")
    assert choose_addresses([here, here, elsewhere]) == ["10.0.0.1", "10.0.0.1", "10.0.0.2"]


def test_on_one_host_the_loopback_interface_is_enough() -> None:
    assert choose_addresses([Route("127.0.0.1", "127.0.0.1"), Route("::1", "::1")]) == ["127.0.0.1", "::1"]


def test_where_the_user_names_the_interface_or_the_store_has_no_address_gloo_chooses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert route_to(PrefixStore("a", PrefixStore("b", store))) == Route("127.0.0.1", "127.0.0.1")
    assert route_to(dist.HashStore()) == Route(None, None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert route_to(store) == Route(None, None)
    assert choose_addresses([Route(None, None), Route("10.0.0.2", "10.0.0.1")]) == [None, "10.0.0.2"]
