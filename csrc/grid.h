// Grid of cells over the (mean, std) plane that adapts to the density of a sample of points.
//
// Knots at quantiles of the sample cut the plane into strips by mean, and each strip into tiles by std, so that tiles
// hold about equally many points. A tile is cut evenly into roughly square cells. Knots are moved into gaps of the
// sample where it has some, and a value that many points share gets a strip or a tile of its own. Every step from a
// point to its cell is monotone in floating point, so the cells of a box hold every point of the box, exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace tal_fast {

template <typename T>
struct Point {
  T mean, std;
};

template <typename T>
class Grid {
 public:
  struct Tile {
    T mean_low, std_low, mean_scale, std_scale;  // column = (mean - mean_low) * mean_scale, within [0, columns)
    uint32_t columns, rows, first_cell;
    uint32_t newest;  // number of the newest entry; set by the owner of the grid
  };

  // Number of cells for a number of points: two points per cell are the fastest to search.
  static int64_t cells_for(int64_t points) { return std::max<int64_t>(1, points / 2); }

  // Number of strips, and of tiles per strip: a power of 2 such that a tile has at least 64 cells. The limit of 64 x 64
  // tiles keeps them (128 KB) in the L2 cache.
  static int side_for(int64_t points) {
    int side = 1;
    while (side < 64 && 4 * side * side * 64 <= cells_for(points)) side *= 2;
    return side;
  }

  // Sample size for `build`: 8 points per tile, and at least 2,048.
  static int64_t sample_for(int64_t points) { return std::max(8 * side_for(points) * side_for(points), 2048); }

  // Bytes of memory for a number of points.
  static int64_t bytes(int64_t points) {
    const int64_t side = side_for(points), tiles = side * side;
    const int64_t all = side * sizeof(T) + tiles * (sizeof(T) + sizeof(Tile)) +
                        (cells_for(points) + tiles) * static_cast<int64_t>(sizeof(uint32_t));
    return (all + 63) / 64 * 64;
  }

  // View of the `bytes(points)` bytes at `at`. `build` initialises them, except for the heads; see `clear_heads`.
  Grid(uint8_t* at, int64_t points)
      : side_(side_for(points)),
        cells_(cells_for(points)),
        tiles_(reinterpret_cast<Tile*>(at)),
        strip_knots_(reinterpret_cast<T*>(tiles_ + side_ * side_)),
        tile_knots_(strip_knots_ + side_),
        heads_(reinterpret_cast<uint32_t*>(tile_knots_ + side_ * side_)) {}

  Tile& tile(int64_t i) const { return tiles_[i]; }
  // Number of the newest entry of a cell; set by the owner of the grid.
  uint32_t& head(uint32_t cell) const { return heads_[cell]; }
  void clear_heads() { std::fill_n(heads_, cells_ + side_ * side_, 0u); }

