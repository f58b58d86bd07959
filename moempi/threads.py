"""How many threads a rank computes with, and how they wait.

Nothing here imports torch or numpy: their thread pools read the environment once, when they are first imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, MutableMapping

# A waiting thread sleeps instead of spinning: with two ranks of two threads on two cores that alone is a factor of
# three, with eight ranks a factor of eight.
_ALWAYS = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

# Pools start small in a rank; once the ranks of the node know each other, the run raises the number to its share.
_IN_A_RANK = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def set_environment(environ: MutableMapping[str, str], in_a_rank: bool) -> None:
    """Set what thread pools read at start-up; what the user has set stays. Call before torch or numpy is imported."""
    for name, value in (_ALWAYS | _IN_A_RANK if in_a_rank else _ALWAYS).items():
        environ.setdefault(name, value)


def fair_share(cores: Iterable[Iterable[int]], rank: int) -> int:
    """Threads for one rank of a node, so that all ranks of the node together use each core once.

    Args:
        cores: for every rank of the node, in rank order, the cores that it may run on (`os.sched_getaffinity(0)`,
            gathered); overlapping where the launcher binds nothing, disjoint where it binds.
        rank: which of them asks.

    Returns:
        Whole threads, at least 1; a core that m ranks may use counts 1/m.
    """
    return max(1, int(share_of_cores(cores, rank)))


def share_of_cores(cores: Iterable[Iterable[int]], rank: int) -> float:
    """The cores that one rank of a node has if all its ranks take equal parts; under 1 where ranks share a core."""
    allowed = [frozenset(each) for each in cores]
    users = Counter(core for each in allowed for core in each)
    # Ranks with the same cores are the usual case; the small term keeps 3 x 1/3 from falling under 1.
    return sum(1 / users[core] for core in allowed[rank]) + 1e-9
