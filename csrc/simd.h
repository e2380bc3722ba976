// Portable SIMD for the CPU kernels.
//
// GCC's and Clang's vector extensions give 64-byte vectors that every target lowers to what it has: one AVX-512
// register, two of AVX2, four of SSE2 or NEON. The lanes of a sum are the same everywhere and contraction to fused
// multiply-add is off (-ffp-contract=off in setup.py), so that a result does not depend on the machine it was
// computed on. The .inc files hold the kernels and are compiled once per instruction set; `dispatch` picks one at run
// time, so the binary is portable without -march=native.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define TAL_INLINE inline __attribute__((always_inline))

namespace tal_fast {

constexpr int kVectorBytes = 64;

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename Lanes<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// TAL_FAST_ISA (base, avx2, avx512) lowers the choice, which is how the tests reach every build on one machine.
enum class Isa { kBase, kAvx2, kAvx512 };

}  // namespace tal_fast

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TAL_X86 1
#else
#define TAL_X86 0
#endif
