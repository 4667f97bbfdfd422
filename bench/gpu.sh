#!/usr/bin/env bash
# The whole GPU round on a bare machine:  bench/gpu.sh OUTDIR [STAGE[:SECONDS[:LIMIT]]...]
# Before it, where the index is within reach:  bench/gpu.sh wheels
#
# Stages: build tests ceilings, the groups of bench/README.md, docsum (the demo's front beside the CPU's), counters (ncu),
# kernel_tests engine_tests traced_tests (tests has the quickest), sanitizer and racecheck (compute-sanitizer), tune,
# and profile (where the time of a step goes). Without names the plan below: what targets are judged by first, in one call of
# some nine minutes, then the rest; the same call again goes on. Each stage has a log (OUTDIR/STAGE.log) and an exit code
# (OUTDIR/STAGE.rc); one that fails does not stop the others. SECONDS is a group's budget, after which it begins no case, LIMIT
# when a stage is stopped. What it had done by then is kept, and a stage that succeeded is not run again. After each stage
# everything is in OUTDIR/all.tgz, which is unpacked first where OUTDIR holds nothing else: that is how a round goes on on
# another machine. `python -m bench collect OUTDIR` then makes results of it.
#
# PYTHON=python3                 the interpreter, which has torch
# CLP_GPU_SH_SECONDS=560         start no stage later than that, and cut the running one short
# CLP_GPU_SH_FROM=FILE           an archive to go on from, where OUTDIR has none
# CLP_GPU_SH_SHIP=DIR            copy all.tgz and summary.txt there after each stage: two files hold a whole round
# CLP_GPU_SH_PROFILED="..."      models of the stage profile (qwen2.5-0.5b qwen2.5-7b)
# CLP_GPU_SH_FLAGS="..."         more for python -m bench run: --backends triton,cuda
# CLP_SOURCE_COMMIT=...          the commit, where the sources come without their history (else of bench/wheels/COMMIT)
# CLP_GPU_SH_DEVICE=cpu          a rehearsal: the same stages on the CPU with tiny shapes, nothing installed
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,22s/^# \{0,1\}//p' "$0"; exit 2; }
python=${PYTHON:-python3}
device=${CLP_GPU_SH_DEVICE:-cuda}

# One number for the sources, so that a commit's name can travel with a copy that has no history.
digest() {
    find bench clp_engine kernels csrc tests CMakeLists.txt pyproject.toml -type f ! -path 'bench/wheels/*' ! -name '*.so' \
        ! -name '*.pyc' ! -name '*.json' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
}

