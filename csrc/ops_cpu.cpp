// CPU operators: argument checks, threads and dtypes around the row kernels of kernels_cpu.inc.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels_cpu.h"
#include "ops_cpu.h"
#include "queue.h"
#include "ring.h"

namespace tal_fast {
namespace {

using at::Tensor;

constexpr double kNormEps = 1e-7;   // added to a row's norm; reference.NORM_EPS
constexpr double kRangeEps = 1e-8;  // added to the batch's distance range; reference.RANGE_EPS

// Call body(T{}) with T = double for float64, and float otherwise.
template <typename F>
void for_float_or_double(at::ScalarType type, F&& body) {
  if (type == at::kDouble) {
    body(double{});
  } else {
    body(float{});
  }
}

at::ScalarType compute_type(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Rows of a (B, C) tensor as contiguous values of type T. Rows that are so already are used in place, others are
// converted one at a time.
template <typename T>
class Rows {
 public:
  explicit Rows(const Tensor& t) : tensor_(t), first_(nullptr), step_(t.stride(0)) {
    if (t.scalar_type() == c10::CppTypeToScalarType<T>::value && (t.stride(1) == 1 || t.size(1) == 1))
      first_ = t.const_data_ptr<T>();
  }

  // `buffer` holds size(1) values; a converted row is written there.
  const T* row(int64_t i, T* buffer) const {
    if (first_) return first_ + i * step_;
    const int64_t n = tensor_.size(1), stride = tensor_.stride(1);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor_.scalar_type(), "tal_fast", [&] {
      const scalar_t* p = tensor_.const_data_ptr<scalar_t>() + i * step_;
      for (int64_t c = 0; c < n; ++c) buffer[c] = static_cast<T>(p[c * stride]);
    });
    return buffer;
  }

 private:
  const Tensor& tensor_;
  const T* first_;  // null where rows are converted
  int64_t step_;
};

// Memory for one row of the gradient: the tensor's own if its rows are contiguous values of type T, else a buffer that
// is converted at the end of the row.
template <typename T>
class GradientRow {
 public:
  explicit GradientRow(const Tensor& grad) : tensor_(grad), first_(nullptr), step_(0) {
    if (!grad.defined()) return;
    step_ = grad.stride(0);
    if (grad.scalar_type() == c10::CppTypeToScalarType<T>::value)
      first_ = grad.mutable_data_ptr<T>();
    else
      buffer_.resize(static_cast<size_t>(grad.size(1)));
  }

  // Null if no gradient is computed.
  T* start(int64_t i) { return first_ ? first_ + i * step_ : buffer_.empty() ? nullptr : buffer_.data(); }

  void finish(int64_t i) {
    if (buffer_.empty()) return;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, tensor_.scalar_type(), "tal_fast", [&] {
      scalar_t* p = tensor_.mutable_data_ptr<scalar_t>() + i * step_;
      for (size_t c = 0; c < buffer_.size(); ++c) p[c] = static_cast<scalar_t>(buffer_[c]);
    });
  }

 private:
  const Tensor& tensor_;
  T* first_;  // null where rows are converted
  int64_t step_;
  std::vector<T> buffer_;
};

// Rows per task: 65,536 values are 20 (statistics) to 100 (loss) microseconds of work. Waking a thread costs about
// 10 microseconds, and milliseconds when data-loading processes occupy the other cores.
int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, columns)); }

// View of a queue's tensors. Searching writes nothing, so that they may come from const tensors.
template <typename T>
Ring<T> ring_of(const Tensor& queue_mean, const Tensor& queue_std, const Tensor& cursor,
                const std::optional<Tensor>& index) {
  const int64_t capacity = queue_mean.numel();
  TORCH_CHECK_VALUE(!index || (index->scalar_type() == at::kByte && index->is_contiguous() &&
                               index->device().is_cpu() && index->numel() == QueueIndex<T>::bytes(capacity)),
                    "index must be ", QueueIndex<T>::bytes(capacity), " contiguous bytes on the CPU");
  return Ring<T>(const_cast<T*>(queue_mean.const_data_ptr<T>()), const_cast<T*>(queue_std.const_data_ptr<T>()),
                 const_cast<int64_t*>(cursor.const_data_ptr<int64_t>()), capacity,
                 index ? const_cast<uint8_t*>(index->const_data_ptr<uint8_t>()) : nullptr);
}

