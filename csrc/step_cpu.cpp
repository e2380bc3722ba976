// The whole TAL step on the CPU in one call: statistics, search, sums, loss, gradient and push, with or without an
// autograd graph. At B = 128, C = 100 the calls between Python and four separate operators took longer than their work.
#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "ops_cpu.h"

namespace tal_fast {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using OutputsAndGradient = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The step without the push.
Forward step_forward(const Tensor& logits, const Tensor& features, const Tensor& labels, const Tensor& queue_mean,
                     const Tensor& queue_std, const Tensor& cursor, const std::optional<Tensor>& index, bool released,
                     double t_min, double t_max, std::optional<double> t_wrong, double confidence_threshold,
                     double label_smoothing, int64_t ignore_index, bool warmup, int64_t reduction,
                     const std::optional<Tensor>& class_weight, bool need_grad) {
  // Rounded once for the row losses and for the sum they are divided by.
  std::optional<Tensor> weight;
  if (class_weight) weight = class_weight->to(logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const LossOptions options{released,        t_min,        t_max,  t_wrong,   confidence_threshold,
                            label_smoothing, ignore_index, warmup, reduction, weight};
  double summary[kSummary] = {};
  const Statistics s =
      statistics_distance(features, labels, queue_mean, queue_std, cursor, ignore_index, index, weight, summary);
  const auto [out, grad] = loss_and_gradient(logits, labels, s.distance, summary, false, options, need_grad);
  return {out.loss, grad,       s.mean,          s.std,     s.distance, out.typicalness,
          out.weight, out.temperature, out.correct, out.accepted};
}

// Attaches a gradient that is already computed to its loss. The logits are the only autograd input, and the computed
// tensors bypass the wrapper, which saves it work.
struct Attach : Function<Attach> {
  struct Computed {
    Tensor loss, gradient;
  };

  static Tensor forward(AutogradContext* ctx, const Tensor& /*logits*/, const Computed& computed) {
    ctx->save_for_backward({computed.gradient});
    return computed.loss;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "the gradient of the TAL loss is a constant to autograd, and a second derivative (create_graph=True) "
                "would miss terms; use backend='reference' for it");
    const Tensor gradient = ctx->get_saved_variables()[0];
    // An upstream gradient of 1, which loss.backward() gives, costs no pass over memory. The engine casts the product
    // to the logits' dtype: under a gradient scaler a float16 product keeps small values that float16 factors lose.
    const bool kept = torch::autograd::get_current_graph_task_keep_graph();
    const bool per_row = upstream[0].dim() == 1;
    if (!kept && !per_row && upstream[0].item<double>() == 1) return {gradient, Tensor()};
    Tensor factor = upstream[0].to(gradient.scalar_type());
    if (per_row) factor = factor.unsqueeze(1);
    return {kept ? gradient * factor : gradient.mul_(factor), Tensor()};
  }
};

// The operators compute with plain values: forward-mode derivatives and torch.func transforms would see a constant.
void refuse_transforms(const Tensor& logits) {
  if (const auto& layers = at::functorch::functorchTLSAccessor()) layers->checkSupportsCppAutogradFunction();
  TORCH_CHECK(!logits._fw_grad(/*level=*/0).defined(),
              "forward-mode derivatives and torch.func transforms do not reach into the kernels of the TAL loss, nor "
              "through loss_and_gradient; use backend='reference' and the loss itself for them");
}

// The step with its push. Both parts are called through the dispatcher, so that its other keys see their arguments;
// `between` receives the results before anything is pushed.
template <typename Between>
Forward forward_and_push(const Tensor& logits, const Tensor& features, const Tensor& labels, Tensor& queue_mean,
                         Tensor& queue_std, Tensor& cursor, const std::optional<Tensor>& index, bool released,
                         double t_min, double t_max, std::optional<double> t_wrong, double confidence_threshold,
                         double label_smoothing, int64_t ignore_index, bool warmup, int64_t reduction,
                         const std::optional<Tensor>& class_weight, bool push, bool need_grad, Between between) {
  static const auto forward_op = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("tal_fast::step_forward", "")
                                     .typed<decltype(step_forward)>();
  static const auto push_op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tal_fast::push_", "").typed<decltype(push_cpu)>();
  refuse_transforms(logits);
  Forward out = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op.call(logits, features, labels, queue_mean, queue_std, cursor, index, released, t_min, t_max,
                           t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup, reduction,
                           class_weight, need_grad);
  }();
  between(out);
  if (push) {
    at::AutoDispatchBelowADInplaceOrView guard;
    push_op.call(queue_mean, queue_std, cursor, std::get<2>(out), std::get<3>(out), std::get<9>(out), index);
  }
  return out;
}

Outputs step(const Tensor& logits, const Tensor& features, const Tensor& labels, Tensor& queue_mean, Tensor& queue_std,
             Tensor& cursor, const std::optional<Tensor>& index, bool released, double t_min, double t_max,
             std::optional<double> t_wrong, double confidence_threshold, double label_smoothing, int64_t ignore_index,
             bool warmup, int64_t reduction, const std::optional<Tensor>& class_weight, bool push) {
  const bool need_grad = at::GradMode::is_enabled() && logits.requires_grad();
  // Before the push, because activation checkpointing stops a recomputed step where the gradient is saved.
  const auto attach = [&](Forward& out) {
    auto& loss = std::get<0>(out);
    if (!need_grad) return;
    loss = Attach::apply(logits, Attach::Computed{loss, std::get<1>(out)});
    // Whatever is computed from an ignored row's loss of 0, its logits have a gradient of 0.
    if (reduction == at::Reduction::None) loss = loss.masked_fill(labels == ignore_index, 0);
  };
  auto [loss, gradient, mean, std, distance, typicalness, weight, temperature, correct, accepted] =
      forward_and_push(logits, features, labels, queue_mean, queue_std, cursor, index, released, t_min, t_max, t_wrong,
                       confidence_threshold, label_smoothing, ignore_index, warmup, reduction, class_weight, push,
                       need_grad, attach);
  return {loss, distance, typicalness, weight, temperature, correct, accepted};
}

OutputsAndGradient step_with_gradient(const Tensor& logits, const Tensor& features, const Tensor& labels,
                                      Tensor& queue_mean, Tensor& queue_std, Tensor& cursor,
                                      const std::optional<Tensor>& index, bool released, double t_min, double t_max,
                                      std::optional<double> t_wrong, double confidence_threshold,
                                      double label_smoothing, int64_t ignore_index, bool warmup, int64_t reduction,
                                      const std::optional<Tensor>& class_weight, bool push) {
  auto [loss, gradient, mean, std, distance, typicalness, weight, temperature, correct, accepted] = forward_and_push(
      logits, features, labels, queue_mean, queue_std, cursor, index, released, t_min, t_max, t_wrong,
      confidence_threshold, label_smoothing, ignore_index, warmup, reduction, class_weight, push, /*need_grad=*/true,
      [](Forward&) {});
  return {loss, gradient, distance, typicalness, weight, temperature, correct, accepted};
}

}  // namespace
}  // namespace tal_fast

TORCH_LIBRARY_IMPL(tal_fast, CPU, m) {
  m.impl("step_forward", &tal_fast::step_forward);
  m.impl("step", &tal_fast::step);
  m.impl("step_with_gradient", &tal_fast::step_with_gradient);
}
TORCH_LIBRARY_IMPL(tal_fast, AutogradCPU, m) {
  m.impl("step", &tal_fast::step);
  m.impl("step_with_gradient", &tal_fast::step_with_gradient);
}
