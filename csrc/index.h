// Exact nearest-entry index over a first-in-first-out window, in one flat block of memory.
//
// Brute force compares a query with all N entries. Here every entry is linked into the chain of its grid cell (grid.h),
// newest first, and a query searches the cells around it: about ten entries, however large N is. Nothing is deleted or
// moved: links name entries by the number of their push, so a link to an entry that has left the queue is recognised by
// its number. A push is O(1).
//
// When entries crowd into few cells, a new grid is built from a sample of the queue for the entries to come; older
// entries stay in their grid until they leave the queue, so that no step pays for moving them. Entries that share a
// grid are a generation. Each generation has its own chains, and a query searches all generations that have live
// entries. (Queues of up to 32,768 entries are moved to the new grid as a whole, which takes 2 milliseconds, and have a
// single generation.)
//
// The result equals the brute-force minimum to the bit for any distribution. A query that would cost more than brute
// force (long chains or too many cells) is answered by brute force.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "grid.h"
#include "kernels_cpu.h"

namespace tal_fast {

// Smallest capacity that has an index. Brute force is as fast below: 4,096 entries are 256 vector comparisons, under
// 1 microsecond per query.
constexpr int64_t kMinIndexedCapacity = 4096;

template <typename T>
class QueueIndex {
 public:
  // Bytes of memory for a queue of this capacity.
  static int64_t bytes(int64_t capacity) {
    return static_cast<int64_t>(sizeof(Header)) + capacity * static_cast<int64_t>(sizeof(Entry)) +
           kPoolGrids * Grid<T>::bytes(capacity);
  }

  QueueIndex(uint8_t* block, int64_t capacity)
      : header_(reinterpret_cast<Header*>(block)),
        entries_(reinterpret_cast<Entry*>(block + sizeof(Header))),
        pool_(block + sizeof(Header) + capacity * sizeof(Entry)),
        capacity_(capacity) {}

  // Whether the index is up to date with a queue whose cursor is (head, length).
  bool matches(int64_t head, int64_t length) const {
    return header_->magic == kMagic && header_->capacity == capacity_ && header_->head == head &&
           header_->length == length;
  }

  // Build the index of a queue from its ring buffers.
  void rebuild(const T* ring_mean, const T* ring_std, int64_t head, int64_t length) {
    std::memset(header_, 0, sizeof(Header));
    header_->magic = kMagic;
    header_->capacity = capacity_;
    header_->head = head;
    header_->length = length;
    header_->now = 1 + length;
    for (int64_t slot = 0; slot < length; ++slot) entries_[slot].point = {ring_mean[slot], ring_std[slot]};
    if (length >= kMinGridEntries) regrid();
  }

  // Append entries, oldest first. The caller appends them to the ring buffers, too.
  void push(const T* mean, const T* std, int64_t count) {
    while (count > 0) {
      const int64_t some = std::min<int64_t>(count, kBatch);
      append(mean, std, some);
      mean += some;
      std += some;
      count -= some;
      if (header_->generations == 0) {
        if (header_->length >= kMinGridEntries) regrid();
        continue;
      }
      const Generation& g = newest();
      const bool full = g.limit < capacity_ && header_->now - g.first >= g.limit;
      if (full || is_crowded()) start_new_grid(full);
    }
  }

  // best[b] = squared distance to the nearest live entry, for queries [begin, end). Queries for which brute force is
  // faster read the ring buffers.
  void nearest_squared(const T* ring_mean, const T* ring_std, const T* m, const T* s, int64_t begin, int64_t end,
                       T* best) const {
    std::fill(best + begin, best + end, std::numeric_limits<T>::infinity());
    for (int64_t b = begin; b < end; b += kBatch) {
      Search search(*this, m + b, s + b, std::min<int64_t>(kBatch, end - b), best + b);
      search.run();
      search.finish_by_brute_force(ring_mean, ring_std);
    }
  }

 private:
  static constexpr int64_t kMagic = 0x54414C5155455545;  // "TALQUEUE"
  static constexpr int64_t kPoolGrids = 3;              // room for grids, in grids of the whole queue
  static constexpr int64_t kMinGridEntries = 512;       // shorter queues have no grid
  static constexpr int64_t kMaxRebuiltEntries = 32768;  // up to this length the whole queue moves to a new grid
  static constexpr int64_t kCrowdingWindow = 1024;      // pushes between two judgements of crowding
  static constexpr int kMaxGenerations = 16;
  static constexpr int kBatch = 128;  // queries or pushes whose memory accesses overlap