// Raise the error of an operator that found the cursor not valid; as in tal_fast.loss.ring.
void check_cursor(bool valid, const Tensor& queue_mean, const Tensor& cursor) {
  if (valid) return;
  const int64_t* c = cursor.const_data_ptr<int64_t>();
  TORCH_CHECK(false, "the queue's cursor (", c[0], ", ", c[1], ") lies outside a ring of ", queue_mean.numel(),
              " entries: never initialised, or overwritten; call reset_parameters() or load a state");
}

}  // namespace

void push_cpu(Tensor& queue_mean, Tensor& queue_std, Tensor& cursor, const Tensor& mean, const Tensor& std,
              const std::optional<Tensor>& accepted, const std::optional<Tensor>& index) {
  check_queue(queue_mean, queue_std, cursor);
  check_entries(queue_mean, mean, std, accepted);
  const Tensor m = mean.contiguous(), s = std.contiguous();
  const Tensor keep = accepted ? accepted->contiguous() : Tensor();
  const bool* kept = keep.defined() ? keep.const_data_ptr<bool>() : nullptr;
  for_float_or_double(queue_mean.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    check_cursor(ring_of<T>(queue_mean, queue_std, cursor, index)
                     .push(m.const_data_ptr<T>(), s.const_data_ptr<T>(), kept, m.numel()),
                 queue_mean, cursor);
  });
}

namespace {

// Distances to the nearest entry.
template <typename T>
void search(const Tensor& queue_mean, const Tensor& queue_std, const Tensor& cursor,
            const std::optional<Tensor>& index, const T* m, const T* s, int64_t batch, T* distance) {
  const auto parallel_for = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
    at::parallel_for(begin, end, grain, body);
  };
  check_cursor(ring_of<T>(queue_mean, queue_std, cursor, index)
                   .nearest(m, s, batch, distance, at::get_num_threads(), parallel_for),
               queue_mean, cursor);
}

Tensor nearest_cpu(const Tensor& queue_mean, const Tensor& queue_std, const Tensor& cursor, const Tensor& mean,
                   const Tensor& std, const std::optional<Tensor>& index) {
  check_queue(queue_mean, queue_std, cursor);
  check_entries(queue_mean, mean, std, std::nullopt);
  const Tensor m = mean.contiguous(), s = std.contiguous();
  Tensor distance = at::empty(m.sizes(), m.options());
  for_float_or_double(queue_mean.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    search<T>(queue_mean, queue_std, cursor, index, m.const_data_ptr<T>(), s.const_data_ptr<T>(), m.numel(),
              distance.mutable_data_ptr<T>());
  });
  return distance;
}

}  // namespace

// Sum of the class weights of the rows' labels. Labels out of range, which the loss refuses, count as 0.
static double sum_of_weights(const Tensor& labels, const Tensor& class_weight, int64_t ignore_index) {
  TORCH_CHECK_VALUE(class_weight.dim() == 1, "class_weight must be (C,), not ", class_weight.sizes());
  const Tensor weights = class_weight.to(compute_type(class_weight)).contiguous();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  double sum = 0;
  for_float_or_double(weights.scalar_type(), [&](auto zero) {
    const auto* weight = weights.const_data_ptr<decltype(zero)>();
    for (int64_t b = 0; b < labels.numel(); ++b)
      if (label[b] != ignore_index && label[b] >= 0 && label[b] < weights.numel()) sum += weight[label[b]];
  });
  return sum;
}

