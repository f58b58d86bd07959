"""What a rank's time is spent on, and the kinds of messages: the words of the trace.

The place of a word in its table is its number in the files.
"""

from __future__ import annotations

# Leaf stages follow each other without gap or overlap: those of a rank add up to its wall time. Containers lie
# across them: a microbatch's step, its wait for answers, the time in which experts had rows.
CONTAINERS = ("step", "wait", "loaded")
LEAVES = (
    "compose",  # take sequences in, put the next step together, note the tokens that the last one chose
    "embed",
    "project",  # attention's products: queries, keys and values in, output out
    "attend",  # scores and mixing
    "dense",  # a layer without experts
    "gate",
    "pack",  # plan a dispatch and put its rows in order
    "dispatch",  # post one message of rows
    "combine",
    "head",  # logits and the choice of tokens
    "expert",  # one expert call
    "answer",  # post one answer
    "relay",  # post one message between relays, or bring a home what came back; only with relays
    "receive",  # a look at the network that found something
    "poll",  # one that found nothing, while there was other work
    "control",  # messages of the router; on rank 0 the router; handing over parts of the trace
    "exposed",  # nothing to do while dispatches are unanswered: own ones, and those that the rank relays
    "barrier",  # nothing to do until all ranks meet; only with exchange.lockstep
    "idle",  # nothing to do at all
)
STAGES = CONTAINERS + LEAVES
(
    STEP, WAIT, LOADED,
    COMPOSE, EMBED, PROJECT, ATTEND, DENSE, GATE, PACK, DISPATCH, COMBINE, HEAD, EXPERT, ANSWER,
    RELAY, RECEIVE, POLL, CONTROL, EXPOSED, BARRIER, IDLE,
) = range(len(STAGES))  # fmt: skip
FIRST_LEAF = len(CONTAINERS)

# Of the step that something belongs to. Prefill: it holds tokens whose next token is not asked for.
PHASES = ("other", "prefill", "decode")
OTHER, PREFILL, DECODE = range(len(PHASES))

# Kinds of messages: each hop of a row counts once. Only relays have the last four.
KINDS = (
    "dispatch",  # to the rank of a slot
    "answer",  # and back
    "collect",  # home to its node's relay
    "relay",  # relay to relay, between nodes
    "return",  # and back
    "deliver",  # relay to home
)
DISPATCH_KIND, ANSWER_KIND, COLLECT_KIND, RELAY_KIND, RETURN_KIND, DELIVER_KIND = range(len(KINDS))

StepKey = tuple[int, int, int]  # (microbatch, step, phase)
NO_STEP: StepKey = (-1, -1, OTHER)
