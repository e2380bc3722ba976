// CUDA operators of the queue: push and nearest, without host synchronisation.
//
// The fused GPU path of the loss is in Triton (kernels/); these serve a FeatureQueue used on its own. Products and sums
// are rounded separately, without fused multiply-add, so that distances equal those of the CPU.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>

#include "queue.h"

namespace tal_fast {
namespace {

using at::Tensor;

// Products and sums without contraction.
__device__ inline float product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double product(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float total(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double total(double a, double b) { return __dadd_rn(a, b); }

// Atomic minimum of non-negative floats, which order as their bit patterns do. `<` has excluded NaN before.
__device__ inline void atomic_min(float* p, float x) {
  atomicMin(reinterpret_cast<int*>(p), __float_as_int(x));
}
__device__ inline void atomic_min(double* p, double x) {
  atomicMin(reinterpret_cast<long long*>(p), __double_as_longlong(x));
}

constexpr int kPushThreads = 1024;  // rows per iteration; 32 warps

// Whether the cursor lies in its ring. The host reports one that does not; until then nothing outside is touched.
__device__ inline bool is_valid(const int64_t* cursor, int64_t capacity) {
  return cursor[0] >= 0 && cursor[0] < capacity && cursor[1] >= 0 && cursor[1] <= capacity;
}

// Append the kept rows to the queue. One block walks the batch in order, and a block-wide scan gives each kept row its
// slot. If more rows are kept than the queue has slots, only the last ones are written, so no slot is written twice.
template <typename T>
__global__ void push_kernel(T* queue_mean, T* queue_std, int64_t* cursor, const T* mean, const T* std,
                            const bool* accepted, int64_t batch, int64_t capacity) {
  __shared__ int warp_sums[32];
  __shared__ int64_t kept_in_all;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (!is_valid(cursor, capacity)) return;
  const auto keeps = [&](int64_t b) {
    return b < batch && (!accepted || accepted[b]) && isfinite(mean[b]) && isfinite(std[b]);
  };
  // 1. Count the kept rows.
  if (threadIdx.x == 0) kept_in_all = 0;
  __syncthreads();
  for (int64_t start = 0; start < batch; start += kPushThreads) {
    const int count = __syncthreads_count(keeps(start + threadIdx.x));
    if (threadIdx.x == 0) kept_in_all += count;
  }
  __syncthreads();
  const int64_t head = cursor[0], skip = max(kept_in_all - capacity, static_cast<int64_t>(0));
  // 2. Write them to their slots.
  int64_t before = 0;
  for (int64_t start = 0; start < batch; start += kPushThreads) {
    const int64_t b = start + threadIdx.x;
    const bool keep = keeps(b);
    const unsigned ballot = __ballot_sync(0xffffffffu, keep);
    if (lane == 0) warp_sums[warp] = __popc(ballot);
    __syncthreads();
    int64_t rank = before + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < 32; ++w) {
      if (w < warp) rank += warp_sums[w];
      before += warp_sums[w];
    }
    if (keep && rank >= skip) {
      const int64_t slot = (head + rank) % capacity;
      queue_mean[slot] = mean[b];
      queue_std[slot] = std[b];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    cursor[0] = (head + kept_in_all) % capacity;
    cursor[1] = min(cursor[1] + kept_in_all, capacity);
  }
}

constexpr int kNearestThreads = 256;
constexpr int kQueries = 4;  // queries per block

// Squared distance of each query to the nearest entry. Each block takes 4 queries and a strided part of the queue; an
// atomic minimum combines the blocks.
template <typename T>
__global__ void nearest_kernel(const T* __restrict__ queue_mean, const T* __restrict__ queue_std,
                               const int64_t* __restrict__ cursor, const T* __restrict__ mean,
                               const T* __restrict__ std, int64_t batch, int64_t capacity, T* squared) {
  const int64_t length = is_valid(cursor, capacity) ? cursor[1] : 0;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kQueries;
  T m[kQueries], s[kQueries], best[kQueries];
  for (int k = 0; k < kQueries; ++k) {
    const int64_t b = min(first + k, batch - 1);
    m[k] = mean[b];
    s[k] = std[b];
    best[k] = INFINITY;
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * kNearestThreads;
  for (int64_t j = static_cast<int64_t>(blockIdx.y) * kNearestThreads + threadIdx.x; j < length; j += step) {
    const T qm = queue_mean[j], qs = queue_std[j];
    for (int k = 0; k < kQueries; ++k) {
      const T dm = m[k] - qm, ds = s[k] - qs;
      const T d = total(product(dm, dm), product(ds, ds));
      best[k] = d < best[k] ? d : best[k];
    }
  }
  for (int k = 0; k < kQueries; ++k) {
    for (int offset = 16; offset > 0; offset >>= 1) {
      const T other = __shfl_xor_sync(0xffffffffu, best[k], offset);
      best[k] = other < best[k] ? other : best[k];
    }
    if ((threadIdx.x & 31) == 0 && first + k < batch) atomic_min(squared + first + k, best[k]);
  }
}

void push_cuda(Tensor& queue_mean, Tensor& queue_std, Tensor& cursor, const Tensor& mean, const Tensor& std,
               const std::optional<Tensor>& accepted, const std::optional<Tensor>& index) {
  check_queue(queue_mean, queue_std, cursor);
  check_entries(queue_mean, mean, std, accepted);
  TORCH_CHECK_VALUE(!index, "an index is for queues on the CPU");
  if (mean.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(queue_mean.device());
  const Tensor m = mean.contiguous(), s = std.contiguous();
  const Tensor keep = accepted ? accepted->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(queue_mean.scalar_type(), "tal_fast::push_", [&] {
    push_kernel<scalar_t><<<1, kPushThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        queue_mean.mutable_data_ptr<scalar_t>(), queue_std.mutable_data_ptr<scalar_t>(),
        cursor.mutable_data_ptr<int64_t>(), m.const_data_ptr<scalar_t>(), s.const_data_ptr<scalar_t>(),
        keep.defined() ? keep.const_data_ptr<bool>() : nullptr, m.numel(), queue_mean.numel());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor nearest_cuda(const Tensor& queue_mean, const Tensor& queue_std, const Tensor& cursor, const Tensor& mean,
                    const Tensor& std, const std::optional<Tensor>& index) {
  check_queue(queue_mean, queue_std, cursor);
  check_entries(queue_mean, mean, std, std::nullopt);
  TORCH_CHECK_VALUE(!index, "an index is for queues on the CPU");
  const c10::cuda::CUDAGuard guard(queue_mean.device());
  const Tensor m = mean.contiguous(), s = std.contiguous();
  Tensor squared = at::full(m.sizes(), std::numeric_limits<double>::infinity(), m.options());
  if (m.numel() == 0) return squared;
  const int64_t query_blocks = (m.numel() + kQueries - 1) / kQueries;
  // About 8 blocks per multiprocessor, and no block without work. The queue's length is on the device, so its capacity
  // decides.
  const int64_t wanted = 8 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount / query_blocks;
  const int64_t most = (queue_mean.numel() + kNearestThreads - 1) / kNearestThreads;
  const dim3 grid(static_cast<unsigned>(query_blocks),
                  static_cast<unsigned>(std::clamp<int64_t>(wanted, 1, std::min<int64_t>(most, 65535))));
  AT_DISPATCH_FLOATING_TYPES(queue_mean.scalar_type(), "tal_fast::nearest", [&] {
    nearest_kernel<scalar_t><<<grid, kNearestThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        queue_mean.const_data_ptr<scalar_t>(), queue_std.const_data_ptr<scalar_t>(), cursor.const_data_ptr<int64_t>(),
        m.const_data_ptr<scalar_t>(), s.const_data_ptr<scalar_t>(), m.numel(), queue_mean.numel(),
        squared.mutable_data_ptr<scalar_t>());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return squared.sqrt_();
}

}  // namespace
}  // namespace tal_fast

TORCH_LIBRARY_IMPL(tal_fast, CUDA, m) {
  m.impl("push_", &tal_fast::push_cuda);
  m.impl("nearest", &tal_fast::nearest_cuda);
}