Statistics statistics_distance(const Tensor& features, const Tensor& labels, const Tensor& queue_mean,
                               const Tensor& queue_std, const Tensor& cursor, int64_t ignore_index,
                               const std::optional<Tensor>& index, const std::optional<Tensor>& class_weight,
                               double* summary) {
  check_queue(queue_mean, queue_std, cursor);
  TORCH_CHECK_VALUE(features.dim() == 2 && features.size(1) >= 2, "features must be (B, D) with D >= 2, not ",
                    features.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(features.scalar_type()), "features must be floating point, not ",
                   features.scalar_type());
  check_labels(features, labels);
  const int64_t batch_size = features.size(0), width = features.size(1);
  const auto options = queue_mean.options();
  Statistics out{at::empty({batch_size}, options), at::empty({batch_size}, options), at::empty({batch_size}, options)};
  const Tensor y = labels.contiguous();

  for_float_or_double(queue_mean.scalar_type(), [&](auto queue_zero) {
    using Q = decltype(queue_zero);
    Q *pm = out.mean.mutable_data_ptr<Q>(), *ps = out.std.mutable_data_ptr<Q>(),
      *pd = out.distance.mutable_data_ptr<Q>();
    for_float_or_double(compute_type(features), [&](auto zero) {
      using T = decltype(zero);
      const Rows<T> rows(features);
      const auto& kernels = cpu_kernels<T>();
      at::parallel_for(0, batch_size, rows_per_task(width), [&](int64_t begin, int64_t end) {
        std::vector<T> buffer(static_cast<size_t>(width));
        for (int64_t b = begin; b < end; ++b) {
          double m, s;
          kernels.mean_std(rows.row(b, buffer.data()), width, &m, &s);
          pm[b] = static_cast<Q>(m);
          ps[b] = static_cast<Q>(s);
        }
      });
    });
    search<Q>(queue_mean, queue_std, cursor, index, pm, ps, batch_size, pd);

    const int64_t* label = y.const_data_ptr<int64_t>();
    double smallest = std::numeric_limits<double>::infinity(), largest = -smallest, valid = 0;
    for (int64_t b = 0; b < batch_size; ++b) {
      if (label[b] == ignore_index) continue;
      valid += 1;
      if (!std::isfinite(pd[b])) continue;
      smallest = std::min<double>(smallest, pd[b]);
      largest = std::max<double>(largest, pd[b]);
    }
    summary[0] = smallest;
    summary[1] = largest;
    summary[2] = summary[6] = valid;
  });
  if (class_weight) summary[6] = sum_of_weights(y, *class_weight, ignore_index);
  return out;
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> statistics_distance_cpu(const Tensor& features, const Tensor& labels,
                                                                   const Tensor& queue_mean, const Tensor& queue_std,
                                                                   const Tensor& cursor, int64_t ignore_index,
                                                                   const std::optional<Tensor>& index,
                                                                   const std::optional<Tensor>& class_weight) {
  Tensor batch = at::zeros({kSummary}, at::kDouble);
  const Statistics s = statistics_distance(features, labels, queue_mean, queue_std, cursor, ignore_index, index,
                                           class_weight, batch.mutable_data_ptr<double>());
  return {s.mean, s.std, s.distance, batch};
}

template <typename T>
bool is_accepted(const RowScan<T>& scan, bool correct, double threshold) {
  const T cosine = scan.largest / scan.unit / (scan.norm + static_cast<T>(kNormEps) / scan.unit);
  return correct && scan.finite && cosine > static_cast<T>(threshold);
}

void check_loss_inputs(const Tensor& logits, const Tensor& labels, const Tensor& distance) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1, "logits must be (B, C) with C >= 1, not ",
                    logits.sizes());
  TORCH_CHECK_TYPE(at::isFloatingType(logits.scalar_type()), "logits must be floating point, not ",
                   logits.scalar_type());
  check_labels(logits, labels);
  TORCH_CHECK_VALUE(distance.dim() == 1 && distance.size(0) == logits.size(0), "distance must be (B,) = (",
                    logits.size(0), ",), not ", distance.sizes());
}

void check_summary(const Tensor& batch) {
  TORCH_CHECK_VALUE(batch.numel() == kSummary && batch.scalar_type() == at::kDouble && batch.is_contiguous(),
                    "batch must be ", kSummary, " contiguous float64 values");
}

template <typename T>
std::vector<RowScan<T>> scan_rows(const Rows<T>& rows, int64_t batch_size, int64_t classes) {
  std::vector<RowScan<T>> scans(static_cast<size_t>(batch_size));
  const auto& kernels = cpu_kernels<T>();
  at::parallel_for(0, batch_size, rows_per_task(classes), [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(static_cast<size_t>(classes));
    for (int64_t b = begin; b < end; ++b) scans[b] = kernels.scan_row(rows.row(b, buffer.data()), classes);
  });
  return scans;
}

