// An exact nearest-entry index over a first-in-first-out window, kept in one flat block of memory.
//
// Brute force compares a query with all N entries. Here the entries stand in runs sorted by mean, and a query looks in
// each run only as far left and right of its own mean as the difference of means alone allows: about sqrt(N) entries
// when the points spread over both axes. Runs have 512 * 2^l entries and merge like the digits of a binary counter
// (Bentley and Saxe, 1980), so that a push costs O(log N) amortised and nothing is ever deleted: an entry is dead once N
// newer ones exist, is skipped by its age, and is dropped when its run merges.
//
// Whatever the distribution the result is the brute-force minimum, to the bit; all means equal is the worst case, in
// which every entry is looked at and the cost is brute force's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels_cpu.h"

namespace tal_fast {

// Entries that wait unsorted for a run of their own. A query compares with them by brute force, 32 vectors' worth.
constexpr int64_t kBaseRun = 512;
// Below this capacity brute force is as fast: 4,096 entries are 256 vector comparisons, under 1 microsecond a query.
constexpr int64_t kIndexFrom = 4096;
constexpr int kMaxLevels = 48;

template <typename T>
class QueueIndex {
 public:
  // Bytes of the block for a queue of this capacity.
  static int64_t bytes(int64_t capacity) {
    return static_cast<int64_t>(sizeof(Header)) + entries_in_all(capacity) * kEntryBytes;
  }

  QueueIndex(uint8_t* block, int64_t capacity) : header_(reinterpret_cast<Header*>(block)), capacity_(capacity) {
    int64_t total = entries_in_all(capacity);
    means_ = reinterpret_cast<T*>(block + sizeof(Header));
    stds_ = means_ + total;
    ages_ = reinterpret_cast<int32_t*>(stds_ + total);
  }

  // Whether the index describes a ring whose cursor is (head, length).
  bool describes(int64_t head, int64_t length) const {
    return header_->magic == kMagic && header_->capacity == capacity_ && header_->head == head &&
           header_->length == length;
  }

  // Index a ring from nothing.
  void rebuild(const T* ring_mean, const T* ring_std, int64_t head, int64_t length) {
    *header_ = Header{};
    header_->magic = kMagic;
    header_->capacity = capacity_;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t slot = (head - length + i + capacity_) % capacity_;
      append(ring_mean[slot], ring_std[slot]);
    }
    header_->head = head;
    header_->length = length;
  }

  // One more entry, already in the ring, whose cursor is now (head, length).
  void push(T mean, T std, int64_t head, int64_t length) {
    append(mean, std);
    header_->head = head;
    header_->length = length;
  }

  // best[b] = squared distance to the nearest live entry, for queries [begin, end).
  void nearest_squared(const T* m, const T* s, int64_t begin, int64_t end, T* best) const {
    const auto& kernels = cpu_kernels<T>();
    std::fill(best + begin, best + end, std::numeric_limits<T>::infinity());
    const int64_t oldest = header_->pushed - header_->length;  // sequence number of the oldest live entry
    const int64_t base_start = header_->pushed - header_->base_count;
    const int64_t base_dead = std::max<int64_t>(0, oldest - base_start);
    kernels.nearest_squared(means_, stds_, base_dead, header_->base_count, m + begin, s + begin, end - begin,
                            best + begin);
    for (int level = kMaxLevels - 1; level >= 0; --level) {  // the largest run first: it brings the minimum down most
      const Run& run = header_->runs[level];
      if (run.count == 0 || run.first + run.span <= oldest) continue;
      const int64_t at = run_start(level);
      const int32_t dead = static_cast<int32_t>(std::max<int64_t>(0, oldest - run.first));
      kernels.nearest_in_run(means_ + at, stds_ + at, ages_ + at, run.count, dead, m + begin, s + begin, end - begin,
                             best + begin);
    }
  }

 private:
  static constexpr int64_t kMagic = 0x54414C5155455545;  // "TALQUEUE"
  static constexpr int64_t kEntryBytes = 2 * sizeof(T) + sizeof(int32_t);

  // Entries sorted by mean. Ages count from `first`, the sequence number of the oldest entry it was made of; `span` is
  // how many numbers it covers, dead ones included.
  struct Run {
    int64_t count, first, span;
  };
  struct Header {
    int64_t magic, capacity, head, length, pushed, base_count;
    Run runs[kMaxLevels];
  };
  static_assert(sizeof(Header) % sizeof(double) == 0, "the entries after it must be aligned");

