"""How long the sum of a turn takes over slow links, over the time that its bytes take them.

    python benchmarks/turn.py             # needs root: network namespaces and tc

Workers on hosts of their own, each with a delta of 3.1M parameters, and no training. A worker sends and receives
2 (k - 1) / k times the size of a delta, which takes its link a time that nothing can be faster than. Headers of
Ethernet, IP and TCP are 4% of it.
"""

import argparse
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import PrefixStore, TCPStore

from _links import INTERFACE, Host, hosts
from _workers import free_port, run_workers
from lightning_async_localsgd.codecs import ErrorFeedback, make_codec
from lightning_async_localsgd.exchange import GlooTransport
from lightning_async_localsgd.exchange.trade import Reduce
from lightning_async_localsgd.membership import Roster

RESULT = Path(__file__).parent / "results" / "turn.json"
ELEMENTS = 3_100_000
TIMEOUT = timedelta(minutes=3)


@dataclass(frozen=True)
class Config:
    hosts: tuple[Host, ...]
    port: int
    codec: str
    turns: int


def turns(rank: int, config: Config) -> list[float]:
    """Seconds of each turn, as worker ``rank``."""
    config.hosts[rank].enter()
    address, size = config.hosts[0].address, len(config.hosts)
    os.environ.update(MASTER_ADDR=address, GLOO_SOCKET_IFNAME=INTERFACE)
    store = TCPStore(address, config.port, size, rank == 0, timeout=TIMEOUT)
    roster = Roster.introduce(store, rank, size, {}, TIMEOUT)
    transport = GlooTransport(PrefixStore("turns", store), roster, TIMEOUT)
    target, delta = torch.zeros(ELEMENTS), torch.randn(ELEMENTS)
    trade = Reduce(transport, rank, target, ELEMENTS, ErrorFeedback(ELEMENTS), [1 / size] * size)
    seconds = []
    for _ in range(config.turns):
        transport.gather(b" ")  # all begin at the same time
        began = time.monotonic()
        for _ in trade.sums([range(size)], delta.clone(), make_codec(config.codec)):
            pass
        seconds.append(time.monotonic() - began)
    transport.gather(b" ")
    store.set(f"gone/{rank}", "")
    if rank == 0:
        store.wait([f"gone/{other}" for other in range(size)])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--codecs", nargs="+", default=["fp32", "int4"])
    parser.add_argument("--mbit", type=float, default=25.0, help="of every link")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for codec in args.codecs:
        for size in args.workers:
            with hosts(size, args.mbit) as made:
                found = run_workers(turns, Config(tuple(made), free_port(), codec, args.turns), size)
            bytes_each_way = 2 * (size - 1) / size * make_codec(codec).wire_bytes(ELEMENTS)
            least = bytes_each_way / (args.mbit * 1e6 / 8)
            ratios = sorted(max(of_turn) / least for of_turn in zip(*found, strict=True))
            rows.append({"codec": codec, "workers": size, "least_seconds": least, "over_least": ratios})
            print(f"{codec}, {size} workers: {', '.join(f'{r:.2f}' for r in ratios)} times {least:.2f} s", flush=True)
    RESULT.write_text(json.dumps({"mbit": args.mbit, "elements": ELEMENTS, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