// Write the values 3 to 5 of `summary`, which variant `released` needs before the loss of any row.
template <typename T>
void add_sums(const std::vector<RowScan<T>>& scans, const int64_t* label, const Tensor& distance,
              double confidence_threshold, int64_t ignore_index, double* summary) {
  const Tensor d = distance.contiguous();
  for_float_or_double(d.scalar_type(), [&](auto zero) {
    const auto* pd = d.const_data_ptr<decltype(zero)>();
    double accepted = 0, weight_1 = 0, distances = 0;
    for (size_t b = 0; b < scans.size(); ++b) {
      if (label[b] == ignore_index) continue;
      const bool correct = scans[b].argmax == label[b];
      accepted += is_accepted(scans[b], correct, confidence_threshold);
      if (correct && std::isfinite(pd[b])) {
        distances += pd[b];
      } else {
        weight_1 += 1;
      }
    }
    summary[3] = accepted;
    summary[4] = weight_1;
    summary[5] = distances;
  });
}

Tensor batch_sums_cpu(const Tensor& logits, const Tensor& labels, const Tensor& distance, const Tensor& batch,
                      double confidence_threshold, int64_t ignore_index) {
  check_loss_inputs(logits, labels, distance);
  check_summary(batch);
  const Tensor y = labels.contiguous();
  Tensor out = batch.clone();
  for_float_or_double(compute_type(logits), [&](auto zero) {
    using T = decltype(zero);
    add_sums(scan_rows(Rows<T>(logits), logits.size(0), logits.size(1)), y.const_data_ptr<int64_t>(), distance,
             confidence_threshold, ignore_index, out.mutable_data_ptr<double>());
  });
  return out;
}

// Mean weight of the batch from its summary; see tal_fast.loss.reference.mean_weight.
double mean_weight(const double* batch, bool warmup) {
  const double n_valid = batch[2], n_weighted = n_valid - batch[4];
  if (warmup || batch[3] == n_valid || n_weighted <= 0) return 1;
  return (batch[4] + n_weighted - (batch[5] - n_weighted * batch[0]) / (batch[1] - batch[0] + kRangeEps)) / n_valid;
}

// Divisor of a mean; see tal_fast.loss.reference.mean_divisor.
double mean_divisor(const double* batch) {
  if (batch[2] <= 0) return 1;
  return batch[6] > 0 ? batch[6] : std::numeric_limits<double>::quiet_NaN();
}

// Class weights as row losses use them. With label smoothing ε, F.cross_entropy gives a row of label y the targets
// a_c = (1 - ε) w_y [c = y] + ε w_c / C, which sum to `scale(y)`: its loss is that many times a cross-entropy whose
// smoothing is `smoothing(y)`, spread over the classes as `shares`.
template <typename T>
class ClassWeights {
 public:
  ClassWeights(const std::optional<Tensor>& weight, int64_t classes, double smoothing) : smoothing_(smoothing) {
    if (!weight) return;
    TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == classes, "class_weight must be (C,) = (", classes,
                      ",), not ", weight->sizes());
    weight_ = weight->to(c10::CppTypeToScalarType<T>::value).contiguous();
    first_ = weight_.const_data_ptr<T>();
    if (smoothing == 0) return;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += first_[c];
    mean_ = sum / static_cast<double>(classes);
    shares_.resize(static_cast<size_t>(classes));
    for (int64_t c = 0; c < classes; ++c) shares_[c] = sum > 0 ? static_cast<T>(first_[c] / sum) : T(0);
  }

  double scale(int64_t label) const {
    return first_ ? (1 - smoothing_) * first_[label] + smoothing_ * mean_ : 1;
  }
  double smoothing(int64_t label) const {
    const double whole = scale(label);
    return shares_.empty() || whole == 0 ? smoothing_ : smoothing_ * mean_ / whole;
  }
  // Null where all are 1 / C.
  const T* shares() const { return shares_.empty() ? nullptr : shares_.data(); }

 private:
  double smoothing_, mean_ = 0;
  Tensor weight_;
  const T* first_ = nullptr;
  std::vector<T> shares_;
};

