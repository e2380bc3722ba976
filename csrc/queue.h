// Argument checks of the queue's operators.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace tal_fast {

// Bytes of the index of a queue; 0 for capacities at which brute force is as fast.
int64_t index_bytes(int64_t capacity, bool double_precision);

inline void check_queue(const at::Tensor& queue_mean, const at::Tensor& queue_std, const at::Tensor& cursor) {
  const auto type = queue_mean.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kDouble, "the queue must be float32 or float64, not ", type);
  TORCH_CHECK_TYPE(queue_std.scalar_type() == type, "queue_mean is ", type, " but queue_std is ",
                   queue_std.scalar_type());
  TORCH_CHECK_VALUE(queue_mean.dim() == 1 && queue_mean.numel() >= 1 && queue_std.sizes() == queue_mean.sizes() &&
                        queue_mean.is_contiguous() && queue_std.is_contiguous(),
                    "queue_mean and queue_std must be contiguous (N,) with N >= 1, not ", queue_mean.sizes(), " and ",
                    queue_std.sizes());
  TORCH_CHECK_VALUE(cursor.numel() == 2 && cursor.is_contiguous() && cursor.scalar_type() == at::kLong,
                    "cursor must be 2 contiguous int64 values");
  TORCH_CHECK_VALUE(queue_std.device() == queue_mean.device() && cursor.device() == queue_mean.device(),
                    "the queue's tensors must be on one device");
}

inline void check_entries(const at::Tensor& queue_mean, const at::Tensor& mean, const at::Tensor& std,
                          const std::optional<at::Tensor>& accepted) {
  TORCH_CHECK_VALUE(mean.dim() == 1 && std.sizes() == mean.sizes(), "mean and std must both be (B,), not ",
                    mean.sizes(), " and ", std.sizes());
  TORCH_CHECK_TYPE(mean.scalar_type() == queue_mean.scalar_type() && std.scalar_type() == queue_mean.scalar_type(),
                   "mean and std must have the queue's dtype ", queue_mean.scalar_type(), ", not ",
                   mean.scalar_type(), " and ", std.scalar_type());
  TORCH_CHECK_VALUE(mean.device() == queue_mean.device() && std.device() == queue_mean.device(),
                    "mean and std are on ", mean.device(), " but the queue is on ", queue_mean.device());
  if (accepted) {
    TORCH_CHECK_VALUE(accepted->sizes() == mean.sizes() && accepted->device() == mean.device(),
                      "accepted must be (B,) beside mean, not ", accepted->sizes(), " on ", accepted->device());
    TORCH_CHECK_TYPE(accepted->scalar_type() == at::kBool, "accepted must be bool, not ", accepted->scalar_type());
  }
}

inline void check_labels(const at::Tensor& rows, const at::Tensor& labels) {
  TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == rows.size(0), "labels must be (B,) = (", rows.size(0),
                    ",), not ", labels.sizes());
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kLong, "labels must be int64, not ", labels.scalar_type());
}

}  // namespace tal_fast