  static int levels(int64_t capacity) {
    int n = 1;
    while ((kBaseRun << (n - 1)) < capacity) ++n;
    return n;
  }
  // The base has the first 512 places, level l the 512 * 2^l places from there on.
  static int64_t run_start(int level) { return kBaseRun << level; }
  static int64_t entries_in_all(int64_t capacity) { return run_start(levels(capacity)) + 16; }

  struct Buffer {
    std::vector<T> mean, std;
    std::vector<int32_t> age;
    int64_t first = 0, span = 0;
    void resize(int64_t n) {
      mean.resize(n);
      std.resize(n);
      age.resize(n);
    }
  };

  void append(T mean, T std) {
    means_[header_->base_count] = mean;
    stds_[header_->base_count] = std;
    ++header_->base_count;
    ++header_->pushed;
    if (header_->base_count == kBaseRun) carry();
  }

  // The full base becomes a sorted run and merges with the runs of its size, as a carry runs through a counter.
  void carry() {
    std::vector<int32_t> order(kBaseRun);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return means_[a] < means_[b] || (means_[a] == means_[b] && a < b);
    });
    Buffer carried, merged;
    carried.resize(kBaseRun);
    for (int64_t i = 0; i < kBaseRun; ++i) {
      carried.mean[i] = means_[order[i]];
      carried.std[i] = stds_[order[i]];
      carried.age[i] = order[i];
    }
    carried.first = header_->pushed - kBaseRun;
    carried.span = kBaseRun;
    header_->base_count = 0;
    const int last = levels(capacity_) - 1;
    const int64_t oldest = header_->pushed - capacity_;
    int level = 0;
    for (; level < last && header_->runs[level].count > 0; ++level) merge(level, oldest, &carried, &merged);
    if (level == last && header_->runs[last].count > 0) merge(last, oldest, &carried, &merged);
    place(last < level ? last : level, carried);
  }

  // carried = the live entries of a run (older) and of `carried` (newer), in order of their means; the run is emptied.
  void merge(int level, int64_t oldest, Buffer* carried, Buffer* out) {
    Run& run = header_->runs[level];
    const int64_t at = run_start(level), n = run.count, k = static_cast<int64_t>(carried->mean.size());
    const T *a = means_ + at, *as = stds_ + at;
    const int32_t* aa = ages_ + at;
    const int64_t dead = oldest - run.first;
    const int64_t offset = carried->first - run.first;
    out->resize(n + k);
    int64_t i = 0, j = 0, kept = 0;
    const auto keep = [&](T mean, T std, int64_t age) {
      out->mean[kept] = mean;
      out->std[kept] = std;
      out->age[kept] = static_cast<int32_t>(age);
      kept += age >= dead;
    };
    while (i < n && j < k) {
      if (carried->mean[j] < a[i]) {
        keep(carried->mean[j], carried->std[j], carried->age[j] + offset);
        ++j;
      } else {
        keep(a[i], as[i], aa[i]);
        ++i;
      }
    }
    for (; i < n; ++i) keep(a[i], as[i], aa[i]);
    for (; j < k; ++j) keep(carried->mean[j], carried->std[j], carried->age[j] + offset);
    out->resize(kept);
    // Ages count from the oldest live number, so that they stay below the capacity.
    const int64_t shift = std::max<int64_t>(0, dead);
    if (shift > 0)
      for (auto& age : out->age) age = static_cast<int32_t>(age - shift);
    out->first = run.first + shift;
    out->span = offset + carried->span - shift;
    run = Run{};
    std::swap(*carried, *out);
  }

  void place(int level, const Buffer& b) {
    const int64_t at = run_start(level), n = static_cast<int64_t>(b.mean.size());
    std::memcpy(means_ + at, b.mean.data(), n * sizeof(T));
    std::memcpy(stds_ + at, b.std.data(), n * sizeof(T));
    std::memcpy(ages_ + at, b.age.data(), n * sizeof(int32_t));
    header_->runs[level] = {n, b.first, b.span};
  }

  Header* header_;
  int64_t capacity_;
  T *means_, *stds_;
  int32_t* ages_;
};

}  // namespace tal_fast
