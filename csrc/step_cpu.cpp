// The whole TAL step on the CPU in one operator: statistics, search, sums, loss, gradient and push, with its place in
// the autograd graph. At B = 128, C = 100 the calls between Python and four operators took longer than their work.
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

struct Queue {
  Tensor mean, std, cursor;
  std::optional<Tensor> index;
};

// -> loss, gradient (empty unless `need_grad`), distance, typicalness, weight, temperature, right, accepted. A label
// out of range is refused by the loss, before anything is pushed.
variable_list compute(const Tensor& logits, const Tensor& features, const Tensor& labels, Queue& queue,
                      const LossOptions& options, bool push, bool need_grad) {
  double summary[kSummary] = {};
  const Statistics s = statistics_distance(features, labels, queue.mean, queue.std, queue.cursor,
                                           options.ignore_index, queue.index, summary);
  const auto [out, grad] = loss_and_gradient(logits, labels, s.distance, summary, false, options, need_grad);
  if (push) push_cpu(queue.mean, queue.std, queue.cursor, s.mean, s.std, out.accepted, queue.index);
  return {out.loss, grad, s.distance, out.typicalness, out.weight, out.temperature, out.right, out.accepted};
}

// The gradient is a constant to autograd: a second derivative would silently miss terms.
struct Once : Function<Once> {
  static Tensor forward(AutogradContext*, const Tensor& gradient) { return gradient.view_as(gradient); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "the TAL loss can be differentiated once only; use backend='reference' for second derivatives");
  }
};

struct Step : Function<Step> {
  static variable_list forward(AutogradContext* ctx, const Tensor& logits, const Tensor& features,
                               const Tensor& labels, Queue& queue, const LossOptions& options, bool push) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list out = compute(logits, features, labels, queue, options, push, true);
    ctx->save_for_backward({out[1]});
    ctx->saved_data["dtype"] = static_cast<int64_t>(logits.scalar_type());
    out.erase(out.begin() + 1);
    ctx->mark_non_differentiable(variable_list(out.begin() + 1, out.end()));
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    Tensor gradient;
    {
      at::AutoGradMode off(false);
      gradient = ctx->get_saved_variables()[0];
      const auto dtype = static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt());
      const bool kept = torch::autograd::get_current_graph_task_keep_graph();
      // Multiplied before the cast: under a gradient scaler a float16 product keeps what float16 factors lose.
      if (gradient.scalar_type() != dtype || kept)
        gradient = (gradient * upstream[0].to(gradient.scalar_type())).to(dtype);
      else if (upstream[0].item<double>() != 1)  // loss.backward() gives 1, which costs no pass over memory
        gradient = gradient.mul_(upstream[0].to(gradient.scalar_type()));
    }
    if (at::GradMode::is_enabled()) gradient = Once::apply(gradient.detach().requires_grad_());
    return {gradient, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};  // as many as forward has arguments
  }
};

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs step_without_gradient(const Tensor& logits, const Tensor& features, const Tensor& labels, Tensor& queue_mean,
                              Tensor& queue_std, Tensor& cursor, const std::optional<Tensor>& index, bool released,
                              double t_min, double t_max, std::optional<double> t_wrong, double confidence_threshold,
                              double label_smoothing, int64_t ignore_index, bool warmup, bool push) {
  Queue queue{queue_mean, queue_std, cursor, index};
  const LossOptions options{released, t_min, t_max, t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup};
  const variable_list out = compute(logits, features, labels, queue, options, push, false);
  return {out[0], out[2], out[3], out[4], out[5], out[6], out[7]};
}

Outputs step(const Tensor& logits, const Tensor& features, const Tensor& labels, Tensor& queue_mean, Tensor& queue_std,
             Tensor& cursor, const std::optional<Tensor>& index, bool released, double t_min, double t_max,
             std::optional<double> t_wrong, double confidence_threshold, double label_smoothing, int64_t ignore_index,
             bool warmup, bool push) {
  if (!at::GradMode::is_enabled() || !logits.requires_grad()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return step_without_gradient(logits, features, labels, queue_mean, queue_std, cursor, index, released, t_min,
                                 t_max, t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup, push);
  }
  Queue queue{queue_mean, queue_std, cursor, index};
  const LossOptions options{released, t_min, t_max, t_wrong, confidence_threshold, label_smoothing, ignore_index, warmup};
  const variable_list out = Step::apply(logits, features.detach(), labels, queue, options, push);
  return {out[0], out[1], out[2], out[3], out[4], out[5], out[6]};
}

}  // namespace
}  // namespace tal_fast

TORCH_LIBRARY_IMPL(tal_fast, CPU, m) { m.impl("step", &tal_fast::step_without_gradient); }
TORCH_LIBRARY_IMPL(tal_fast, AutogradCPU, m) { m.impl("step", &tal_fast::step); }
