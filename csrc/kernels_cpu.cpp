// Compiles kernels_cpu.inc once per instruction set and selects one at run time.
#include "kernels_cpu.h"

#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace tal_fast {
namespace {

// Scalar scan of the rare rows that are not finite or whose sum of squares overflows. A NaN counts as the largest
// value, as in torch.argmax.
template <typename T>
RowScan<T> scan_row_scalar(const T* z, int64_t classes) {
  RowScan<T> scan{z[0], 0, 0, true};
  long double squares = 0;
  for (int64_t c = 0; c < classes; ++c) {
    scan.finite = scan.finite && std::isfinite(z[c]);
    squares += static_cast<long double>(z[c]) * z[c];
    if (!std::isnan(scan.largest) && (z[c] > scan.largest || std::isnan(z[c]))) {
      scan.largest = z[c];
      scan.argmax = c;
    }
  }
  scan.norm = static_cast<T>(std::sqrt(squares));
  return scan;
}

namespace base {
#define TAL_REGISTER_BYTES 16
#include "pack.inc"

#include "kernels_cpu.inc"
#undef TAL_REGISTER_BYTES
}  // namespace base

#if TAL_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#define TAL_REGISTER_BYTES 32
#include "pack.inc"

#include "kernels_cpu.inc"
#undef TAL_REGISTER_BYTES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
namespace avx512 {
#define TAL_REGISTER_BYTES 64
#include "pack.inc"

#include "kernels_cpu.inc"
#undef TAL_REGISTER_BYTES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // TAL_X86

// Best instruction set of this machine, or a lower one chosen by TAL_FAST_ISA.
Isa detect() {
#if TAL_X86
  Isa isa = Isa::kBase;
  if (__builtin_cpu_supports("avx2")) isa = Isa::kAvx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    isa = Isa::kAvx512;
  if (const char* choice = std::getenv("TAL_FAST_ISA")) {
    if (!std::strcmp(choice, "base")) return Isa::kBase;
    if (!std::strcmp(choice, "avx2") && isa == Isa::kAvx512) return Isa::kAvx2;
  }
  return isa;
#else
  return Isa::kBase;
#endif
}

Isa isa_in_use() {
  static const Isa isa = detect();
  return isa;
}

#define TAL_KERNELS(ns) \
  CpuKernels<T> { ns::mean_std<T>, ns::nearest_squared<T>, ns::scan_row<T>, ns::row_loss<T> }

template <typename T>
CpuKernels<T> pick() {
#if TAL_X86
  if (isa_in_use() == Isa::kAvx512) return TAL_KERNELS(avx512);
  if (isa_in_use() == Isa::kAvx2) return TAL_KERNELS(avx2);
#endif
  return TAL_KERNELS(base);
}

}  // namespace

template <typename T>
const CpuKernels<T>& cpu_kernels() {
  static const CpuKernels<T> kernels = pick<T>();
  return kernels;
}
template const CpuKernels<float>& cpu_kernels<float>();
template const CpuKernels<double>& cpu_kernels<double>();

const char* cpu_isa() {
  switch (isa_in_use()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace tal_fast
