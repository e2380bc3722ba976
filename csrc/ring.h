// Queue on the CPU as threads share it: ring buffer, cursor, search index, and the lock over all of them.
//
// Without PyTorch, so that tests/csrc builds it with ThreadSanitizer.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <vector>

#include "index.h"
#include "kernels_cpu.h"

namespace tal_fast {

// Lock of the queue whose cursor is at this address. 64 locks serve all queues, so that a queue remains plain tensors
// that can be copied and saved; two queues that share a lock merely wait for each other. The two locks of a step take less
// than 0.1 of 12 microseconds (B = 16, C = 100, N = 20,000; median of 6 runs with and without, in turns).
inline std::shared_mutex& lock_of(const int64_t* cursor) {
  static std::shared_mutex locks[64];
  return locks[reinterpret_cast<uintptr_t>(cursor) / 64 * 0x9E3779B97F4A7C15u >> 58];
}

template <typename T>
class Ring {
 public:
  // `cursor` is [slot of the next entry, number of entries]; `index` is null, or the memory of a QueueIndex.
  Ring(T* mean, T* std, int64_t* cursor, int64_t capacity, uint8_t* index)
      : mean_(mean), std_(std), cursor_(cursor), capacity_(capacity) {
    if (index) index_.emplace(index, capacity);
  }

  // Append the rows that are kept (all if `kept` is null) and finite; the oldest entries leave a full ring. Returns
  // false, with nothing changed, if the cursor is not valid.
  bool push(const T* mean, const T* std, const bool* kept, int64_t count) {
    const std::lock_guard<std::shared_mutex> writing(lock_of(cursor_));
    const int64_t capacity = capacity_;
    int64_t state[] = {cursor_[0], cursor_[1]};
    if (!is_valid(state[0], state[1])) return false;
    const bool index_is_current = index_ && index_->matches(state[0], state[1]);
    std::vector<T> new_mean, new_std;
    for (int64_t b = 0; b < count; ++b) {
      if ((kept && !kept[b]) || !std::isfinite(mean[b]) || !std::isfinite(std[b])) continue;
      mean_[state[0]] = mean[b];
      std_[state[0]] = std[b];
      state[0] = state[0] + 1 == capacity ? 0 : state[0] + 1;
      state[1] = std::min(state[1] + 1, capacity);
      if (!index_is_current) continue;
      new_mean.push_back(mean[b]);
      new_std.push_back(std[b]);
    }
    std::copy_n(state, 2, cursor_);
    if (index_is_current) index_->push(new_mean.data(), new_std.data(), static_cast<int64_t>(new_mean.size()));
    // A new queue, or one loaded from a checkpoint.
    if (index_ && !index_is_current) index_->rebuild(mean_, std_, state[0], state[1]);
    return true;
  }

  // Distance of each query to its nearest entry, by the index if it is up to date and by brute force otherwise;
  // parallel_for(begin, end, grain, body) runs body(begin, end) on parts of a range. Returns false if the cursor is not
  // valid.
  template <typename ParallelFor>
  bool nearest(const T* m, const T* s, int64_t batch, T* distance, int64_t threads, ParallelFor parallel_for) const {
    const std::shared_lock<std::shared_mutex> reading(lock_of(cursor_));
    const int64_t head = cursor_[0], length = cursor_[1];
    if (!is_valid(head, length)) return false;
    if (!index_ || !index_->matches(head, length)) {
      by_brute_force(length, m, s, batch, distance, threads, parallel_for);
      return true;
    }
    // 128 queries take 25 to 130 microseconds (N = 20,000 to 10,000,000).
    parallel_for(0, batch, 128, [&](int64_t begin, int64_t end) {
      index_->nearest_squared(mean_, std_, m, s, begin, end, distance);
      for (int64_t b = begin; b < end; ++b) distance[b] = std::sqrt(distance[b]);
    });
    return true;
  }

 private:
  // Uninitialised memory hardly ever is.
  bool is_valid(int64_t head, int64_t length) const {
    return head >= 0 && head < capacity_ && length >= 0 && length <= capacity_;
  }

  // Each task takes the minimum over a part of the queue, then the minimum over the tasks is taken. A minimum does not
  // depend on the order, so the result does not depend on the number of threads.
  template <typename ParallelFor>
  void by_brute_force(int64_t length, const T* m, const T* s, int64_t batch, T* distance, int64_t threads,
                      ParallelFor parallel_for) const {
    const auto& kernels = cpu_kernels<T>();
    // A task of 2^18 pairs takes about 30 microseconds.
    const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(threads, length * batch >> 18));
    const int64_t share = (length + tasks - 1) / tasks;
    std::vector<T> best(static_cast<size_t>(tasks * batch), std::numeric_limits<T>::infinity());
    parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        kernels.nearest_squared(mean_, std_, t * share, std::min(length, (t + 1) * share), m, s, batch,
                                best.data() + t * batch);
    });
    for (int64_t b = 0; b < batch; ++b) {
      T d = best[b];
      for (int64_t t = 1; t < tasks; ++t) d = std::min(d, best[t * batch + b]);
      distance[b] = std::sqrt(d);
    }
  }

  T *mean_, *std_;
  int64_t* cursor_;
  int64_t capacity_;
  std::optional<QueueIndex<T>> index_;
};

}  // namespace tal_fast
