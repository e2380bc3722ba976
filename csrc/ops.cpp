// Schemas of the tal_fast operators, which are in ops_cpu.cpp and step_cpu.cpp.
//
// A queue is a ring buffer: `queue_mean`, `queue_std` (N,) in float32 or float64, and `cursor` (2,) int64 = [next slot,
// number of entries]. It may have an `index` (index.h), which push_ updates and the search uses while it is up to date.
#include <torch/library.h>

#include <string>

#include "kernels_cpu.h"
#include "queue.h"

TORCH_LIBRARY(tal_fast, m) {
  m.def(
      "push_(Tensor(a!) queue_mean, Tensor(b!) queue_std, Tensor(c!) cursor, Tensor mean, Tensor std, "
      "Tensor? accepted=None, Tensor(d!)? index=None) -> ()");
  m.def(
      "nearest(Tensor queue_mean, Tensor queue_std, Tensor cursor, Tensor mean, Tensor std, Tensor? index=None) -> "
      "Tensor");
  // -> mean, std, distance (B,) in the queue's dtype, and batch (7,) float64 (tal_fast.loss.reference.batch_summary),
  // with zeros for the sums that need the logits.
  m.def(
      "statistics_distance(Tensor features, Tensor labels, Tensor queue_mean, Tensor queue_std, Tensor cursor, "
      "int ignore_index, Tensor? index=None, Tensor? class_weight=None) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> batch (7,) with the sums that variant `released` needs before the loss of any row.
  m.def(
      "batch_sums(Tensor logits, Tensor labels, Tensor distance, Tensor batch, float confidence_threshold, "
      "int ignore_index) -> Tensor");
  // -> loss () or, with reduction 0, (B,); gradient (B, C) or empty, typicalness, weight, temperature (B,), correct,
  // accepted (B,) bool. `reduction` is that of at::Reduction: 0 none, 1 mean, 2 sum. class_weight: (C,) floating point.
  m.def(
      "loss_forward(Tensor logits, Tensor labels, Tensor distance, Tensor batch, bool released, float t_min, "
      "float t_max, float? t_wrong, float confidence_threshold, float label_smoothing, int ignore_index, bool warmup, "
      "int reduction, Tensor? class_weight, bool need_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // As loss_forward, with the gradient written over the logits.
  m.def(
      "loss_inplace_(Tensor(a!) logits, Tensor labels, Tensor distance, Tensor batch, bool released, float t_min, "
      "float t_max, float? t_wrong, float confidence_threshold, float label_smoothing, int ignore_index, bool warmup, "
      "int reduction, Tensor? class_weight) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The step without the push -> loss, gradient or empty, mean, std, distance, typicalness, weight,
  // temperature, correct, accepted.
  m.def(
      "step_forward(Tensor logits, Tensor features, Tensor labels, Tensor queue_mean, Tensor queue_std, Tensor cursor, "
      "Tensor? index, bool released, float t_min, float t_max, float? t_wrong, float confidence_threshold, "
      "float label_smoothing, int ignore_index, bool warmup, int reduction, Tensor? class_weight, bool need_grad) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // The whole step -> loss, distance, typicalness, weight, temperature, correct, accepted. The loss is
  // differentiable by the logits; entries are pushed if `push`. torch.compile uses the parts instead.
  m.def(
      "step(Tensor logits, Tensor features, Tensor labels, Tensor(a!) queue_mean, Tensor(b!) queue_std, "
      "Tensor(c!) cursor, Tensor(d!)? index, bool released, float t_min, float t_max, float? t_wrong, "
      "float confidence_threshold, float label_smoothing, int ignore_index, bool warmup, int reduction, "
      "Tensor? class_weight, bool push) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // As step, without an autograd graph -> loss, its gradient by the logits, distance, ...
  m.def(
      "step_with_gradient(Tensor logits, Tensor features, Tensor labels, Tensor(a!) queue_mean, Tensor(b!) queue_std, "
      "Tensor(c!) cursor, Tensor(d!)? index, bool released, float t_min, float t_max, float? t_wrong, "
      "float confidence_threshold, float label_smoothing, int ignore_index, bool warmup, int reduction, "
      "Tensor? class_weight, bool push) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // Bytes of the `index` (uint8) of a queue; 0 for capacities at which brute force is as fast.
  m.def("index_bytes(int capacity, bool double_precision) -> int", &tal_fast::index_bytes);
  m.def("cpu_isa() -> str", [] { return std::string(tal_fast::cpu_isa()); });
}