  // Strip of a mean, and tile of a point. Each prefetches what the next lookup reads.
  int strip_of(T mean) const {
    const int strip = interval(strip_knots_, mean);
    const T* knots = tile_knots_ + strip * side_;
    for (int i = 0; i < side_; i += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(knots + i);
    return strip;
  }
  int tile_of(int strip, T std) const {
    const int i = strip * side_ + interval(tile_knots_ + strip * side_, std);
    __builtin_prefetch(tiles_ + i);
    return i;
  }

  // Longer side of the tile's cells; 0 if the tile is a single point.
  static T reach(const Tile& tile) {
    return std::max(tile.mean_scale > 0 ? 1 / tile.mean_scale : T(0), tile.std_scale > 0 ? 1 / tile.std_scale : T(0));
  }

  uint32_t cell_of(const Tile& tile, T mean, T std) const {
    return tile.first_cell + step(std, tile.std_low, tile.std_scale, tile.rows) * tile.columns +
           step(mean, tile.mean_low, tile.mean_scale, tile.columns);
  }

  // Call visit(tile, first column, last column, first row, last row) for cells that hold every point of a box.
  //
  // `center` is the query, in tile `home`. Tiles whose squared distance to it is not below `*best` are skipped; visits
  // may lower `*best`.
  template <typename Visit>
  void cover(Point<T> low, Point<T> high, Point<T> center, int home, const T* best, Visit&& visit) const {
    const auto look = [&](const Tile& t) {
      visit(t, step(low.mean, t.mean_low, t.mean_scale, t.columns),
            step(high.mean, t.mean_low, t.mean_scale, t.columns), step(low.std, t.std_low, t.std_scale, t.rows),
            step(high.std, t.std_low, t.std_scale, t.rows));
    };
    const int own = home / side_;
    if (inside(strip_knots_, own, low.mean, high.mean) &&
        inside(tile_knots_ + own * side_, home - own * side_, low.std, high.std))
      return look(tiles_[home]);
    const int last = interval(strip_knots_, high.mean);
    for (int strip = interval(strip_knots_, low.mean); strip <= last; ++strip) {
      const T* knots = tile_knots_ + strip * side_;
      const T dm = distance_to_interval(strip_knots_, strip, center.mean);
      const int top = interval(knots, high.std);
      for (int i = interval(knots, low.std); i <= top; ++i) {
        const T ds = distance_to_interval(knots, i, center.std);
        if (dm * dm + ds * ds < *best) look(tiles_[strip * side_ + i]);
      }
    }
  }

  // Build the grid from a sample, which is sorted in place. Returns the entropy, in bits, of the sample's distribution
  // over the tiles, with repeated points counted once.
  double build(Point<T>* sample, int64_t count) {
    const auto by_mean = [](const Point<T>& a, const Point<T>& b) { return a.mean < b.mean; };
    const auto by_std = [](const Point<T>& a, const Point<T>& b) { return a.std < b.std; };
    std::sort(sample, sample + count, by_mean);
    choose_knots(sample, count, &Point<T>::mean, strip_knots_);
    uint32_t cells = 0;
    double evenness = 0;
    int64_t counted = 0;
    Point<T>* from = sample;
    for (int strip = 0; strip < side_; ++strip) {
      Point<T>* const to = std::partition_point(from, sample + count, [&](const Point<T>& p) {
        return strip + 1 == side_ || p.mean < strip_knots_[strip];
      });
      const Extent across = extent(from, to, &Point<T>::mean, strip_knots_, strip);
      std::sort(from, to, by_std);
      T* knots = tile_knots_ + strip * side_;
      choose_knots(from, to - from, &Point<T>::std, knots);
      for (int i = 0; i < side_; ++i) {
        Point<T>* const end = std::partition_point(
            from, to, [&](const Point<T>& p) { return i + 1 == side_ || p.std < knots[i]; });
        Tile& t = tiles_[strip * side_ + i];
        t = make_tile(across, extent(from, end, &Point<T>::std, knots, i),
                      std::max<int64_t>(1, cells_ * (end - from) / count));
        t.first_cell = cells;
        cells += t.columns * t.rows;
        const int64_t here = distinct(from, end);
        if (here > 0) evenness -= here * std::log2(static_cast<double>(here));
        counted += here;
        from = end;
      }
    }
    return counted > 0 ? evenness / counted + std::log2(static_cast<double>(counted)) : 0;
  }

 private:
  struct Extent {
    double low, width;
  };

  // Number of points that differ from their predecessor.
  static int64_t distinct(const Point<T>* from, const Point<T>* to) {
    int64_t count = from < to;
    for (const Point<T>* p = from + 1; p < to; ++p) count += p->mean != p[-1].mean || p->std != p[-1].std;
    return count;
  }

  // Index of the interval that holds x: the number of sorted knots <= x.
  int interval(const T* knots, T x) const {
    int at = 0;
    for (int half = side_ / 2; half > 0; half /= 2) at += knots[at + half - 1] <= x ? half : 0;
    return at;
  }

  bool inside(const T* knots, int i, T low, T high) const {
    return (i == 0 || low >= knots[i - 1]) && (i + 1 == side_ || high < knots[i]);
  }

  T distance_to_interval(const T* knots, int i, T x) const {
    if (i > 0 && x < knots[i - 1]) return knots[i - 1] - x;
    if (i + 1 < side_ && x > knots[i]) return x - knots[i];
    return 0;
  }

  static uint32_t step(T x, T low, T scale, uint32_t count) {
    const T at = (x - low) * scale;
    return at > 0 ? (at < static_cast<T>(count - 1) ? static_cast<uint32_t>(at) : count - 1) : 0;
  }

  // Choose side_ - 1 knots that split the sorted points evenly.
  //
  // A knot moves to a gap if the gap takes up more than half of its range and has more than a few points on either
  // side. A value that would be a knot twice is followed by the next larger one. Unused knots are +inf.
  void choose_knots(const Point<T>* p, int64_t count, T Point<T>::* value, T* knots) const {
    std::fill_n(knots, side_, std::numeric_limits<T>::infinity());
    const int64_t reach = count / (2 * side_);
    int chosen = 0;
    for (int i = 1; i < side_ && count > 0; ++i) {
      int64_t at = count * i / side_;
      const int64_t first = i == 1 ? 0 : at - reach, last = i + 1 == side_ ? count - 1 : at + reach;
      const T most = (p[last].*value - p[first].*value) / 2;
      for (int64_t j = first + 1 + reach / 8; j <= last - reach / 8; ++j)
        if (p[j].*value - p[j - 1].*value > most) at = j;
      while (chosen > 0 && at < count && p[at].*value <= knots[chosen - 1]) ++at;
      if (at == count) break;
      knots[chosen++] = p[at].*value;
    }
  }

  // Range covered by the cells of an interval: that of its points, within its knots and without a few outliers, which
  // share the outermost cells.
  Extent extent(const Point<T>* from, const Point<T>* to, T Point<T>::* value, const T* knots, int i) const {
    const int64_t count = to - from;
    if (count == 0) return {0, 0};
    const double quarter = from[count / 4].*value, half = from[count * 3 / 4].*value - quarter;
    const double beyond = 2 * half / static_cast<double>(count);  // expected distance of the next point
    double low = from->*value - beyond, high = to[-1].*value + beyond;
    if (half > 0) {
      low = std::max(low, quarter - half);
      high = std::min(high, quarter + 2 * half);
    }
    if (i > 0) low = std::max<double>(low, knots[i - 1]);
    if (i + 1 < side_) high = std::min<double>(high, knots[i]);
    return {low, std::max(0.0, high - low)};
  }

  // Tile of about `cells` cells that are as square as possible.
  static Tile make_tile(Extent mean, Extent std, int64_t cells) {
    Tile t{static_cast<T>(mean.low), static_cast<T>(std.low), 0, 0, 1, 1, 0, 0};
    const double most = static_cast<double>(cells);
    const double columns = mean.width > 0 ? std::sqrt(most * mean.width / std.width) : 1;
    t.columns = columns >= most ? static_cast<uint32_t>(cells) : columns > 1 ? static_cast<uint32_t>(columns + 0.5) : 1;
    if (std.width > 0) t.rows = static_cast<uint32_t>(cells) / t.columns;
    if (mean.width > 0) t.mean_scale = static_cast<T>(t.columns / mean.width);
    if (std.width > 0) t.std_scale = static_cast<T>(t.rows / std.width);
    return t;
  }

  int side_;
  int64_t cells_;
  Tile* tiles_;
  T *strip_knots_, *tile_knots_;
  uint32_t* heads_;
};

}  // namespace tal_fast
