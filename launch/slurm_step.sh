# shellcheck shell=bash
# For the batch scripts beside it: `. launch/slurm_step.sh`, then `run_step SRUN_ARGUMENT...`
# Runs srun and ends the job with its exit code, which is the highest one of its tasks. A run that was stopped and has saved
# (75) is put back into the queue.
run_step() {
  # In the background: bash runs traps while it waits for a job, not while one is in the foreground. srun passes SIGUSR1
  # on to its tasks, but takes SIGTERM as an order to kill them. A task that is done must not have the others killed while
  # they still write; when a rank dies, the others notice by themselves.
  srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0 "$@" &
  local step=$! code=0
  # shellcheck disable=SC2064 # the number of this step
  trap "kill -USR1 $step || true" USR1 TERM
  wait "$step" || code=$?
  while kill -0 "$step" 2> /dev/null; do # a signal ended the wait, not the step
    code=0
    wait "$step" || code=$?
  done
  if [ "$code" -eq 75 ]; then
    echo "job $SLURM_JOB_ID was stopped and goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" || echo "it cannot: submit it again to go on"
  fi
  exit "$code"
}
