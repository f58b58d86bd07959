"""moempi: Mixture-of-Experts language models as an MPI batch job, one expert per rank."""

__version__ = "0.1.0"
