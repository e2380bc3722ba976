#!/usr/bin/env bash
# What only a GPU can tell, in one command: build, whole steps, kernels, search, training, peers, GPU tests.
#
#   bench/gpu.sh [OPTIONS]     on a machine with a CUDA GPU; ends within 280 s
#   bench/gpu.sh --smoke       anywhere: tiny shapes on the CPU, the kernels in Triton's interpreter
#
#   --only GROUPS   some of step, loss, search, training and peers, by commas (all); without tests unless --tests asks
#   --seconds N     limit for everything (280)
#   --tests WHEN    first, last (in the time that is left), none, or only (last)
#   --no-build      with the extension that is there, or none
#
# Exit status 0: all that ran is right. Otherwise a test failed, or a kernel of this package is wrong, does not run or
# took too long; peers of others may fail. $OUT (bench/results) gets gpu.json, summary.txt, tests.txt and build.txt.
#
# Needs Python 3.10, torch with CUDA, triton, numpy, scipy, scikit-learn, PyYAML, Jinja2, Pillow, tqdm, torchvision and
# setuptools of any version; for the tests pytest, pytest-timeout and hypothesis, and with pytest-xdist they run in
# parallel; a C++ compiler and nvcc for the extension. Installs nothing: the package runs from its source tree. PYTHON
# names the interpreter.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
[[ $python != */* || $python = /* ]] || python=$PWD/$python
out=${OUT:-bench/results}
limit=280 only='' tests='' build=1 smoke=0
while [ $# -gt 0 ]; do
    case $1 in
        --smoke) smoke=1 ;;
        --no-build) build=0 ;;
        --only) only=${2:?--only needs names of groups}; shift ;;
        --seconds) limit=${2:?--seconds needs a number}; shift ;;
        --tests) tests=${2:?--tests needs first, last, none or only}; shift ;;
        *) echo "$1 is no option of bench/gpu.sh; its first lines list them" >&2; exit 2 ;;
    esac
    shift
done
tests=${tests:-$([ -n "$only" ] && echo none || echo last)}
case $tests in
    first | last | none | only) ;;
    *) echo "--tests is $tests; use first, last, none or only" >&2; exit 2 ;;
esac
groups=(${only:+--only "$only"})
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

if [ "$smoke" = 1 ]; then
    TRITON_INTERPRET=1 "$python" -m bench.gpu --smoke "${groups[@]}" --out "$out/gpu-smoke.json" || exit 1
    exec "$python" -m bench.gpu_summary "$out/gpu-smoke.json"
fi

failed=0
rm -f "$out"/gpu.json "$out"/tests.txt
[ -e tal_fast/kernels ] || ln -s ../kernels tal_fast/kernels
if [ "$tests" != only ]; then # while the extension is built
    timeout 90 "$python" -m bench.compile_ahead ${only:+"$only"} &
fi
if [ "$build" = 1 ]; then
    # In a folder without pyproject.toml, which setuptools before 77 cannot read; the library lands in tal_fast/.
    mkdir -p build/gpu
    ln -sfn ../../setup.py ../../csrc ../../tal_fast build/gpu
    most=$((limit / 2 < 120 ? limit / 2 : 120))
    (cd build/gpu && timeout "$most" "$python" setup.py build_ext --inplace) >"$out/build.txt" 2>&1 || failed=1
    grep "^ *tal-fast:" "$out/build.txt"
    [ "$failed" = 0 ] || echo "the extension did not build within $most s: see $out/build.txt"
    echo "== built ($SECONDS s)"
fi
wait

run_tests() { # seconds
    echo "== GPU tests ($SECONDS s)"
    [ "$1" -ge 40 ] || { echo "no time for the tests: $1 s are left, 40 are needed"; failed=1; return; }
    local files parallel=()
    # The files with such tests only: others import packages that this machine need not have.
    mapfile -t files < <(grep -rlE --include="test_*.py" "mark\.gpu|gpu_too" tests)
    "$python" -c "import xdist" 2>/dev/null && parallel=(-n "$(($(nproc) < 6 ? $(nproc) : 6))" --dist worksteal)
    # Interrupted, pytest reports what it has; it has 15 s for that.
    timeout --signal=INT --kill-after=15 $(($1 - 15)) "$python" -m pytest -m gpu "${files[@]}" "${parallel[@]}" -q \
        --maxfail=20 --tb=short --timeout=120 -p no:cacheprovider 2>&1 | tee "$out/tests.txt" | tail -n 40
    [ "${PIPESTATUS[0]}" -eq 0 ] && grep -q " passed" "$out/tests.txt" || failed=1  # without a GPU all are skipped
}

run_benchmarks() { # seconds
    echo "== benchmarks ($SECONDS s)"
    [ "$1" -ge 20 ] || { echo "no time for the benchmarks: $1 s are left, 20 are needed"; failed=1; return; }
    timeout --kill-after=5 $(($1 + 10)) "$python" -m bench.gpu "${groups[@]}" --seconds "$1" --out "$out/gpu.json" ||
        failed=1
}

case $tests in
    first) run_tests $(((limit - SECONDS) / 2)); run_benchmarks $((limit - SECONDS)) ;;
    last) run_benchmarks $((limit - SECONDS - 70)); run_tests $((limit - SECONDS)) ;;
    none) run_benchmarks $((limit - SECONDS)) ;;
    only) run_tests $((limit - SECONDS)) ;;
esac
echo "== summary ($SECONDS s)"
[ ! -e "$out/gpu.json" ] || "$python" -m bench.gpu_summary "$out/gpu.json" | tee "$out/summary.txt"
[ "$failed" = 0 ] && echo "right" || echo "NOT RIGHT: see above"
exit $failed
