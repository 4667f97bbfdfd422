#!/usr/bin/env bash
# The GPU round that a lease of fifteen minutes holds.
#
#   bench/gpu.sh prepare [--python python3.12] [--architectures 90a]
#       Before, on a machine with a package index, nvcc and the GPU machine's version of Python: packages and the built extension,
#       into bench/wheels. git ignores that folder; name it where only tracked files are copied.
#   bench/gpu.sh OUTDIR [STAGE ...]
#       On the GPU machine: ten minutes at most. OUTDIR/all.tgz and OUTDIR/summary.txt are the whole round; `python -m bench collect
#       OUTDIR` makes results of them. The same command again goes on. --help has the options.
#   CLP_GPU_SH_DEVICE=cpu bench/gpu.sh OUTDIR
#       A rehearsal: the same stages with tiny shapes.
#
# PYTHON=python3   the interpreter, which has torch.  bench/gpu_long.sh is the round for a longer lease.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
plan=${CLP_GPU_SH_PLAN:-short}
# Results go to the folder that the caller means.
case $1 in prepare | /* | -*) ;; *) set -- "$PWD/$1" "${@:2}" ;; esac
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
if [ "$1" = prepare ]; then exec "${PYTHON:-python3}" -m bench.gpu.carried "${@:2}"; fi
exec "${PYTHON:-python3}" -m bench.gpu.round "$plan" "$@"