  struct alignas(sizeof(T) == 4 ? 16 : 8) Entry {
    Point<T> point;
    uint32_t older;  // number of the next older entry of its cell; entries are numbered from 1, modulo 2^32
  };

  // Entries that share a grid: numbers from `first` up to the `first` of the next generation.
  struct Generation {
    int64_t first;
    int64_t limit;         // number of entries the grid is sized for
    int64_t at;            // offset of the grid in the pool, in bytes
    double expected_bits;  // expected log2 of the number of pushes between two to one tile, from the sample
    double bits;           // sum of that logarithm over the pushes counted in this window
    int64_t counted;       // number of pushes counted in this window
    Point<T> low, high;    // bounding box of the entries
  };
  struct alignas(64) Header {
    int64_t magic, capacity, head, length;
    int64_t now;  // number of the next entry
    int64_t generations;
    Generation list[kMaxGenerations];  // oldest first
  };

  Generation& newest() const { return header_->list[header_->generations - 1]; }
  Grid<T> grid(const Generation& g) const { return Grid<T>(pool_ + g.at, g.limit); }
  // Number of the first entry after the generation.
  int64_t end_of(int64_t i) const { return i + 1 < header_->generations ? header_->list[i + 1].first : header_->now; }

  // Entry that was pushed `age` pushes ago; the newest has age 1.
  const Entry& entry(uint32_t age) const {
    const int64_t slot = header_->head - static_cast<int64_t>(age);
    return entries_[slot < 0 ? slot + capacity_ : slot];
  }

  // Append at most kBatch entries, to the newest generation if there is one.
  //
  // Each stage (cells, the entries they name, links) runs over all entries before the next one, so that their memory
  // accesses overlap.
  void append(const T* mean, const T* std, int64_t count) {
    if (header_->generations == 0) {
      for (int64_t i = 0; i < count; ++i) advance({mean[i], std[i]}, 0);
      return;
    }
    Generation& g = newest();
    const Grid<T> cells = grid(g);
    int tile[kBatch];
    uint32_t cell[kBatch];
    for (int64_t i = 0; i < count; ++i) tile[i] = cells.strip_of(mean[i]);
    for (int64_t i = 0; i < count; ++i) tile[i] = cells.tile_of(tile[i], std[i]);
    for (int64_t i = 0; i < count; ++i) {
      cell[i] = cells.cell_of(cells.tile(tile[i]), mean[i], std[i]);
      __builtin_prefetch(&cells.head(cell[i]), 1);
    }
    const uint32_t span = static_cast<uint32_t>(std::min(header_->length, header_->now - g.first));
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t age = static_cast<uint32_t>(header_->now) - cells.head(cell[i]);
      if (age - 1 < span) __builtin_prefetch(&entry(age));
    }
    for (int64_t i = 0; i < count; ++i) link(g, cells.tile(tile[i]), cells.head(cell[i]), {mean[i], std[i]});
  }

  // Append one entry as the newest of its cell.
  void link(Generation& g, typename Grid<T>::Tile& tile, uint32_t& head, Point<T> p) {
    const uint32_t number = static_cast<uint32_t>(header_->now);
    const uint32_t span = static_cast<uint32_t>(std::min(header_->length, header_->now - g.first));
    const uint32_t age = number - head;
    uint32_t older = head;
    // An entry equal to the previous one of its cell replaces it in the chain: the older one leaves the queue first.
    const bool repeated = age - 1 < span && entry(age).point.mean == p.mean && entry(age).point.std == p.std;
    if (repeated) older = entry(age).older;
    const uint32_t since = number - tile.newest;
    if (!repeated) {
      ++g.counted;
      g.bits += since - 1 < span ? 31 - __builtin_clz(since) : g.expected_bits;
    }
    tile.newest = head = number;
    g.low = {std::min(g.low.mean, p.mean), std::min(g.low.std, p.std)};
    g.high = {std::max(g.high.mean, p.mean), std::max(g.high.std, p.std)};
    advance(p, older);
  }

  // Store an entry and move the cursor.
  void advance(Point<T> p, uint32_t older) {
    entries_[header_->head] = {p, older};
    header_->head = header_->head + 1 == capacity_ ? 0 : header_->head + 1;
    header_->length = std::min(header_->length + 1, capacity_);
    ++header_->now;
  }

