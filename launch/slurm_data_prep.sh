#!/usr/bin/env bash
# Prepare a corpus as a SLURM array job: each task does its share of the units, a last one completes the dataset.
# The folder of the output must be shared by all nodes. The bytes are those of one machine; run it again to go on.
#
#   launch/slurm_data_prep.sh 16 INPUT... --output DIR [--tokenizer NAME] [...]
set -euo pipefail
tasks=$1
shift
arguments=$(printf '%q ' "$@")

array=$(sbatch --parsable --job-name data-prep --array "0-$((tasks - 1))" --cpus-per-task 8 --requeue \
  --wrap "python data_prep.py $arguments --workers 8 --share \$SLURM_ARRAY_TASK_ID/$tasks")
# afterany: what a failed task left undone, the last one does
sbatch --job-name data-prep-end --dependency "afterany:$array" --cpus-per-task 8 --requeue \
  --wrap "python data_prep.py $arguments --workers 8"
