"""Slurm: the batch script of a job, its submission, its state, its end. Imports neither MPI nor torch.

site: what is particular to a cluster. request: what a job asks it for. script: the text that sbatch takes.
scheduler: the commands of Slurm. place: where things lie. requeue: whether a stopped job goes on.
"""
