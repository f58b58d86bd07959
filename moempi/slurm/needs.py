"""What the plan of a job says of its needs. Loads torch when it is asked, as every plan does."""

from __future__ import annotations

from moempi.job import Job
from moempi.model.config import ModelConfig
from moempi.planning.gpu_memory import host_bytes
from moempi.planning.memory import trace_bytes
from moempi.slurm.request import Needs


def needs_of(job: Job, n_ranks: int, shards: int = 1, *, gpus: bool) -> Needs:
    """Read and check all that the job names, and plan it on `n_ranks` ranks; of an array one shard is counted.

    Args:
        gpus: whether the nodes have some, whatever this one has: a job that leaves its device open takes them, or none.

    Raises:
        MoempiError: whatever would stop the run before it starts.
    """
    from moempi.prepare import look

    if job.run.device == "auto":
        device = "cuda" if gpus else "cpu"
        job = job.model_copy(update={"run": job.run.model_copy(update={"device": device})})
    found = look(job, n_ranks)
    layout, fullest = found.shape.layout, max(found.shape.layout.memory, key=lambda plan: plan.total)
    rank_bytes, gpu_bytes = fullest.total, 0
    if layout.device == "cuda":  # then the plan is about its memory
        messages = max(plan.message_bytes for plan in layout.memory)
        rank_bytes = host_bytes(found.shape.config, found.shape.dtype.itemsize, messages, job.exchange.gpu_aware)
        rank_bytes += trace_bytes(job.trace.level)
        gpu_bytes = fullest.total
    return Needs(
        rank_bytes=rank_bytes,
        gpu_bytes=gpu_bytes,
        weight_bytes=max(plan.shared_bytes + plan.expert_bytes for plan in layout.memory),
        layers=found.shape.config.n_layers,
        flops_per_token=flops_per_token(found.shape.config),
        prompt_tokens=-(-sum(map(len, found.prompts.tokens)) // shards),
        new_tokens=-(-sum(found.new_tokens) // shards),
        longest_new=max(found.new_tokens, default=0),
        places=job.run.capacity * len(layout.homes),
    )


def flops_per_token(config: ModelConfig) -> float:
    """Two operations for every weight that a token meets; attention over its past is left out."""
    d = config.d_model
    attention = config.n_layers * 2 * d * (config.n_heads + config.n_kv_heads) * config.head_dim
    dense = len(config.dense_layers) * 3 * d * config.dense_hidden
    experts = len(config.moe_layers) * (config.top_k * 3 * d * config.expert_hidden + config.n_experts * d)
    return 2.0 * (attention + dense + experts + config.vocab * d)