// Loss, and gradient into `grad` if it is defined: (B, C) of any floating dtype, possibly `logits` itself. Unless
// `summed`, the sums of variant `released` are added to `summary` first.
LossOutput loss_into(const Tensor& logits, const Tensor& labels, const Tensor& distance, double* summary, bool summed,
                     const LossOptions& o, const Tensor& grad) {
  check_loss_inputs(logits, labels, distance);
  const int64_t batch_size = logits.size(0), classes = logits.size(1);
  const Tensor y = labels.contiguous();
  const int64_t* label = y.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < batch_size; ++b)
    TORCH_CHECK_VALUE(label[b] == o.ignore_index || (label[b] >= 0 && label[b] < classes), "label ", label[b],
                      " in row ", b, " is outside [0, ", classes, "); give it a class or ignore_index = ",
                      o.ignore_index);

  const auto type = compute_type(logits);
  const auto options = logits.options().dtype(type);
  const auto flags = logits.options().dtype(at::kBool);
  const bool per_row = o.reduction == at::Reduction::None;
  LossOutput out{per_row ? at::empty({batch_size}, options) : at::empty({}, options),
                 at::empty({batch_size}, options),
                 at::empty({batch_size}, options),
                 at::empty({batch_size}, options),
                 at::empty({batch_size}, flags),
                 at::empty({batch_size}, flags)};

  for_float_or_double(type, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> rows(logits);
    std::vector<RowScan<T>> scans;
    if (o.released && !summed) {
      scans = scan_rows(rows, batch_size, classes);
      add_sums(scans, label, distance, o.confidence_threshold, o.ignore_index, summary);
    }
    const ClassWeights<T> weights(o.class_weight, classes, o.label_smoothing);
    const double divisor = o.reduction == at::Reduction::Mean ? mean_divisor(summary) : 1;
    const double w_bar = o.released ? mean_weight(summary, o.warmup) : 0;
    const bool inactive = o.warmup || (o.released && summary[3] == summary[2]);
    const Tensor d = distance.to(type).contiguous();
    const T* pd = d.const_data_ptr<T>();
    T *tau = out.typicalness.mutable_data_ptr<T>(), *w = out.weight.mutable_data_ptr<T>(),
      *temp = out.temperature.mutable_data_ptr<T>();
    bool *correct = out.correct.mutable_data_ptr<bool>(), *accept = out.accepted.mutable_data_ptr<bool>();
    const T d_min = static_cast<T>(summary[0]), range = static_cast<T>(summary[1]) - d_min + static_cast<T>(kRangeEps);
    const auto& kernels = cpu_kernels<T>();
    std::vector<T> row_buffer(per_row ? 0 : static_cast<size_t>(batch_size));
    T* const row_losses = per_row ? out.loss.mutable_data_ptr<T>() : row_buffer.data();
    at::parallel_for(0, batch_size, rows_per_task(classes), [&](int64_t begin, int64_t end) {
      std::vector<T> buffer(static_cast<size_t>(classes)), work(static_cast<size_t>(row_work_size(classes)));
      GradientRow<T> gradient(grad);
      for (int64_t b = begin; b < end; ++b) {
        T* row_grad = gradient.start(b);
        if (label[b] == o.ignore_index) {
          tau[b] = 1, w[b] = 0, temp[b] = static_cast<T>(o.t_min), correct[b] = accept[b] = false, row_losses[b] = 0;
          if (row_grad) std::fill_n(row_grad, classes, T(0));
          gradient.finish(b);
          continue;
        }
        const T* z = rows.row(b, buffer.data());
        const RowScan<T> scan = scans.empty() ? kernels.scan_row(z, classes) : scans[b];
        correct[b] = scan.argmax == label[b];
        accept[b] = is_accepted(scan, correct[b], o.confidence_threshold);
        tau[b] = inactive || !std::isfinite(pd[b]) ? T(1) : 1 - (pd[b] - d_min) / range;
        w[b] = correct[b] ? tau[b] : T(1);
        temp[b] = !correct[b] && o.t_wrong ? static_cast<T>(*o.t_wrong)
                                       : static_cast<T>(o.t_min) + (1 - tau[b]) * static_cast<T>(o.t_max - o.t_min);
        if (scan.finite) {
          const auto row_loss = scan.unit == 1 ? kernels.row_loss : &row_loss_of_huge_logits<T>;
          const double scale = weights.scale(label[b]);
          row_losses[b] = static_cast<T>(scale) *
                          row_loss(z, classes, label[b], scan, temp[b], o.released ? static_cast<T>(w_bar) : w[b],
                                   static_cast<T>(weights.smoothing(label[b])), weights.shares(),
                                   static_cast<T>(kNormEps), static_cast<T>(scale / divisor), work.data(), row_grad);
        } else {
          // Cross-entropy is not finite here either, or, with a logit of -inf, the direction is undefined.
          row_losses[b] = std::numeric_limits<T>::quiet_NaN();
          if (row_grad) std::fill_n(row_grad, classes, std::numeric_limits<T>::quiet_NaN());
        }
        gradient.finish(b);
      }
    });
    if (per_row) return;
    double sum = 0;
    for (const T row : row_buffer) sum += row;
    *out.loss.mutable_data_ptr<T>() = static_cast<T>(sum / divisor);
  });
  return out;
}

