// Portable SIMD for the CPU kernels.
//
// The kernels compute on packs of 64 bytes: one register with AVX-512, two with AVX2, four with SSE2 or NEON. The lanes
// of a sum are therefore the same everywhere, and contraction to fused multiply-add is off (-ffp-contract=off in
// setup.py), so that results do not depend on the machine. The .inc files hold packs and kernels and are compiled once
// per instruction set; kernels_cpu.cpp selects one at run time, so the binary is portable without -march=native.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define TAL_INLINE inline __attribute__((always_inline))
#define TAL_LAMBDA __attribute__((always_inline))

namespace tal_fast {

// Instruction sets. TAL_FAST_ISA (base, avx2, avx512) selects a lower one, which lets tests reach all on one machine.
enum class Isa { kBase, kAvx2, kAvx512 };

// Rows with a larger sum of squares are counted in units of kHugeUnit; beyond it, products of the gradient lose digits.
template <typename T>
constexpr T kHugeSquares = sizeof(T) == 4 ? static_cast<T>(0x1p100) : static_cast<T>(0x1p800);
template <typename T>
constexpr T kHugeUnit = sizeof(T) == 4 ? static_cast<T>(0x1p78) : static_cast<T>(0x1p624);

}  // namespace tal_fast

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TAL_X86 1
#else
#define TAL_X86 0
#endif
