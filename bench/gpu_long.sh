#!/usr/bin/env bash
# The whole GPU round, for a lease of hours: every test that needs a GPU, every case with every peer, tuning, the demo's front,
# compute-sanitizer's memcheck and racecheck.
#
#   bench/gpu_long.sh OUTDIR [STAGE[:SECONDS[:LIMIT]] ...] [--seconds S] [--from ALL_TGZ]
#
# Without names of stages: what targets are judged by first, then everything. SECONDS is what a stage may measure, LIMIT when it
# is stopped, --seconds when the round is. The same command goes on, on another machine with --from. The rest is as bench/gpu.sh
# says, which also prepares what the machine needs.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
CLP_GPU_SH_PLAN=long exec "$(dirname "$0")/gpu.sh" "$@"
