#!/usr/bin/env bash
# On a machine with a GPU: all tests that need one, then all benchmarks that do. Results: benchmarks/results/*_cuda.json.
#
#   benchmarks/gpu.sh                    under 8 minutes on one card
#   benchmarks/gpu.sh --full NETWORK     the paper's 20,000 iterations on one network, under 10 minutes
#   benchmarks/gpu.sh --rehearse         each script on the CPU at toy sizes: that they run, not how fast
#
# Needs torch, torchvision, numpy, numba, cupy, safetensors, onnx, onnxruntime, pytest, pytest-timeout and pydantic; of
# what Python lacks, WHEELS names a folder with wheels. COMMIT names the commit in place of the checkout's, RESULTS another
# folder. A step that fails does not hinder the next; the last line names those that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
results=${RESULTS:-$([[ ${1:-} == --rehearse ]] && mktemp -d || echo benchmarks/results)}
failed=()

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

step() {  # seconds it may take, its name, its command
  local limit=$1 name=$2
  shift 2
  echo "== $name"
  local started=$SECONDS
  timeout "$limit" "$@" || failed+=("$name")
  echo "== $name: $((SECONDS - started)) s"
}

case ${1:-} in
  --rehearse)
    step 300 inference "$python" benchmarks/inference.py --device cpu --networks mobilenet_v2 --batch 1 --size 32 \
      --rounds 1 --repeats 1 --out "$results/inference_cpu.json"
    step 300 kernels "$python" benchmarks/kernels.py --device cpu --batch 1 --shrink 7 --rounds 1 --repeats 1 \
      --layers conv1 "layer2 shortcut" --training-layers "layer2 shortcut" --out "$results/kernels_cpu.json"
    step 300 reconstruction "$python" benchmarks/reconstruction.py --device cpu --networks residual --blocks conv1 \
      --iterations 2 --rounds 1 --out "$results/reconstruction_cpu.json"
    step 300 full "$python" benchmarks/full.py --device cpu --network residual --preset smoke --iterations 2 \
      --out "$results/full_residual_cpu.json"
    ;;
  --full)
    step 590 "full ${2:?which network}" "$python" benchmarks/full.py --network "$2" \
      --out "$results/full_$2_cuda.json"
    ;;
  "")
    at_once=$("$python" -c 'import xdist; print("-n 6")' 2>/dev/null)  # six at a time where pytest-xdist is there
    # shellcheck disable=SC2086
    step 180 tests "$python" -m pytest -q -m gpu -W default -p no:cacheprovider $at_once \
      tests/cupy_kernels/test_on_gpu.py tests/aquant_core/test_runtime.py tests/aquant_core/test_replay.py \
      tests/aquant_core/test_pipeline_on_gpu.py
    step 80 inference "$python" benchmarks/inference.py --out "$results/inference_cuda.json"
    step 130 kernels "$python" benchmarks/kernels.py --out "$results/kernels_cuda.json"
    step 80 reconstruction "$python" benchmarks/reconstruction.py --networks residual resnet18 --iterations 300 \
      --rounds 1 --variants aquant_no_border aquant --out "$results/reconstruction_cuda.json"
    ;;
  *)
    sed -n '2,8p' "$0"
    exit 2
    ;;
esac

echo "== ${#failed[@]} failed${failed[*]:+: ${failed[*]}}"
exit "${#failed[@]}"