// Copy of a checked summary.
std::array<double, kSummary> read_summary(const Tensor& batch) {
  check_summary(batch);
  std::array<double, kSummary> summary;
  std::copy_n(batch.const_data_ptr<double>(), kSummary, summary.begin());
  return summary;
}

}  // namespace

std::pair<LossOutput, Tensor> loss_and_gradient(const Tensor& logits, const Tensor& labels, const Tensor& distance,
                                                double* summary, bool summed, const LossOptions& options,
                                                bool need_grad) {
  // float32 for float16 logits: float16 would lose small gradients before a gradient scaler multiplies them.
  const auto type = logits.scalar_type() == at::kHalf ? at::kFloat : logits.scalar_type();
  const Tensor grad = need_grad ? at::empty(logits.sizes(), logits.options().dtype(type)) : Tensor();
  LossOutput out = loss_into(logits, labels, distance, summary, summed, options, grad);
  return {out, need_grad ? grad : at::empty({0}, logits.options().dtype(type))};
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_forward_cpu(
    const Tensor& logits, const Tensor& labels, const Tensor& distance, const Tensor& batch, bool released,
    double t_min, double t_max, std::optional<double> t_wrong, double confidence_threshold, double label_smoothing,
    int64_t ignore_index, bool warmup, int64_t reduction, const std::optional<Tensor>& class_weight, bool need_grad) {
  const LossOptions options{released,        t_min,        t_max,  t_wrong,   confidence_threshold,
                            label_smoothing, ignore_index, warmup, reduction, class_weight};
  auto summary = read_summary(batch);
  const auto [out, grad] = loss_and_gradient(logits, labels, distance, summary.data(), true, options, need_grad);
  return {out.loss, grad, out.typicalness, out.weight, out.temperature, out.correct, out.accepted};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> loss_inplace_cpu(
    Tensor& logits, const Tensor& labels, const Tensor& distance, const Tensor& batch, bool released, double t_min,
    double t_max, std::optional<double> t_wrong, double confidence_threshold, double label_smoothing,
    int64_t ignore_index, bool warmup, int64_t reduction, const std::optional<Tensor>& class_weight) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_non_overlapping_and_dense() && logits.stride(1) == 1,
                    "logits must be (B, C) with contiguous rows to be overwritten");
  const LossOptions options{released,        t_min,        t_max,  t_wrong,   confidence_threshold,
                            label_smoothing, ignore_index, warmup, reduction, class_weight};
  auto summary = read_summary(batch);
  const LossOutput out = loss_into(logits, labels, distance, summary.data(), true, options, logits);
  return {out.loss, out.typicalness, out.weight, out.temperature, out.correct, out.accepted};
}

}  // namespace

int64_t index_bytes(int64_t capacity, bool double_precision) {
  if (capacity < kMinIndexedCapacity || capacity > std::numeric_limits<int32_t>::max() / 2) return 0;
  return double_precision ? QueueIndex<double>::bytes(capacity) : QueueIndex<float>::bytes(capacity);
}

}  // namespace tal_fast

TORCH_LIBRARY_IMPL(tal_fast, CPU, m) {
  m.impl("push_", &tal_fast::push_cpu);
  m.impl("nearest", &tal_fast::nearest_cpu);
  m.impl("statistics_distance", &tal_fast::statistics_distance_cpu);
  m.impl("batch_sums", &tal_fast::batch_sums_cpu);
  m.impl("loss_forward", &tal_fast::loss_forward_cpu);
  m.impl("loss_inplace_", &tal_fast::loss_inplace_cpu);
}
