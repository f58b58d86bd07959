"""Questions to a trace: `load` it, then one function per question. Data is returned, nothing is printed or plotted.

    >>> from moempi import analysis
    >>> trace = analysis.load("demo.trace.h5")
    >>> analysis.busiest(trace).share

An array is indexed by layer of the model, expert, rank, or place in `STAGES`, as its description says.
"""

from moempi.analysis.balance import Busiest, busiest, busiest_per_layer, load_per_expert, max_over_mean
from moempi.analysis.summary import summarize
from moempi.analysis.time import clock_error, spans_per_stage, time_per_stage
from moempi.analysis.trace import Columns, Trace, load
from moempi.analysis.traffic import message_sizes, traffic_matrix
from moempi.recorder import KINDS, STAGES

__all__ = [
    "KINDS",
    "STAGES",
    "Busiest",
    "Columns",
    "Trace",
    "busiest",
    "busiest_per_layer",
    "clock_error",
    "load",
    "load_per_expert",
    "max_over_mean",
    "message_sizes",
    "spans_per_stage",
    "summarize",
    "time_per_stage",
    "traffic_matrix",
]
