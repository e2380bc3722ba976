// Parts of the CPU operators that step_cpu.cpp shares; ops.cpp has the schemas.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

namespace tal_fast {

// Number of values in the summary of a batch; see tal_fast.loss.reference.batch_summary.
constexpr int kSummary = 7;

// Mean, standard deviation and distance to the queue of each sample's features: (B,) in the queue's dtype.
struct Statistics {
  at::Tensor mean, std, distance;
};

// Feature statistics and distances; writes the values of `summary` that need no logits: the first three and the last.
Statistics statistics_distance(const at::Tensor& features, const at::Tensor& labels, const at::Tensor& queue_mean,
                               const at::Tensor& queue_std, const at::Tensor& cursor, int64_t ignore_index,
                               const std::optional<at::Tensor>& index, const std::optional<at::Tensor>& class_weight,
                               double* summary);

struct LossOptions {
  bool released;
  double t_min, t_max;
  std::optional<double> t_wrong;
  double confidence_threshold, label_smoothing;
  int64_t ignore_index;
  bool warmup;
  int64_t reduction;  // at::Reduction
  std::optional<at::Tensor> class_weight;  // (C,)
};

struct LossOutput {
  at::Tensor loss;                              // (), or (B,) without a reduction
  at::Tensor typicalness, weight, temperature;  // (B,)
  at::Tensor correct, accepted;                 // (B,) bool
};

// Loss and gradient, which is empty unless `need_grad`. Unless `summed`, the values 3 to 5 of `summary`, which variant
// `released` needs, are computed first.
std::pair<LossOutput, at::Tensor> loss_and_gradient(const at::Tensor& logits, const at::Tensor& labels,
                                                    const at::Tensor& distance, double* summary, bool summed,
                                                    const LossOptions& options, bool need_grad);

// Append the accepted rows to the queue, and to its index if there is one.
void push_cpu(at::Tensor& queue_mean, at::Tensor& queue_std, at::Tensor& cursor, const at::Tensor& mean,
              const at::Tensor& std, const std::optional<at::Tensor>& accepted, const std::optional<at::Tensor>& index);

}  // namespace tal_fast
