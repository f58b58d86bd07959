"""How Slurm bound GPUs to ranks, read from the environment that it leaves."""

from __future__ import annotations

from collections.abc import Mapping


def hidden_gpus(environ: Mapping[str, str], ranks_on_node: int) -> str:
    """What to warn of where a rank sees one GPU and its neighbours others; "" where all see the same.

    Args:
        environ: of one rank.
        ranks_on_node: ranks that share its node.
    """
    visible = [one for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    on_node = environ.get("SLURM_GPUS_ON_NODE", "")
    if len(visible) != 1 or ranks_on_node == 1 or on_node in ("", "1"):
        return ""
    return (
        f"this rank sees 1 of {on_node} GPUs of its node and shares the node with {ranks_on_node - 1} other ranks: "
        "GPUs that are hidden cannot be sent to directly. Ask Slurm for --gpus-per-node and --gpu-bind=none instead of "
        "--gpus-per-task or another --gpu-bind; every rank then takes the GPU of its number"
    )
