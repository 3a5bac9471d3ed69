"""Work spread over ranks: dealt out by its size, or taken by those that are free.

Place in the pipeline: `exchange` between rewards and repairs, `Queue` in the update. Both move whole groups.
What they bring on many GPUs: experiments/scaling.py. Ours.
"""
import json
import pickle
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

CIRCLE = 8                              # ranks that have a queue in common: a node's
PATIENCE = timedelta(minutes=30)        # how long a rank waits for another's rollouts
PIECE = 1 << 22                         # bytes; torch's store takes no more than 8 MiB at once


def work(lengths: list[int], varied: bool, chosen: bool) -> float:
    """What a group of rollouts costs from here on, in tokens: an update where its rewards differ or may come
    to differ, half as much for a repair (experiments/scaling.py measures both)."""
    return sum(lengths) * ((varied or chosen) + 0.5 * chosen)


def deal(costs: list, holders: list[int], world: int) -> list[int]:
    """Who of `world` ranks does each piece of work: the largest first, to the rank with the least so far; of
    several, to its holder. Pieces without cost stay. The longest share is then at most 4/3 of the best
    possible (Graham 1969)."""
    owners, load = list(holders), [0] * world
    for i in sorted((i for i, cost in enumerate(costs) if cost), key=lambda i: -costs[i]):
        owners[i] = min(range(world), key=lambda rank: (load[rank], rank != holders[i]))
        load[owners[i]] += costs[i]
    return owners


def exchange(ranks, places: list[int], groups: list, costs: list) -> tuple[list, list]:
    """Groups of trajectories change hands as `deal` says. places: a number of each group, unlike any other
    rank's. Returns this rank's places, ascending, and groups; the trajectories of those that came have no
    problem yet (images are not sent)."""
    known = ranks.gather([(cost, ranks.rank, place) for cost, place in zip(costs, places)])
    owners = dict(zip((place for *_, place in known), deal(*map(list, list(zip(*known))[:2]), ranks.world)))
    here = dict(zip(places, groups))
    sent = {place: [replace(t, problem=None) for t in group] for place, group in here.items()
            if owners[place] != ranks.rank}
    here.update(dict(ranks.gather(list(sent.items()))))
    mine = sorted(place for place, owner in owners.items() if owner == ranks.rank)
    return mine, [here[place] for place in mine]


class Queue:
    """Groups that any rank of a circle may update on. Each puts in its own when they are rolled out and
    repaired, and takes these first, whatever the others are at; then what others have put in and not yet
    taken. Who comes first decides who adds a gradient to which sum: runs are equal up to rounding only."""

    def __init__(self, ranks):
        start = ranks.rank // CIRCLE * CIRCLE
        self.ranks = min(CIRCLE, ranks.world - start)
        self.store, self.keys = dist.PrefixStore(f"circle {start}", ranks.store), []

    def put(self, key: str, value: bytes):
        self.store.set(key, value)
        self.keys.append(key)

    def take(self, name: str, own: list):
        """own: this rank's rows (place, trajectory) for the update `name`. Yields lists of such rows, of one
        place each; those of all ranks hold each row once. All must be through with the update before."""
        for key in self.keys:
            self.store.delete_key(key)
        self.keys, groups = [f"{name} lists"], {}
        for place, t in own:
            bare = replace(t, text="", problem=None, parent=None, steps=None, checks=None)  # no image is sent
            groups.setdefault(place, []).append((place, bare))
        order, sizes = sorted(groups, key=lambda place: -sum(len(t.ids) for _, t in groups[place])), []
        for place in order:
            data = pickle.dumps(groups[place])
            sizes.append(len(data))
            for at in range(0, len(data), PIECE):
                self.put(f"{name} group {place} {at}", data[at:at + PIECE])
            self.keys.append(f"{name} taken {place}")
        n = self.store.add(f"{name} lists", 1)
        self.put(f"{name} list {n}", json.dumps([*zip(order, sizes)]).encode())
        first = lambda place: self.store.add(f"{name} taken {place}", 1) == 1
        yield from (groups[place] for place in order if first(place))
        for n in range(1, self.ranks + 1):                              # in the order in which they came
            self.store.wait([f"{name} list {n}"], PATIENCE)
            for place, size in json.loads(self.store.get(f"{name} list {n}")):
                if place not in groups and first(place):
                    pieces = [self.store.get(f"{name} group {place} {at}") for at in range(0, size, PIECE)]
                    yield pickle.loads(b"".join(pieces))                # of this job's own processes
