#!/usr/bin/env bash
# One machine, all its GPUs (or N gloo ranks on a CPU): launch/one_node.sh configs/gpt_124m.yaml [--section.key VALUE ...]
#   RANKS     processes; by default one per GPU, or one if there is none
#   RESTARTS  how often ranks that died are started again, from the newest checkpoint; by default 0
# Exit code: the run's own (docs/launch.md), 75 when it was stopped and saved.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${RANKS:-$(python -c "import torch; print(max(torch.cuda.device_count(), 1))")}
exec python -m launch.ranks --standalone --nproc-per-node="$ranks" --max-restarts="${RESTARTS:-0}" pretrain.py "$@"
