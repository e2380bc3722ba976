#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, GPU tests, kernel and step benchmarks, training throughput.
#
#   bench/gpu.sh            on a machine with a CUDA GPU; ends within 10 minutes
#   bench/gpu.sh --smoke    anywhere: tiny shapes on the CPU, the kernels in Triton's interpreter
#
# Results go to $OUT (bench/results by default): gpu.json, tests.txt and build.txt. Needs torch, triton, numpy, pytest
# and pytest-timeout (with torchvision also the training steps); installs nothing but this package, without its
# dependencies. PYTHON names the interpreter.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"

if [ "${1:-}" = --smoke ]; then
    TRITON_INTERPRET=1 exec "$python" -m bench.gpu --smoke --out "$out/gpu-smoke.json"
fi

# Ten minutes in all, the end of which the figures need not wait for: benchmarks come before the tests, which take
# what is left.
limit=570
failed=0
echo "== build"
if ! timeout 180 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index -v -e . >"$out/build.txt" 2>&1; then
    grep -o "tal-fast: setuptools .*" "$out/build.txt" || tail -n 5 "$out/build.txt"
    echo "the package did not install; see $out/build.txt"
    exit 1
fi
grep "^ *tal-fast:" "$out/build.txt"
"$python" -m tal_fast.info || failed=1

echo "== benchmarks ($SECONDS s)"
seconds=$((limit - SECONDS - 180))
timeout $((seconds + 60)) "$python" -m bench.gpu --seconds "$seconds" --out "$out/gpu.json" || failed=1

echo "== GPU tests ($SECONDS s)"
# The files with such tests only: others import packages that this machine need not have.
mapfile -t files < <(grep -rlE --include="test_*.py" "mark\.gpu|gpu_too" tests)
timeout $((limit - SECONDS)) "$python" -m pytest -m gpu "${files[@]}" -q --maxfail=20 --tb=short -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -n 30
[ "${PIPESTATUS[0]}" -eq 0 ] || failed=1
exit $failed
