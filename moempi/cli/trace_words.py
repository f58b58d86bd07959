"""What a trace comes to, in a few sentences, as they stand above the tables of `moempi trace summary`."""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]  # of `moempi.analysis.summarize`


def conclusion(found: Found) -> list[str]:
    """How busy the experts were, what went by with nothing to do, which expert stands out; as far as it is known."""
    return [sentence for sentence in (_experts(found), _idle(found), _busiest(found)) if sentence]


def _experts(found: Found) -> str:
    computed, could = (_share(found, name) for name in ("experts_computed", "experts_had_rows"))
    if computed is None or could is None:
        return ""
    if _on_gpus(found):
        return f"Experts had rows, or were computing, in {could:.0%} of the ranks' time."
    return f"Experts computed in {computed:.0%} of the ranks' time, and had rows in {could:.0%}."


def _idle(found: Found) -> str:
    shares = {"answers": "exposed_share", "work": "idle_share", "all ranks to meet": "barrier_share"}
    known = {what: _share(found, name) or 0.0 for what, name in shares.items()}
    # The host of a GPU waits for that as well, while the GPU computes.
    if sum(known.values()) < 0.005 or _on_gpus(found):
        return ""
    parts = [f"{share:.0%} for {what}" for what, share in known.items() if share >= 0.005]
    exposed: dict[int, float] = {}
    for row in found["waits"]:
        exposed[row["peer"]] = exposed.get(row["peer"], 0.0) + row["exposed_seconds"]
    most = max(exposed, key=lambda peer: exposed[peer], default=None)
    whose = f"; rank {most} was waited for most" if most is not None and known["answers"] >= 0.005 else ""
    return f"{sum(known.values()):.0%} went by with nothing to do but wait: {', '.join(parts)}{whose}."


def _busiest(found: Found) -> str:
    layers = [row for row in found["load"] if row["tokens"]]
    if not layers:
        return ""
    row = max(layers, key=lambda row: row["max_over_mean"])
    return (
        f"The busiest expert, {row['busiest_expert']} of layer {row['layer']}, got {row['max_over_mean']:.1f} times "
        f"the mean of its layer."
    )


def _on_gpus(found: Found) -> bool:
    return str(found["run"].get("device", "")).startswith("cuda")


def _share(found: Found, name: str) -> float | None:
    """Mean over all ranks, weighted by their wall time; None where no rank knows it."""
    known = [(row[name], row["wall_seconds"]) for row in found["ranks"] if row[name] is not None]
    whole = sum(wall for _, wall in known)
    return sum(share * wall for share, wall in known) / whole if whole else None