  // Whether pushes concentrate on few tiles: at most a quarter of the number expected from the sample, or 70% once the
  // generation is long.
  bool is_crowded() {
    Generation& g = newest();
    if (g.counted < kCrowdingWindow) return false;
    const double missing = g.expected_bits - g.bits / static_cast<double>(g.counted);
    g.counted = 0;
    g.bits = 0;
    return missing > 2 || (missing > 0.5 && header_->now - g.first >= capacity_ / 8);
  }

  // Start a new grid for the entries to come, if there is room; `full` if the old one has reached its limit.
  void start_new_grid(bool full) {
    if (header_->length <= kMaxRebuiltEntries) return regrid();
    const int64_t held = header_->now - newest().first;
    const int64_t limit = full ? 4 * newest().limit : std::max(2 * held, capacity_ / 8);
    begin(std::min(limit, capacity_));
  }

  // Drop all grids and link every entry into a new one.
  void regrid() {
    const int64_t head = header_->head, length = header_->length;
    header_->generations = 0;
    begin(std::min(4 * length, capacity_));
    Generation& g = newest();
    Grid<T> cells = grid(g);
    cells.clear_heads();
    g.first = header_->now -= length;
    header_->head = (head - length + capacity_) % capacity_;
    header_->length = 0;
    T mean[kBatch], std[kBatch];
    for (int64_t done = 0; done < length;) {
      const int64_t some = std::min<int64_t>(kBatch, length - done);
      for (int64_t i = 0; i < some; ++i) {
        const Point<T> p = entries_[(header_->head + i) % capacity_].point;
        mean[i] = p.mean;
        std[i] = p.std;
      }
      append(mean, std, some);
      done += some;
    }
    g.counted = 0;
    g.bits = 0;
  }

  // Begin a generation whose grid is built from a sample of the queue.
  //
  // Half of the sample are the newest entries and three eighths come from the whole queue. One eighth are points
  // extrapolated from the newest entries, where entries may lie as the network learns.
  void begin(int64_t limit) {
    int64_t& count = header_->generations;
    const int64_t oldest = header_->now - header_->length;
    while (count > 0 && end_of(0) <= oldest) {
      std::copy(header_->list + 1, header_->list + count, header_->list);
      --count;
    }
    int64_t at = 0;
    if (count == kMaxGenerations || !find_room(limit, &at)) return;  // tried again after the next window
    const int64_t wanted = std::min(Grid<T>::sample_for(limit), header_->length), recent = wanted / 2;
    std::vector<Point<T>> sample(static_cast<size_t>(wanted));
    for (int64_t i = 0; i < wanted; ++i) {
      const int64_t age = i < recent ? i : recent + (i - recent) * (header_->length - recent) / (wanted - recent);
      sample[i] = entry(static_cast<uint32_t>(age + 1)).point;
    }
    for (int64_t i = 0; i + 1 < recent; i += 4) {
      const Point<T> a = sample[i], b = sample[i + 1], beyond{2 * a.mean - b.mean, 2 * a.std - b.std};
      if (std::isfinite(beyond.mean) && std::isfinite(beyond.std)) sample[recent + i] = beyond;
    }
    constexpr T inf = std::numeric_limits<T>::infinity();
    Generation& g = header_->list[count];
    g = {header_->now, limit, at, 0, 0, 0, {inf, inf}, {-inf, -inf}};
    const double evenness = grid(g).build(sample.data(), wanted);
    // The mean log2 of exponential waiting times is log2 of their mean less 0.83; rounding down takes another 0.5.
    g.expected_bits = std::max(evenness, 3.0) - 1.33;
    ++count;
  }

  // Find room for a grid in the pool, after the newest grid or at the start. Returns false if there is none.
  bool find_room(int64_t limit, int64_t* at) const {
    const int64_t size = Grid<T>::bytes(limit), all = kPoolGrids * Grid<T>::bytes(capacity_);
    const auto end_of_grid = [&](const Generation& g) { return g.at + Grid<T>::bytes(g.limit); };
    for (int64_t start : {header_->generations > 0 ? end_of_grid(newest()) : 0, int64_t{0}}) {
      bool fits = start + size <= all;
      for (int64_t i = 0; i < header_->generations; ++i) {
        const Generation& g = header_->list[i];
        fits = fits && (start + size <= g.at || end_of_grid(g) <= start);
      }
      if (fits) {
        *at = start;
        return true;
      }
    }
    return false;
  }