# What the peers need beside torch, transformers, accelerate, pandas, pyarrow and xxhash, and the commit.
wheels() {
    mkdir -p bench/wheels
    rm -f bench/wheels/*.whl
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d bench/wheels \
        trl==1.16.0 peft datasets 'dill<0.4.2' 'multiprocess<0.70.20' liger-kernel cut-cross-entropy
    echo "$(git describe --always --dirty --abbrev=40 --exclude='*') $(digest)" >bench/wheels/COMMIT
    ls -l bench/wheels
    local size
    size=$(du -sm bench/wheels | cut -f1)
    [ "$size" -le 55 ] || { echo "bench/wheels has $size MiB; expected at most 55" >&2; return 1; }
    missing_needs
}

# Fails where a wheel needs a package that is neither another wheel nor known to be with torch on the machine.
missing_needs() {
    "$python" - bench/wheels <<'EOF'
import email, re, sys, zipfile
from pathlib import Path

there = set("""torch triton transformers accelerate pandas pyarrow xxhash filelock numpy tqdm fsspec huggingface-hub packaging
pyyaml psutil safetensors jinja2""".split())
needs = {}
for path in Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(path) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(wheel.read(name).decode())
    there.add(metadata["Name"].lower().replace("_", "-"))
    needs[path.name] = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
missing = [f"{wheel} needs {line}" for wheel, lines in needs.items() for line in lines
           if re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") not in there]
sys.exit("\n".join([*missing, "name it in wheels() of bench/gpu.sh"]) if missing else 0)
EOF
}

if [ "$1" = wheels ]; then
    cd "$(dirname "$0")/.."
    wheels
    exit
fi

out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
from=${CLP_GPU_SH_FROM:+$(realpath "$CLP_GPU_SH_FROM")}
cd "$(dirname "$0")/.."
deadline=$((SECONDS + ${CLP_GPU_SH_SECONDS:-1000000}))
groups="multi_lora decode linear_logprob logits_logprob interpolate sampling e2e rollout"
every="build tests ceilings $groups docsum counters kernel_tests engine_tests traced_tests sanitizer racecheck tune profile"
# First the targets' own shapes (a budget begins with them), in 560 seconds; then everything.
plan="build:170 tests:70 linear_logprob:60:100 multi_lora:35:60 decode:35:50 interpolate:25:45 e2e:20:200 rollout:30:90
docsum:240 ceilings:60 kernel_tests:400 engine_tests:200 counters:200 sanitizer:300 logits_logprob:60 sampling:60 tune:300
traced_tests:400 racecheck:400
linear_logprob:300 multi_lora:300 decode:200 interpolate:150 e2e:400 rollout:200 logits_logprob:150 sampling:100 profile:300"
jobs=$(($(nproc) > 2 ? $(nproc) / 2 : 1))
profiled=${CLP_GPU_SH_PROFILED:-qwen2.5-0.5b qwen2.5-7b}
flags="--device $device"
if [ "$device" != cuda ]; then
    profiled=tiny
    flags="$flags --sizes tiny --quick --flush 4 --peers plain"
fi

if ! compgen -G "$out/*.rc" >/dev/null; then
    if [ -e "$out/all.tgz" ]; then from=$out/all.tgz; fi
    if [ -n "${from:-}" ]; then tar -xzf "$from" -C "$out"; fi
fi
# One folder holds one device's results.
name=$device
if [ "$device" = cuda ]; then name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1) || true; fi
if [ -e "$out/device" ] && [ "$(cat "$out/device")" != "$name" ]; then
    out=$out/$(tr -c 'A-Za-z0-9\n' '-' <<<"$name")
    echo "this is $name; its results go to $out"
    mkdir -p "$out"
fi
echo "$name" >"$out/device"
if [ -z "${CLP_SOURCE_COMMIT:-}" ] && ! git rev-parse HEAD >/dev/null 2>&1 && [ -e bench/wheels/COMMIT ]; then
    read -r CLP_SOURCE_COMMIT sources <bench/wheels/COMMIT
    [ "$sources" = "$(digest)" ] || CLP_SOURCE_COMMIT=${CLP_SOURCE_COMMIT%-dirty}-dirty
    export CLP_SOURCE_COMMIT
fi

build() {
    if [ "$device" = cuda ]; then
        if compgen -G "bench/wheels/*.whl" >/dev/null; then
            "$python" -m pip install --no-deps --no-index bench/wheels/*.whl
        fi
        # nvcc compiles one GPU generation after the other, unless it may have threads.
        "$python" -m pip install --no-build-isolation --no-deps -e . -C cmake.define.CMAKE_CUDA_FLAGS=--threads=4
        nvidia-smi || true
    fi
    "$python" -m clp_engine info
    "$python" -m bench list decode --device "$device"
}

# What a kernel's user meets first: graphs, streams, the same bits again, decoding.
tests() { pytest_gpu "gpu and not traced" tests/kernels/test_{gpu_kernels,cuda_decode,decode_step}.py; }

kernel_tests() { pytest_gpu "gpu and not traced" tests/kernels; }

engine_tests() { pytest_gpu "gpu and not traced" tests/engine; }

# torch.compile, which takes seconds for each.
traced_tests() { pytest_gpu "gpu and traced"; }

pytest_gpu() {
    local parallel=""
    if [ "$device" != cuda ]; then
        "$python" -m pytest -q tests/kernels/test_backends.py
        return
    fi
    if "$python" -c "import xdist" 2>/dev/null; then parallel="-n $jobs --dist loadfile"; fi
    # 5: no test is marked so.
    "$python" -m pytest -q -m "$1" -p no:cacheprovider $parallel "${@:2}" || [ $? -eq 5 ]
}

sanitizer() { sanitized memcheck 1; }

# Racecheck is slower, and looks at shared memory alone: every other check.
racecheck() { sanitized racecheck 2; }

# The ops are independent processes: most of their time is compiling, on the host.
sanitized() {
    if [ "$device" != cuda ]; then
        "$python" -m bench.gpu.sanitize --device cpu --thin 25 sample_tokens slerp ema_ sparsify --record "$out/$1.all.record.json"
        return
    fi
    tool=compute-sanitizer
    command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/compute-sanitizer
    command -v "$tool" >/dev/null || { echo "compute-sanitizer is not on this machine"; return 0; }
    export tool
    { "$python" -m bench.gpu.sanitize --list && echo graphs && echo candidates; } | xargs -P "$jobs" -I{} bash -euo pipefail -c 'sanitized_op "$@"' op "$1" "$2" {} ||
        { tail -n 3 "$out/$1".*.log; return 1; }
    "$python" -m bench.gpu.sanitize --judge "$out/$1".*.record.json --thin "$2"
}

sanitized_op() {
    local log=$out/$1.$3.log what=$3
    [ ! -e "$out/$1.$3.right" ] || return 0
    # torch's caching allocator would hide an access past the end of a tensor inside its pool; graphs cannot do without it.
    if [ "$3" = graphs ]; then what=--graphs; else export PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi
    if [ "$3" = candidates ]; then what=--candidates; fi
    TORCHINDUCTOR_COMPILE_THREADS=1 "$tool" --tool "$1" --error-exitcode 9 \
        "$python" -m bench.gpu.sanitize "$what" --thin "$2" --record "$out/$1.$3.record.json" >"$log" 2>&1 || return 1
    touch "$out/$1.$3.right"
    tail -n 1 "$log"
}

ceilings() { "$python" -m bench ceilings $flags --out "$out/ceilings.json" --resume; }

group() {
    if ! "$python" -c 'import sys; from bench.cases import GROUPS; sys.exit(sys.argv[1] not in GROUPS)' "$1"; then
        echo "there is no group $1 in these sources"
        return 0
    fi
    "$python" -m bench run "$1" $flags ${CLP_GPU_SH_FLAGS:-} --out "$out/$1.json" --resume --budget "$2"
}

docsum() {
    local reference=bench/results/docsum_demo.json small=""
    if [ "$device" != cuda ]; then
        reference=$out/docsum_demo.json
        small="--steps 2 --prompts 4"
    fi
    if [ ! -e "$out/docsum_demo.json" ]; then
        # An interrupted run goes on at its last checkpoint.
        "$python" -m clp_engine demo --out "$out/docsum" --seed 0 $small
        cp "$out/docsum/report.json" "$out/docsum_demo.json"
        rm -rf "$out"/docsum/checkpoint-* "$out/docsum/policy"  # megabytes in the archive that nothing here reads again
    fi
    "$python" -m bench.gpu.fronts "$reference" "$out/docsum_demo.json" --out "$out/fronts"
}

counters() {
    local manifest=$out/counters.manifest.json table=$out/counters.csv sizes="" tool=ncu how
    if [ "$device" != cuda ]; then sizes="--sizes tiny"; fi
    command -v "$tool" >/dev/null || tool=/usr/local/cuda/bin/ncu
    if [ "$device" != cuda ] || ! command -v "$tool" >/dev/null; then
        echo "ncu is not on this machine; the calls it would watch:"
        "$python" -m bench.gpu.counters run --device "$device" $sizes --out "$manifest"
        return
    fi
    # The second way, of whole sections, is for a version of ncu that does not know one of the metrics.
    for how in "--metrics $("$python" -m bench.gpu.counters metrics)" \
        "--section SpeedOfLight --section MemoryWorkloadAnalysis --section Occupancy --section LaunchStats"; do
        "$tool" --profile-from-start off --clock-control none $how --csv --page raw --log-file "$table" \
            "$python" -m bench.gpu.counters run --device "$device" --out "$manifest" || true
        if "$python" -m bench.gpu.counters read "$table" --manifest "$manifest" --out "$out/counters.json"; then return 0; fi
    done
    # Without the tool the same calls must work; where they do, it was the tool that refused.
    "$python" -m bench.gpu.counters run --device "$device" --out "$manifest"
    echo "ncu gave no counters: $(grep -m 1 -h ERROR "$table" || echo 'and no reason')"
}

tune() {
    if ! "$python" -m bench tune --help >/dev/null 2>&1; then
        echo "there is no python -m bench tune in these sources"
        return 0
    fi
    if [ "$device" != cuda ]; then echo "tuning needs a GPU"; return 0; fi
    "$python" -m bench tune --out "$out/tune.json" --resume
}

profile() {
    local model
    for model in $profiled; do
        [ ! -e "$out/$model.profile.json" ] || continue
        "$python" -m bench profile-step --device "$device" --model "$model" --steps 3 --out "$out/$model.profile.json"
    done
}

# NAME:BUDGET:LIMIT. A case that has begun when the budget is over may take a minute more.
run_stage() {
    local name budget limit left rc=0 start=$SECONDS
    IFS=: read -r name budget limit <<<"$1"
    budget=${budget:-400}
    left=$((deadline - SECONDS))
    case " $groups " in
        *" $name "*) limit=${limit:-$((budget + 60))} ;;
        *) limit=${limit:-$budget} ;;
    esac
    if [ -e "$out/$name.done" ]; then
        # A finished build is of no use on another machine.
        [ "$name" = build ] && ! "$python" -c 'import clp_engine, clp_kernels' 2>/dev/null || return 0
    fi
    if [ "$left" -lt 45 ]; then
        echo "$name: left for the next call"
        return 0
    fi
    [ "$limit" -le "$left" ] || limit=$left
    [ "$budget" -le $((limit - 20)) ] || budget=$((limit - 20))
    case " $groups " in
        *" $name "*) set -- group "$name" "$budget" ;;
        *) set -- "$name" ;;
    esac
    # A stage is a function of this script: in a shell of its own, so that timeout can end it and all it started; interrupted, as
    # pytest then still says what it has seen.
    timeout --signal=INT --kill-after=15 "$limit" bash -euo pipefail -c '"$@"' stage "$@" >"$out/$name.log" 2>&1 || rc=$?
    echo "$rc $((SECONDS - start))" >"$out/$name.rc"
    if [ "$rc" -eq 0 ]; then touch "$out/$name.done"; else echo "$name: exit code $rc"; tail -n 5 "$out/$name.log"; fi
    archive
}

# Exit codes and seconds of all stages, and the targets that the results bear on.
summary() {
    local stage rc seconds results=() file
    printf '%-16s %5s %8s\n' stage exit seconds
    for stage in $every; do
        rc=- seconds=-
        [ ! -e "$out/$stage.rc" ] || read -r rc seconds <"$out/$stage.rc"
        printf '%-16s %5s %8s\n' "$stage" "$rc" "$seconds"
    done
    for stage in $groups; do
        file=$out/$stage.json
        if [ -e "$file" ]; then results+=("$file"); fi
    done
    if [ "${#results[@]}" -gt 0 ]; then
        echo
        "$python" -m bench targets "${results[@]}" || true
    fi
}

archive() {
    (cd "$out" && find . -maxdepth 3 -type f ! -name all.tgz ! -name '*.tmp' -print0 | tar -czf all.tgz.tmp --null -T - &&
        mv all.tgz.tmp all.tgz)
    if [ -n "${CLP_GPU_SH_SHIP:-}" ]; then
        mkdir -p "$CLP_GPU_SH_SHIP"
        cp "$out/all.tgz" "$CLP_GPU_SH_SHIP/all.tgz.tmp" && mv "$CLP_GPU_SH_SHIP/all.tgz.tmp" "$CLP_GPU_SH_SHIP/all.tgz"
    fi
}

export -f build tests kernel_tests engine_tests traced_tests pytest_gpu sanitizer racecheck sanitized sanitized_op ceilings group docsum counters tune profile
export python device out flags profiled jobs
stages=${*:-$plan}
for stage in $stages; do
    case " $every " in
        *" ${stage%%:*} "*) ;;
        *) echo "unknown stage ${stage%%:*}; known: $every" >&2; exit 2 ;;
    esac
done
for stage in $stages; do run_stage "$stage"; done

archive
summary | tee "$out/summary.txt"
if [ -n "${CLP_GPU_SH_SHIP:-}" ]; then cp "$out/summary.txt" "$CLP_GPU_SH_SHIP/"; fi
for stage in $stages; do
    [ -e "$out/${stage%%:*}.done" ] || exit 1
done
