"""Questions to a trace: `load` it, then one function per question. Data is returned, nothing is printed or plotted.

    >>> from moempi import analysis
    >>> trace = analysis.load("demo.trace.h5")
    >>> analysis.busiest(trace).share

An array is indexed by layer of the model, expert, rank, or place in `STAGES`, as its description says.
"""

from moempi.analysis.balance import Busiest, busiest, busiest_per_layer, load_per_expert, max_over_mean
from moempi.analysis.check import disagreements
from moempi.analysis.summary import summarize
from moempi.analysis.time import (
    clock_error,
    coverage,
    expert_utilisation,
    idle_shares,
    spans_per_stage,
    steps_per_phase,
    time_per_stage,
    tokens_per_stage,
    wall_time,
)
from moempi.analysis.trace import Columns, Trace, load
from moempi.analysis.traffic import message_sizes, node_matrix, received_matrix, size_histogram, traffic_matrix
from moempi.analysis.waits import waits_matrix
from moempi.stages import CONTAINERS, FIRST_LEAF, KINDS, LEAVES, PHASES, STAGES

__all__ = [
    "CONTAINERS",
    "FIRST_LEAF",
    "KINDS",
    "LEAVES",
    "PHASES",
    "STAGES",
    "Busiest",
    "Columns",
    "Trace",
    "busiest",
    "busiest_per_layer",
    "clock_error",
    "coverage",
    "disagreements",
    "expert_utilisation",
    "idle_shares",
    "load",
    "load_per_expert",
    "max_over_mean",
    "message_sizes",
    "node_matrix",
    "received_matrix",
    "size_histogram",
    "spans_per_stage",
    "steps_per_phase",
    "summarize",
    "time_per_stage",
    "tokens_per_stage",
    "traffic_matrix",
    "waits_matrix",
    "wall_time",
]
