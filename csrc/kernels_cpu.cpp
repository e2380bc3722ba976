// Compiles kernels_cpu.inc once per instruction set and selects one at run time.
#include "kernels_cpu.h"

#include <cstdlib>
#include <cstring>

#include "simd.h"

namespace tal_fast {
namespace {

// Scalar scan of the rare rows that are not finite or whose squares are huge. A NaN counts as the largest value, as in
// torch.argmax.
template <typename T>
RowScan<T> scan_row_scalar(const T* z, int64_t classes) {
  RowScan<T> scan{z[0], 0, 0, true};
  long double squares = 0;
  scan.unit = kHugeUnit<T>;
  for (int64_t c = 0; c < classes; ++c) {
    scan.finite = scan.finite && std::isfinite(z[c]);
    const long double scaled = z[c] / scan.unit;
    squares += scaled * scaled;
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

template <typename T>
T row_loss_of_huge_logits(const T* z, int64_t classes, int64_t label, const RowScan<T>& scan, T temperature, T weight,
                          T smoothing, const T* shares, T norm_eps, T gradient_scale, T* /*work*/, T* gradient) {
  using Wide = long double;
  const Wide norm = static_cast<Wide>(scan.norm) * scan.unit, n = norm + norm_eps;
  const Wide largest = scan.largest, z_label = z[label], x_label = z_label - largest;
  const Wide hit = 1 - static_cast<Wide>(smoothing);
  const auto spread = [&](int64_t c) { return smoothing * (shares ? shares[c] : Wide(1) / classes); };
  Wide target_x = hit * x_label;
  for (int64_t c = 0; c < classes; ++c) target_x += spread(c) * (z[c] - largest);
  // One cross-entropy: its loss, and the coefficients of its gradient for the exponentials, at the label and along z.
  struct Terms {
    Wide loss, per_exponential, at_label, along_z;
  };
  const auto cross_entropy = [&](Wide scale, Wide share) -> Terms {
    if (share == 0) return {0, 0, 0, 0};
    Wide others = 0, weighted = 0;
    for (int64_t c = 0; c < classes; ++c) {
      if (c == label) continue;
      const Wide x = z[c] - largest, e = std::exp(scale * x);
      others += e;
      weighted += x * e;
    }
    const Wide at_label = std::exp(scale * x_label), sum = others + at_label, factor = share * scale * gradient_scale;
    const Wide k = (weighted + x_label * at_label) / sum - target_x;  // <z, p - target>
    const Wide log_sum = at_label == 1 ? std::log1p(others) : std::log(sum);
    return {share * (log_sum - scale * target_x), factor / sum, factor * (smoothing - others / sum),
            factor * (k / norm) / n};
  };
  const Wide scale = temperature / n;
  const Terms direction = cross_entropy(scale, weight), magnitude = cross_entropy(1, 1 - weight);
  if (gradient) {
    const Wide subtract = (weight * scale + (1 - weight)) * gradient_scale;
    for (int64_t c = 0; c < classes; ++c) {
      const Wide x = z[c] - largest;
      Wide g = direction.per_exponential * std::exp(scale * x) + magnitude.per_exponential * std::exp(x);
      if (c == label) g = direction.at_label + magnitude.at_label;
      gradient[c] = static_cast<T>(g - z[c] * direction.along_z - subtract * spread(c));
    }
  }
  return static_cast<T>(direction.loss + magnitude.loss);
}
template float row_loss_of_huge_logits(const float*, int64_t, int64_t, const RowScan<float>&, float, float, float,
                                       const float*, float, float, float*, float*);
template double row_loss_of_huge_logits(const double*, int64_t, int64_t, const RowScan<double>&, double, double, double,
                                        const double*, double, double, double*, double*);

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