  // Search for a batch of queries. All queries take a step before any takes the next one, so that their memory accesses
  // overlap.
  class Search {
   public:
    Search(const QueueIndex& index, const T* m, const T* s, int64_t count, T* best)
        : index_(index), header_(*index.header_), m_(m), s_(s), count_(static_cast<int>(count)), best_(best) {
      // Number of steps, most of which wait for memory, that cost about as much as brute force.
      budget_ = 256 + static_cast<int>(header_.length / 512);
      for (int q = 0; q < count_; ++q) spent_[q] = std::isfinite(m_[q]) && std::isfinite(s_[q]) ? 0 : kExcluded;
    }

    void run() {
      if (header_.generations == 0) {
        for (int q = 0; q < count_; ++q) spent_[q] += budget_;
        return;
      }
      // Largest generation first, because it lowers the minimum most.
      int order[kMaxGenerations];
      for (int i = 0; i < header_.generations; ++i) order[i] = i;
      std::sort(order, order + header_.generations, [&](int a, int b) { return live_entries(a) > live_entries(b); });
      // Generations whose bounding box holds the query first, because their entries are likely nearer.
      for (const bool inside : {true, false})
        for (int i = 0; i < header_.generations; ++i)
          if (live_entries(order[i]) > 0) search(order[i], inside);
    }

    // Answer the queries that took too many steps.
    void finish_by_brute_force(const T* ring_mean, const T* ring_std) {
      T m[kBatch], s[kBatch], best[kBatch];
      int original[kBatch], n = 0;
      for (int q = 0; q < count_; ++q) {
        if (spent_[q] < budget_ || spent_[q] >= kExcluded) continue;
        m[n] = m_[q];
        s[n] = s_[q];
        best[n] = best_[q];
        original[n++] = q;
      }
      cpu_kernels<T>().nearest_squared(ring_mean, ring_std, 0, header_.length, m, s, n, best);
      for (int i = 0; i < n; ++i) best_[original[i]] = best[i];
    }

   private:
    static constexpr int kExcluded = 1 << 30;
    static constexpr int kListCapacity = 512;
    struct Item {
      uint32_t query, place;  // place: a cell, then an age
    };

    // Number of live entries of a generation.
    int64_t live_entries(int i) const {
      const int64_t oldest = header_.now - header_.length;
      return index_.end_of(i) - std::max(header_.list[i].first, oldest);
    }

    // Search one generation for the queries inside its bounding box, or for those outside.
    void search(int i, bool inside) {
      const Generation& g = header_.list[i];
      const Grid<T> cells = index_.grid(g);
      span_ = static_cast<uint32_t>(std::min(header_.length, header_.now - g.first));
      // First the query's own cell, whose entries are most likely near.
      int waiting[kBatch], n = 0, home_tile[kBatch];
      uint32_t home_cell[kBatch];
      T radius[kBatch];
      for (int q = 0; q < count_; ++q) {
        if (spent_[q] >= budget_) continue;
        const T dm = outside(m_[q], g.low.mean, g.high.mean), ds = outside(s_[q], g.low.std, g.high.std);
        if ((dm == 0 && ds == 0) != inside || dm * dm + ds * ds >= best_[q]) continue;
        radius[q] = std::max(dm, ds);
        home_tile[q] = cells.strip_of(m_[q]);
        waiting[n++] = q;
      }
      for (int k = 0; k < n; ++k) home_tile[waiting[k]] = cells.tile_of(home_tile[waiting[k]], s_[waiting[k]]);
      for (int k = 0; k < n; ++k) {
        const int q = waiting[k];
        const auto& tile = cells.tile(home_tile[q]);
        home_cell[q] = cells.cell_of(tile, m_[q], s_[q]);
        radius[q] = std::max(radius[q], cells.reach(tile));
        add(cells, q, home_cell[q]);
      }
      flush(cells);
      const uint32_t newest = static_cast<uint32_t>(header_.now + 1 - index_.end_of(i));  // age of its newest entry
      // Then all cells within a radius, which doubles until it reaches the best distance so far.
      while (n > 0) {
        int left = 0;
        for (int k = 0; k < n; ++k) {
          const int q = waiting[k];
          if (best_[q] == 0) continue;
          if (best_[q] == std::numeric_limits<T>::infinity()) compare(q, newest);
          const T enough = radius_of(best_[q]);
          const bool last = enough <= radius[q] || !(radius[q] > 0);
          if (last && enough == std::numeric_limits<T>::infinity()) spent_[q] += budget_;
          if (spent_[q] >= budget_) continue;
          list_cells_around(g, cells, q, home_tile[q], home_cell[q], last ? enough : radius[q]);
          radius[q] *= 2;
          if (!last) waiting[left++] = q;
        }
        flush(cells);
        n = 0;
        for (int k = 0; k < left; ++k) {
          const int q = waiting[k];
          const T done = radius[q] / 2;
          if (spent_[q] < budget_ && !(best_[q] <= done * done)) waiting[n++] = q;
        }
      }
    }

