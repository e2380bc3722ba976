// The CPU kernels, as a table of functions for the instruction set in use.
#pragma once

#include <cstdint>

namespace tal_fast {

// Result of one pass over a row of logits.
template <typename T>
struct RowScan {
  T largest;
  T norm;  // in units of `unit`
  int64_t argmax;
  bool finite;  // whether every logit is finite
  T unit = 1;   // a power of 2; not 1 for huge logits, of which a sum of squares may overflow
};

template <typename T>
struct CpuKernels {
  // Mean and unbiased standard deviation of `count` >= 2 values.
  void (*mean_std)(const T* x, int64_t count, double* mean, double* std);
  // best[b] = min(best[b], squared distance of (m[b], s[b]) to the queue's entries [begin, end)).
  void (*nearest_squared)(const T* queue_mean, const T* queue_std, int64_t begin, int64_t end, const T* m, const T* s,
                          int64_t batch, T* best);
  // Largest logit, norm, arg-max and finiteness of a row.
  RowScan<T> (*scan_row)(const T* z, int64_t classes);
  // Loss of one row of finite logits; also writes `gradient_scale` times its gradient unless `gradient` is null. The
  // label smoothing is spread over the classes as `shares`, or evenly if that is null. `work` is scratch memory of
  // row_work_size(classes) values.
  T (*row_loss)(const T* z, int64_t classes, int64_t label, const RowScan<T>& scan, T temperature, T weight,
                T smoothing, const T* shares, T norm_eps, T gradient_scale, T* work, T* gradient);
};

// Kernels of the instruction set in use.
template <typename T>
const CpuKernels<T>& cpu_kernels();

// As CpuKernels::row_loss, one logit after the other in extended precision, for the rare rows whose unit is not 1.
template <typename T>
T row_loss_of_huge_logits(const T* z, int64_t classes, int64_t label, const RowScan<T>& scan, T temperature, T weight,
                          T smoothing, const T* shares, T norm_eps, T gradient_scale, T* work, T* gradient);

// Three rows, each padded by up to a pack.
inline int64_t row_work_size(int64_t classes) { return 3 * (classes + 16); }

// Name of the instruction set in use: base, avx2 or avx512.
const char* cpu_isa();

}  // namespace tal_fast
