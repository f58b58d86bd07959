#!/bin/bash
# Chained jobs: where a site does not allow --requeue, several jobs in a row, each going on where the last one ended.
#
#     slurm/chain.sh 3 slurm/nodes.sbatch jobs/demo.toml       three turns, with the time limit of the script each
#
# Each waits until the one before has ended, well or not (afterany). One that finds the output complete ends at once.
set -euo pipefail

turns=$1
shift
id=$(sbatch --parsable --no-requeue "$@")
echo "$id"
for _ in $(seq 2 "$turns"); do
    id=$(sbatch --parsable --no-requeue --dependency="afterany:${id%%;*}" "$@")
    echo "$id"
done
