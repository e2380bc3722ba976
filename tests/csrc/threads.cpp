// Threads that push to one queue and search it, for ThreadSanitizer: make sanitize. No PyTorch, no OpenMP.
//
// Exit code 0 if every entry in the queue is one that was pushed, the cursor has counted every push, and the search by
// the index equals brute force to the bit.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "ring.h"

namespace {

constexpr int kThreads = 8, kSteps = 60, kRows = 300;

const auto serially = [](int64_t begin, int64_t end, int64_t, const auto& body) {
  if (begin < end) body(begin, end);
};

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// Each thread pushes its own batches, whose std is their mean + 1, and searches in between.
template <typename T>
void share_a_queue(int64_t capacity) {
  std::vector<T> mean(capacity), std(capacity);
  int64_t cursor[2] = {0, 0};
  std::vector<uint64_t> index(static_cast<size_t>(tal_fast::QueueIndex<T>::bytes(capacity) / 8 + 8));
  const auto ring = [&] {  // a view, as each operator makes its own
    auto* at = reinterpret_cast<uint8_t*>(index.data());
    at += (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64;
    return tal_fast::Ring<T>(mean.data(), std.data(), cursor, capacity,
                             capacity < tal_fast::kMinIndexedCapacity ? nullptr : at);
  };
  const auto work = [&](int thread) {
    std::mt19937 random(static_cast<unsigned>(thread));
    std::vector<T> m(kRows), s(kRows), distance(kRows);
    for (int step = 0; step < kSteps; ++step) {
      for (int i = 0; i < kRows; ++i) {
        m[i] = static_cast<T>(random()) / static_cast<T>(4294967296.0);
        s[i] = m[i] + 1;
      }
      expect(ring().push(m.data(), s.data(), nullptr, kRows), "push");
      expect(ring().nearest(m.data(), s.data(), kRows, distance.data(), 1, serially), "nearest");
      for (const T d : distance) expect(std::isfinite(d), "a queue with entries has a nearest one");
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(work, i);
  for (auto& thread : threads) thread.join();

  const int64_t pushed = static_cast<int64_t>(kThreads) * kSteps * kRows;
  expect(cursor[0] == pushed % capacity && cursor[1] == std::min(pushed, capacity), "every push is counted");
  for (int64_t i = 0; i < cursor[1]; ++i) expect(std[i] == mean[i] + 1, "entries are whole");
  std::vector<T> m(kRows), s(kRows), distance(kRows), brute(kRows);
  for (int i = 0; i < kRows; ++i) m[i] = static_cast<T>(i) / kRows, s[i] = m[i] + static_cast<T>(1.01);
  ring().nearest(m.data(), s.data(), kRows, distance.data(), 1, serially);
  tal_fast::Ring<T>(mean.data(), std.data(), cursor, capacity, nullptr)
      .nearest(m.data(), s.data(), kRows, brute.data(), 1, serially);
  expect(distance == brute, "the index equals brute force");
}

}  // namespace

int main() {
  share_a_queue<float>(100);
  share_a_queue<float>(5000);
  share_a_queue<double>(40000);
  std::puts("no thread has seen another's half-done push");
}
