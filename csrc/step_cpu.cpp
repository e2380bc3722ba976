// The whole TAL step on the CPU in one call: statistics, search, sums, loss, gradient and push, with its place in the
// autograd graph. At B = 128, C = 100 the calls between Python and four operators took longer than their work.
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

Forward step_forward(const Tensor& logits, const Tensor& features, const Tensor& labels, const Tensor& queue_mean,
                     const Tensor& queue_std, const Tensor& cursor, const std::optional<Tensor>& index, bool released,
                     double t_min, double t_max, std::optional<double> t_wrong, double confidence_threshold,
                     double label_smoothing, int64_t ignore_index, bool warmup, bool need_grad) {
  const LossOptions options{released, t_min, t_max, t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup};
  double summary[kSummary] = {};
  const Statistics s =
      statistics_distance(features, labels, queue_mean, queue_std, cursor, ignore_index, index, summary);
  const auto [out, grad] = loss_and_gradient(logits, labels, s.distance, summary, false, options, need_grad);
  return {out.loss, grad,       s.mean,          s.std,     s.distance, out.typicalness,
          out.weight, out.temperature, out.right, out.accepted};
}

// Gives a loss whose gradient is known its place in the autograd graph.
struct Attach : Function<Attach> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const Tensor& loss, const Tensor& gradient) {
    ctx->save_for_backward({gradient});
    ctx->saved_data["dtype"] = static_cast<int64_t>(logits.scalar_type());
    return loss.tensor_data();  // no view, which `loss += ...` could not change
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "the gradient of the TAL loss is a constant to autograd, and a second derivative (create_graph=True) "
                "would miss terms; use backend='reference' for it");
    const Tensor gradient = ctx->get_saved_variables()[0];
    const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
    const Tensor factor = upstream[0].to(gradient.scalar_type());
    // Multiplied before the cast: under a gradient scaler a float16 product keeps what float16 factors lose.
    if (gradient.scalar_type() != dtype || torch::autograd::get_current_graph_task_keep_graph())
      return {(gradient * factor).to(dtype), Tensor(), Tensor()};
    // loss.backward() gives 1, which costs no pass over memory.
    return {upstream[0].item<double>() == 1 ? gradient : gradient.mul_(factor), Tensor(), Tensor()};
  }
};

// Its parts are called as operators, so that whatever else the dispatcher does for their arguments is done.
Outputs step(const Tensor& logits, const Tensor& features, const Tensor& labels, Tensor& queue_mean, Tensor& queue_std,
             Tensor& cursor, const std::optional<Tensor>& index, bool released, double t_min, double t_max,
             std::optional<double> t_wrong, double confidence_threshold, double label_smoothing, int64_t ignore_index,
             bool warmup, bool push) {
  static const auto forward_op = c10::Dispatcher::singleton()
                                     .findSchemaOrThrow("tal_fast::step_forward", "")
                                     .typed<decltype(step_forward)>();
  static const auto push_op =
      c10::Dispatcher::singleton().findSchemaOrThrow("tal_fast::push_", "").typed<decltype(push_cpu)>();
  const bool need_grad = at::GradMode::is_enabled() && logits.requires_grad();
  auto [loss, grad, mean, std, distance, typicalness, weight, temperature, right, accepted] = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op.call(logits, features, labels, queue_mean, queue_std, cursor, index, released, t_min, t_max,
                           t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup, need_grad);
  }();
  if (need_grad) loss = Attach::apply(logits, loss, grad);
  if (push) {
    at::AutoDispatchBelowADInplaceOrView guard;
    push_op.call(queue_mean, queue_std, cursor, mean, std, accepted, index);
  }
  return {loss, distance, typicalness, weight, temperature, right, accepted};
}

}  // namespace
}  // namespace tal_fast

TORCH_LIBRARY_IMPL(tal_fast, CPU, m) {
  m.impl("step_forward", &tal_fast::step_forward);
  m.impl("step", &tal_fast::step);
}
TORCH_LIBRARY_IMPL(tal_fast, AutogradCPU, m) { m.impl("step", &tal_fast::step); }
