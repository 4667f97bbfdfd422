#!/usr/bin/env bash
# The whole GPU round on a bare machine:  bench/gpu.sh OUTDIR [STAGE...]
#
# Stages (default: all): build tests sanitizer racecheck ceilings, and the groups multi_lora decode linear_logprob
# logits_logprob interpolate sampling e2e, and profile (where the time of a step goes, for some models).
# Each has a time limit, a log (OUTDIR/STAGE.log) and an exit code (OUTDIR/STAGE.rc); one that fails does not stop the others.
# A stage that succeeded is not run again; a kernel group that ran out of time goes on where it was. OUTDIR/all.tgz holds
# everything, and is unpacked first where OUTDIR holds nothing else: that is how a round goes on on another machine.
# Wheels in bench/wheels (TRL, Liger, ...) are installed without their dependencies.
#
# PYTHON=python3                 the interpreter, which has torch
# CLP_GPU_SH_SECONDS=560         start no stage later than that, and cut the running one short
# CLP_GPU_SH_PROFILED="..."      models of the stage profile (qwen2.5-0.5b qwen2.5-7b)
# CLP_GPU_SH_FLAGS="..."         more for python -m bench run: --backends triton,cuda
# CLP_SOURCE_COMMIT=...          the commit, where the sources come without their history
# CLP_GPU_SH_DEVICE=cpu          a rehearsal: the same stages on the CPU with tiny shapes, nothing installed
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${CLP_GPU_SH_DEVICE:-cuda}
deadline=$((SECONDS + ${CLP_GPU_SH_SECONDS:-1000000}))
groups="multi_lora decode linear_logprob logits_logprob interpolate sampling e2e"
every="build tests sanitizer racecheck ceilings $groups profile"
profiled=${CLP_GPU_SH_PROFILED:-qwen2.5-0.5b qwen2.5-7b}
[ "$device" = cuda ] || profiled=tiny
stages=${*:-$every}
flags="--device $device"
[ "$device" = cuda ] || flags="$flags --sizes tiny --quick --flush 4 --peers plain"

if [ -e "$out/all.tgz" ] && ! compgen -G "$out/*.rc" >/dev/null; then
    tar -xzf "$out/all.tgz" -C "$out"
fi

build() {
    if [ "$device" = cuda ]; then
        if compgen -G "bench/wheels/*.whl" >/dev/null; then
            "$python" -m pip install --no-deps --no-index bench/wheels/*.whl
        fi
        "$python" -m pip install --no-build-isolation --no-deps -e .
        nvidia-smi || true
    fi
    "$python" -m clp_engine info
    "$python" -m bench list decode --device "$device"
}

tests() {
    if [ "$device" != cuda ]; then
        "$python" -m pytest -q tests/kernels/test_backends.py
        return
    fi
    # 5: no test is marked so.
    "$python" -m pytest -q -m gpu -p no:cacheprovider || [ $? -eq 5 ]
    "$python" -m pytest -q -m "not gpu" -p no:cacheprovider tests/kernels
}

sanitizer() { sanitized memcheck; }

racecheck() { sanitized racecheck; }

sanitized() {
    if [ "$device" != cuda ]; then
        "$python" -m bench.sanitize --device cpu
        return
    fi
    local tool=compute-sanitizer
    command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
    command -v "$tool" >/dev/null || { echo "compute-sanitizer is not on this machine"; return 0; }
    # torch's caching allocator would hide an access past the end of a tensor inside its pool.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$1" --error-exitcode 9 "$python" -m bench.sanitize
}

ceilings() { "$python" -m bench ceilings $flags --out "$out/ceilings.json" --resume; }

group() {
    local budget=$2
    "$python" -m bench run "$1" $flags ${CLP_GPU_SH_FLAGS:-} --out "$out/$1.json" --resume --budget "$budget"
}

profile() {
    local model
    for model in $profiled; do
        [ ! -e "$out/$model.profile.json" ] || continue
        "$python" -m bench profile-step --device "$device" --model "$model" --steps 3 --out "$out/$model.profile.json"
    done
}

# Seconds that a stage may take.
limit_of() {
    case $1 in
        build) echo 240 ;; ceilings) echo 120 ;; linear_logprob | multi_lora | e2e) echo 530 ;; tests | sanitizer | racecheck) echo 530 ;;
        *) echo 400 ;;
    esac
}

run_stage() {
    local name=$1 limit left rc=0 start=$SECONDS
    if [ -e "$out/$name.done" ]; then
        # A finished build is of no use on another machine.
        [ "$name" = build ] && ! "$python" -c 'import clp_engine, clp_kernels' 2>/dev/null || return 0
    fi
    limit=$(limit_of "$name")
    left=$((deadline - SECONDS))
    if [ "$left" -lt 45 ]; then
        echo "$name: left for the next call"
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    case " $groups " in
        *" $name "*) set -- group "$name" $((limit - 40 > 20 ? limit - 40 : 20)) ;;
        *) set -- "$name" ;;
    esac
    # A stage is a function of this script: in a shell of its own, so that timeout can end it and all it started.
    export -f build tests sanitizer racecheck sanitized ceilings group profile
    export python device out flags profiled
    timeout --kill-after=10 "$limit" bash -euo pipefail -c '"$@"' stage "$@" >"$out/$name.log" 2>&1 || rc=$?
    echo "$rc $((SECONDS - start))" >"$out/$name.rc"
    if [ "$rc" -eq 0 ]; then touch "$out/$name.done"; else echo "$name: exit code $rc"; tail -n 5 "$out/$name.log"; fi
}

for stage in $stages; do
    case " $every " in
        *" $stage "*) run_stage "$stage" ;;
        *) echo "unknown stage $stage" >&2; exit 2 ;;
    esac
done

(cd "$out" && find . -maxdepth 1 -type f ! -name all.tgz ! -name '*.tmp' -print0 | tar -czf all.tgz --null -T -)
echo
printf '%-16s %5s %8s\n' stage exit seconds
failed=0
for stage in $stages; do
    rc=- seconds=-
    [ ! -e "$out/$stage.rc" ] || read -r rc seconds <"$out/$stage.rc"
    printf '%-16s %5s %8s\n' "$stage" "$rc" "$seconds"
    [ "$rc" = 0 ] || failed=1
done
results=()
for file in "$out"/*.json; do
    case $file in *.profile.json | *'*.json') ;; *) results+=("$file") ;; esac
done
if [ "${#results[@]}" -gt 0 ]; then
    echo
    "$python" -m bench targets "${results[@]}" || true
fi
exit $failed
