#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, offline: is it right, then how fast is it.
#
#   benchmarks/gpu_run.sh [--out DIR] [--archive FILE.tar.gz] [--kernels FILE.tar.xz] [--keep-going] [--dry] [PART ...]
#
# Parts, in this order, by default all but tune: build (the CUDA library), tests (those marked gpu or device), sanitize
# (compute-sanitizer on the kernels), tune (which kernel serves which call, into kernels/configs and DIR/configs; three
# minutes more), ops, networks (the benchmarks). Each has a time limit and can run alone. The first part that fails ends
# the run: no wrong kernel is timed. Records go to DIR/<gpu>/, by default benchmarks/results; what each part printed to
# DIR/logs/. --archive packs DIR up at the end, also of a run that failed. --kernels: Triton kernels that were compiled
# before, by tests/triton_cache.py. --dry: tiny, on a CPU, without sanitizers.
set -uo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
out=$repository/benchmarks/results archive="" kernels="" keep_going="" device=cuda parts=()
while (($#)); do
    case $1 in
        --out) mkdir -p "$2" && out=$(cd "$2" && pwd) && shift ;;
        --archive) archive=$2 && shift ;;
        --kernels)
            [[ -f ${2-} ]] || { echo "--kernels: there is no file ${2-}" >&2 && exit 2; }
            kernels=$(realpath "$2") && shift ;;
        --keep-going) keep_going=1 ;;
        --dry) device=cpu ;;
        build | tests | sanitize | tune | ops | networks) parts+=("$1") ;;
        *) sed -n '2,11s/^# \{0,1\}//p' "$repository/benchmarks/gpu_run.sh" && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || parts=(build tests sanitize ops networks)
mkdir -p "$out/logs"
scratch=$(mktemp -d)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# Shared by all parts: what one compiles, the next finds.
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
cores=$(nproc)

finish() {
    [[ -z $archive ]] || tar -czf "$archive" -C "$out" .
    rm -rf "$scratch"
}
trap finish EXIT

# A checkout that is not installed: the package as it would be, made of links.
if ! (cd / && python3 -c "import diffkern.kernels") 2>/dev/null; then
    mkdir -p "$scratch/site/diffkern"
    ln -s "$repository"/diffkern/* "$repository/kernels" "$repository/csrc" "$scratch/site/diffkern/"
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi

build() {
    python3 -P - "$device" <<'PYTHON'
import sys
from diffkern import doctor, native
doctor.main()
missing = {name: native.why_not(name) for name in ("cpu", "cuda")}
print(missing)
sys.exit(any(missing.values()) if sys.argv[1] == "cuda" else 0)
PYTHON
}

tests() { # -P: not the checkout's own folder, which is no whole package
    # In this order: should the time not do, every kernel has been compared with its oracle. They are handed
    # out few at a time, since networks, which take longest, are the last.
    local files first=(tests/test_{ops,kernels}.py tests/test_cuda_*.py tests/test_attention_triton.py)
    mapfile -t files < <(grep -lE 'mark\.(gpu|device)' "${first[@]}" tests/test_*.py | awk '!seen[$0]++')
    local which=("${files[@]}" -m "gpu or device" -n "$((cores < 15 ? cores : 15))" --maxschedchunk 8 --durations 25)
    [[ $device == cuda ]] || which=(tests/test_benchmarks.py)
    TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 python3 -P -m pytest -q -p no:cacheprovider -p no:benchmark --maxfail=100 "${which[@]}"
    local code=$?
    echo "Triton compiled $(find "$TRITON_CACHE_DIR" -name '*.cubin' -newer "$scratch/began" | wc -l) kernels"
    return $code
}

sanitize() {
    if [[ $device != cuda ]]; then
        TRITON_INTERPRET=1 python3 tests/gpu_sanitize.py --device cpu --backend triton --op randn
        return
    fi
    local tool backend failed=0 pids=() logs=()
    while read -r tool backend; do
        logs+=("$out/logs/$tool-$backend.txt")
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 70 \
            compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 1 \
            python3 tests/gpu_sanitize.py --backend "$backend" >"${logs[-1]}" 2>&1 </dev/null &
        pids+=($!)
    done <<<$'memcheck cuda\nracecheck cuda\nmemcheck triton'
    local i code
    for i in "${!pids[@]}"; do
        wait "${pids[i]}" && code=0 || code=$?
        # Triton compiles what the tests have not: that may take too long, and is no error.
        if ((code == 124)) && [[ ${logs[i]} == *triton* ]]; then
            echo "${logs[i]}: not all was run in the time there was"
        elif ((code)); then
            failed=1
        fi
    done
    tail -n 2 "${logs[@]}"
    return $failed
}

tune() {
    if [[ $device != cuda ]]; then
        python3 -P benchmarks/tune.py --help | tail -n 1
        return
    fi
    local which=(--op group_norm_silu --op attention --op conv2d_moments)
    OMP_NUM_THREADS=1 python3 -P benchmarks/tune.py "${which[@]}" --processes "$cores" --seconds 150 || return
    mkdir -p "$out/configs" && cp kernels/configs/sm_*.json "$out/configs/"
}

ops() { # one thread each: the compilers of all processes share the cores
    local which=(--processes "$((cores < 12 ? cores : 12))" --seconds 140)
    [[ $device == cuda ]] || which=(--tiny --rivals eager --rounds 2 --op randn --op linear)
    TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=1 python3 -P -m diffkern.cli bench ops \
        --device "$device" --out "$out" "${which[@]}"
}

networks() {
    local left=$((515 - elapsed))
    local which=(--processes "$((cores < 14 ? cores : 14))" --seconds "$((left < 215 ? left : 215))")
    [[ $device == cuda ]] || which=(--tiny --networks vae-512 --variants "diffkern;diffusers" --rounds 1)
    TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=2 python3 -P -m diffkern.cli bench end-to-end \
        --device "$device" --out "$out" "${which[@]}"
}

declare -A limit=([build]=60 [tests]=150 [sanitize]=80 [tune]=180 [ops]=160 [networks]=230)
failed=()
mkdir -p "$TRITON_CACHE_DIR"
[[ -z $kernels ]] || python3 -P tests/triton_cache.py unpack "$kernels" "$TRITON_CACHE_DIR"
touch "$scratch/began"
export repository out device cores scratch
export -f build tests sanitize tune ops networks
for part in "${parts[@]}"; do
    echo "== $part, at most ${limit[$part]} s"  # then it is interrupted, and pytest still names what failed
    start=$SECONDS
    export elapsed=$SECONDS
    timeout --signal=INT --kill-after=8 "${limit[$part]}" bash -c "$part" 2>&1 | tee "$out/logs/$part.txt"
    code=${PIPESTATUS[0]}
    echo "== $part: $( ((code)) && echo "FAILED with $code" || echo passed) in $((SECONDS - start)) s"
    if ((code)); then
        failed+=("$part")
        [[ $keep_going || $part == ops || $part == networks ]] || break
    fi
done
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}. What follows the first of them was not run, or is not to be trusted."
    exit 1
fi
echo "all passed: ${parts[*]}, $SECONDS s. Records are in $out"
