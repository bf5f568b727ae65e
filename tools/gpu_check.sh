#!/usr/bin/env bash
# All that a machine with an NVIDIA GPU has to tell of the kernels, in less than nine minutes:
#
#     tools/gpu_check.sh [--quick] [FOLDER]
#
# Correctness on the GPU, what it copies and multiplies at most, the kernels beside their peers, and decoding with a
# randomly initialised 8B Llama. A log of each step comes into FOLDER (gpu_check), and the record of each benchmark as
# FOLDER/*.json, to be kept in docs/benchmarks/. A step that fails does not stop those after it; the exit status is that
# of the first. With --quick all sizes are tiny, and a CPU does, which interprets the kernels: to check the logic.
set -uo pipefail
cd "$(dirname "$0")/.."
quick=
[ "${1-}" = --quick ] && { quick=600; shift; }  # seconds for a step: nobody waits, and a CPU may be busy
folder=${1:-gpu_check}
mkdir -p "$folder" || exit
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1  # so that a step that is ended has said what it knew
num_steps=0 num_passed=0 status=0

step() {  # step NAME SECONDS COMMAND...: runs the command for so long at most, and keeps what it prints
    local name=$1 limit=$2 start=$SECONDS result
    shift 2
    [ -z "$quick" ] || limit=$quick
    num_steps=$((num_steps + 1))
    timeout --kill-after=5 "$limit" "$@" >"$folder/$name.log" 2>&1
    result=$?
    case $result in
        0) num_passed=$((num_passed + 1)) ;;
        124 | 137) tail -n 3 "$folder/$name.log"; echo "$name: not done after $limit s" ;;
        *) tail -n 20 "$folder/$name.log"; echo "$name: failed with exit status $result" ;;
    esac
    [ "$status" -ne 0 ] || status=$result
    echo "$name: $((SECONDS - start)) s"
    return "$result"
}

benchmark() {  # benchmark NAME SECONDS PROGRAM FLAG...: a step that ends with its record
    local name=$1 limit=$2 program=$3 result
    shift 3
    step "$name" "$limit" "$python" "tools/$program.py" "$@"
    result=$?
    grep -E '^(batch|copies|decode|prefill|[0-9]+ (tokens|rows)|.* cannot:) ?' "$folder/$name.log"
    [ "$result" -ne 0 ] || grep '^{' "$folder/$name.log" | tail -n 1 >"$folder/$name.json"
}

kernel_tests=(tests/test_{work_list,paged_attention,mosaic_gpu,quantized_cache,grouped_matmul,attention_backends,draw,gpu}.py)
if [ -n "$quick" ]; then
    tests=(env JAXINFER_TEST_PLATFORM=cpu "$python" -m pytest -q -m any_device -k evenly tests/test_work_list.py)
    kernels=(--quick --dtype=float32 --decode=zipf3x90 --prefill=1x48 --heads=4,2,32 --page_size=16)
    small=(--quick --dtype=float32 --decode=2x40 --prefill= --heads=4,2,32 --page_size=16)
    experts=(--quick --dtype=float32 --experts=4,2,32,48 --tokens=3 --nopeer)
    model=(--shape=61m --layers=1 --rounds=1 --prompt_tokens=16 --new_tokens=2 --decode_steps=1 --dtype=float32)
    sampling=(--batch_sizes=2 --vocab_size=300 --rounds=1)
    batches=1
else
    nvidia-smi >"$folder/nvidia-smi.log" 2>&1
    tests=(env JAXINFER_TEST_PLATFORM=cuda "$python" -m pytest -q -m gpu --durations=10 "${kernel_tests[@]}")
    kernels=()
    small=(--decode=64x8192,zipf64x32768 --prefill=)
    experts=(--nopeer)
    model=(--shape=8b --rounds=5 --prompt_tokens=1000 --new_tokens=128 --decode_steps=16 --dtype=bfloat16)
    sampling=(--batch_sizes=1,8,64 --rounds=20 --shape=8b --dtype=bfloat16)
    batches=1,8,32
fi
model+=(--peers=)

step tests 130 "${tests[@]}"
tail -n 1 "$folder/tests.log"
benchmark kernels 130 bench_kernel "${kernels[@]}"
benchmark decode 120 bench_decode "${model[@]}" --batch_sizes=$batches --attention_backend=triton
benchmark kernels_int8 30 bench_kernel --kv_cache_dtype=int8 "${small[@]}"
benchmark sampling 60 bench_sampling "${sampling[@]}"
benchmark experts 50 bench_grouped "${experts[@]}"
benchmark decode_xla 60 bench_decode "${model[@]}" --batch_sizes="${batches##*,}" --attention_backend=xla
echo "$num_passed of $num_steps steps passed in $SECONDS s; $folder has their logs and records"
exit "$status"
