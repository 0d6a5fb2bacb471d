#!/usr/bin/env bash
# Several machines: the same command on each of them, in any order, within ten minutes. The code at the same place and
# the same commit, data and run folder on storage that all of them share.
#
#   HEAD=node01 NODES=4 launch/several_nodes.sh configs/gpt_1558m.yaml [--section.key VALUE ...]
#
#   HEAD      name or address of one of the machines, as all of them (itself, too) resolve it: they meet there
#   NODES     how many machines; or MIN:MAX, to go on with those that are left when one is lost
#   PORT      on HEAD, free and open between the machines; by default 29400
#   JOB       the same on all machines, another for each job that meets at the same HEAD and PORT; by default pretrain
#   ADDRESS   how the others reach this machine, where they cannot resolve its host name
#   RANKS     processes per machine; by default one per GPU, or one if there is none
#   RESTARTS  how often ranks that died are started again, from the newest checkpoint; by default 3
# Exit code: the run's own (docs/launch.md), 75 when it was stopped and saved.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HEAD:?set HEAD to the name of one of the machines}" "${NODES:?set NODES to the number of machines}"
ranks=${RANKS:-$(python -c "import torch; print(max(torch.cuda.device_count(), 1))")}
# A node that comes into the place of a lost one would wait in vain for where rank 0 is: the node of rank 0 tells that once,
# and not at the next meeting (PyTorch 2.13, DynamicRendezvousHandler). Without a shared store it tells it each time.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec python -m launch.ranks --nnodes="$NODES" --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-3}" \
  --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-pretrain}" \
  ${ADDRESS:+--local-addr="$ADDRESS"} pretrain.py "$@"
