"""Work dealt out to ranks by its size.

Place in the pipeline: between rewards and repairs; train.py moves whole groups with it. Ours.
"""
from dataclasses import replace


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
