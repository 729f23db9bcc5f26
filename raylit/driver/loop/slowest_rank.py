"""Finding of the rank that holds the others up by its own work. Driver."""

from collections.abc import Sequence
from statistics import median

from raylit.protocol.messages import RankTimes

_LEAST_SHARE = 0.2
"""A rank is named if its own work takes at least this share longer than the others'."""
_LEAST_LOST_S = 0.1
"""A rank is not named if it has held the others up for less in an interval: that much happens by chance."""


def describe_slowest_rank(ranks: Sequence[RankTimes]) -> str:
    """Describe the rank that is more than 20 % behind the median of the others by its own work, or return "".

    A rank's own work is the time of the interval outside of backward passes, and the shortest time that any rank has
    spent in backward passes: the ranks wait for each other's gradients there, and the rank that is waited for waits
    least itself. Where ranks wait elsewhere, too, as in the forward passes of FSDP or in hooks with collectives, that
    wait counts as own work and makes the ranks alike. On a GPU these are host times: a rank with slow data is found,
    one whose GPU computes slowly is not.
    """
    if len(ranks) < 2:
        return ""
    shared_s = min(rank.backward_s for rank in ranks)
    own_s = [rank.elapsed_s - rank.backward_s + shared_s for rank in ranks]
    slowest = max(range(len(ranks)), key=own_s.__getitem__)
    others = [index for index in range(len(ranks)) if index != slowest]
    usual_s = median(own_s[index] for index in others)
    lost_s = own_s[slowest] - usual_s
    if lost_s < max(_LEAST_LOST_S, _LEAST_SHARE * usual_s):
        return ""
    wait_s = ranks[slowest].data_wait_s - median(ranks[index].data_wait_s for index in others)
    cause = "data wait" if wait_s > lost_s / 2 else "compute"
    return f"rank {slowest} +{lost_s / max(usual_s, 1e-9):.0%} {cause}"