    // Lower a query's minimum by the entry of an age.
    const Entry& compare(int q, uint32_t age) {
      const Entry& e = index_.entry(age);
      const T dm = e.point.mean - m_[q], ds = e.point.std - s_[q], d = dm * dm + ds * ds;
      best_[q] = d < best_[q] ? d : best_[q];  // without a branch; see flush
      return e;
    }

    static T outside(T x, T low, T high) { return x < low ? low - x : x > high ? x - high : T(0); }

    // r with fl(r * r) >= squared. An entry whose computed distance is below `squared` is within r of the query on both
    // axes, because rounding is monotone.
    static T radius_of(T squared) {
      T r = std::sqrt(squared) * (1 + 2 * std::numeric_limits<T>::epsilon());
      while (r * r < squared) r *= static_cast<T>(1.001);
      return r;
    }

    // List the cells within r of a query, without its home cell.
    void list_cells_around(const Generation& g, const Grid<T>& cells, int q, int home_tile, uint32_t home_cell, T r) {
      const Point<T> center{m_[q], s_[q]};
      const Point<T> low{std::max(center.mean - r, g.low.mean), std::max(center.std - r, g.low.std)};
      const Point<T> high{std::min(center.mean + r, g.high.mean), std::min(center.std + r, g.high.std)};
      if (!(low.mean <= high.mean && low.std <= high.std)) {
        ++spent_[q];
        return;
      }
      const auto list = [&](const auto& tile, uint32_t left, uint32_t right, uint32_t bottom, uint32_t top) {
        if (spent_[q] >= budget_) return;
        const int64_t looks = static_cast<int64_t>(right - left + 1) * (top - bottom + 1) / 8;
        spent_[q] += 1 + static_cast<int>(std::min<int64_t>(looks, budget_));
        if (spent_[q] >= budget_) return;
        for (uint32_t row = bottom; row <= top; ++row)
          for (uint32_t column = left; column <= right; ++column) {
            const uint32_t cell = tile.first_cell + row * tile.columns + column;
            if (cell != home_cell) add(cells, q, cell);
          }
      };
      cells.cover(low, high, center, home_tile, best_ + q, list);
    }

    // List a cell, and walk the chains when the list is full.
    void add(const Grid<T>& cells, int q, uint32_t cell) {
      __builtin_prefetch(&cells.head(cell));
      list_[listed_++] = {static_cast<uint32_t>(q), cell};
      if (listed_ == kListCapacity) flush(cells);
    }

    // Walk the chains of the listed cells, without branches on the entries found, which would be mispredicted. This
    // saves 7% of a search and push at N = 20,000 and nothing at 10,000,000 (bench_queue).
    void flush(const Grid<T>& cells) {
      const uint32_t now = static_cast<uint32_t>(header_.now);
      int n = 0;
      for (int k = 0; k < listed_; ++k) {
        const uint32_t age = now - cells.head(list_[k].place);
        const bool lives = age - 1 < span_;
        __builtin_prefetch(&index_.entry(lives ? age : 1));
        list_[n] = {list_[k].query, age};
        n += lives;
      }
      listed_ = 0;
      while (n > 0) {
        int left = 0;
        for (int k = 0; k < n; ++k) {
          const auto [q, age] = list_[k];
          const uint32_t next = now - compare(q, age).older;
          const bool continues = (next > age) & (next <= span_);
          spent_[q] += continues;
          __builtin_prefetch(&index_.entry(continues ? next : age));
          list_[left] = {q, next};
          left += continues & (spent_[q] < budget_);
        }
        n = left;
      }
    }

    const QueueIndex& index_;
    const Header& header_;
    const T *m_, *s_;
    int count_;
    T* best_;
    int budget_;
    uint32_t span_ = 0;
    int spent_[kBatch];
    Item list_[kListCapacity];
    int listed_ = 0;
  };

  Header* header_;
  Entry* entries_;
  uint8_t* pool_;
  int64_t capacity_;
};

}  // namespace tal_fast
