"""Following: batches of an evaluation whose forward passes wait for those of the other ranks. Worker."""

from collections.abc import Iterator
from typing import Any

from raylit.worker.peers import Peers

BORROWED = -1
"""The place of a batch that belongs to another rank."""


def followed(batches: Iterator[tuple[int, Any]], *, num_batches: float, peers: Peers) -> Iterator[tuple[int, Any]]:
    """(place, batch) pairs until no rank has any left: a rank that is through gets another's batch, so that it runs
    as many steps as they do. Collective, at each pair."""
    num_done = 0
    while True:
        place, batch = next(batches, (BORROWED, None)) if num_done < num_batches else (BORROWED, None)
        num_done += 1
        num_owners = sum(peers.gather_counts(int(place != BORROWED)))
        if num_owners == 0:
            return
        if num_owners < peers.world_size:
            offers = peers.gather_objects((place, batch))
            if place == BORROWED:
                batch = next(offer for owned, offer in offers if owned != BORROWED)
        yield place, batch
