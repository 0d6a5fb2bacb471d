#!/usr/bin/env bash
# One machine, all its GPUs (or N gloo ranks on a CPU): launch/one_node.sh configs/gpt_124m.yaml [--section.key VALUE ...]
# RANKS sets the number of processes; by default one per GPU, or one if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=${RANKS:-$(python -c "import torch; print(max(torch.cuda.device_count(), 1))")}
exec torchrun --standalone --nproc_per_node="$ranks" pretrain.py "$@"
