// What the forward and the backward kernels of group_norm_silu share: the algebra of one channel,
// sums over warps, and how threads are laid over a tensor in either layout.
#pragma once

#include "elements.h"

namespace engine {
namespace {

// all: a block holds whole groups and does everything. stats, apply: groups are too large for a
// block; one launch sums, the next one reads the data again and applies.
enum class Stage { all, stats, apply };

// `apply` goes backwards: what `stats` read last may still be in L2.
__device__ __forceinline__ int64_t block_of(Stage stage) {
  return stage == Stage::apply ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// ---- One channel --------------------------------------------------------------------------------

struct Channel {
  float add, gamma, beta;  // v = xhat * gamma + beta, xhat = (x + add - mean) * rstd
};

__device__ __forceinline__ Channel load_channel(const GroupNormSilu& p, int64_t n, int64_t c) {
  const float scale = 1.0f + load_operand(p.scale, n, c, 0.0f);
  return {load_operand(p.add, n, c, 0.0f), load_operand(p.weight, n, c, 1.0f) * scale,
          load_operand(p.bias, n, c, 0.0f) * scale + load_operand(p.shift, n, c, 0.0f)};
}

// The tensor of a pair that has channel c: where it begins, its channels, and c's place in them.
template <typename T>
struct Half {
  T* data;
  int64_t C, c;
};

template <typename T>
__device__ __forceinline__ Half<T> half_of(const GroupNormSilu& p, T* x, T* x2, int64_t c) {
  const int64_t first = p.C - p.C2;
  if (c < first) return {x, first, c};
  return {x2, p.C2, c - first};
}

template <typename T>
__device__ __forceinline__ Half<const T> half_of_x(const GroupNormSilu& p, int64_t c) {
  return half_of(p, static_cast<const T*>(p.x), static_cast<const T*>(p.x2), c);
}

// T: the dtype of the result; 16-bit results do not see the error of the fast instructions.
template <typename T>
__device__ __forceinline__ float sigmoid(float v) {
  if constexpr (sizeof(T) == 4) return 1.0f / (1.0f + expf(-v));
  return __fdividef(1.0f, 1.0f + __expf(-v));
}

template <typename T>
__device__ __forceinline__ float act(float v, bool silu) {
  return silu ? v * sigmoid<T>(v) : v;
}

// dv from dy: the derivative of act at v.
template <typename T>
__device__ __forceinline__ float act_bwd(float dy, float v, bool silu) {
  if (!silu) return dy;
  const float s = sigmoid<T>(v);
  return dy * (s * (1.0f + v * (1.0f - s)));
}

// ---- Sums ---------------------------------------------------------------------------------------

// The sum over `width` neighbouring lanes (a power of two), in all of them.
__device__ __forceinline__ float lane_sum(float value, int width) {
  for (int offset = width / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

__device__ __forceinline__ float warp_sum(float value) { return lane_sum(value, 32); }

// ---- Contiguous (N, C, S): planes ---------------------------------------------------------------
// `lanes` threads share a plane (n, c): a power of two up to 32, or a multiple of 32, so that a sum
// over a plane is a shuffle (and a few words of shared memory). A thread keeps K vectors of its
// plane in registers. threadIdx.x runs over the threads of a unit: `channels` planes of one group
// (n, g), and of each plane K * lanes vectors; threadIdx.y over independent small units.

struct PlaneTile {
  int64_t units;        // N * G * c_parts * s_parts
  int64_t s_parts;      // pieces of a plane
  int c_parts;          // pieces of a group
  int channels, lanes;  // of a unit
  int threads_x, threads_y;

  dim3 block() const { return dim3(threads_x, threads_y); }
  int64_t grid() const { return (units + threads_y - 1) / threads_y; }
};

constexpr int kMaxThreads = 768;                // leaves 80 registers to a thread
constexpr int64_t kEnoughThreads = 132 * 1024;  // keeps a large GPU busy

// vec: elements in a vector; whole: planes are whole vectors, aligned. Returns true when a block
// can hold a group (`all`), else a tile for `stats` and `apply`, of at most `threads`.
inline bool choose_plane_tile(const GroupNormSilu& p, int vec, int k, bool whole, PlaneTile* tile,
                              int threads = 512) {
  const int64_t group = p.C / p.G, rows = p.N * p.G;
  const int64_t vectors = (p.S + vec - 1) / vec + (whole ? 0 : 1);
  const int64_t needed = (vectors + k - 1) / k;
  int64_t lanes = 1;
  while (lanes < needed && lanes < 32) lanes *= 2;
  if (needed > 32) lanes = (needed + 31) / 32 * 32;
  const bool resident = lanes * group <= kMaxThreads;
  if (resident) {
    // Few groups: more threads with fewer vectors each.
    while (rows * group * lanes * 2 <= kEnoughThreads && group * lanes * 2 <= kMaxThreads &&
           lanes < vectors)
      lanes *= 2;
    tile->channels = static_cast<int>(group);
  } else {
    lanes = lanes < threads ? lanes : threads;
    tile->channels = static_cast<int>(threads / lanes < group ? threads / lanes : group);
  }
  tile->lanes = static_cast<int>(lanes);
  tile->c_parts = static_cast<int>((group + tile->channels - 1) / tile->channels);
  tile->s_parts = (vectors + lanes * k - 1) / (lanes * k);
  tile->units = rows * tile->c_parts * tile->s_parts;
  tile->threads_x = (tile->channels * tile->lanes + 31) / 32 * 32;
  tile->threads_y = tile->threads_x < 128 ? 128 / tile->threads_x : 1;
  return resident;
}

// A thread's place in a PlaneTile.
struct PlanePlace {
  int64_t row, part;  // n * G + g; piece of the group
  int64_t n, c, s_part;
  int lane;
  bool active;

  __device__ PlanePlace(const GroupNormSilu& p, const PlaneTile& tile, int64_t block) {
    const int64_t unit = block * blockDim.y + threadIdx.y;
    const int64_t group = p.C / p.G;
    const int local = threadIdx.x / tile.lanes;
    lane = threadIdx.x % tile.lanes;
    s_part = unit % tile.s_parts;
    const int64_t c_part = unit / tile.s_parts % tile.c_parts;
    part = c_part * tile.s_parts + s_part;
    row = unit / tile.s_parts / tile.c_parts;
    const int64_t in_group = c_part * tile.channels + local;
    active = unit < tile.units && local < tile.channels && in_group < group;
    // Idle lanes belong to their warp's sample too: group_sums adds over whole warps.
    n = unit < tile.units ? row / p.G : 0;
    c = active ? row % p.G * group + in_group : 0;
  }
};

// The vectors of a plane that a thread keeps: vector k begins at element first + k * step. WHOLE:
// planes are whole vectors, aligned; else vectors start at multiples of 16 bytes (of the pointer
// given), and the first and last ones may lie partly outside the plane.
template <typename T, bool WHOLE>
struct PlaneVectors {
  static constexpr int VEC = kVector<T>;
  int64_t first = 0;
  int step = 0, begin = 0, left = 0;  // elements begin <= k * step + j < left are inside

  PlaneVectors() = default;
  __device__ PlaneVectors(const T* plane, int64_t S, const PlanePlace& at, const PlaneTile& tile,
                          int k_count) {
    const int head =
        WHOLE ? 0 : static_cast<int>(reinterpret_cast<uintptr_t>(plane) % 16 / sizeof(T));
    step = tile.lanes * VEC;
    first = at.active ? at.s_part * k_count * step + at.lane * VEC - head : S;
    begin = first < 0 ? static_cast<int>(-first) : 0;
    const int64_t rest = S - first;
    left = rest > k_count * step ? k_count * step : static_cast<int>(rest);
  }
  __device__ bool inside(int k) const { return k * step < left; }
  __device__ bool inside(int k, int j) const {
    return WHOLE ? k * step < left : k * step + j < left && (k > 0 || j >= begin);
  }
  __device__ int count(int k_count) const {
    int sum = 0;
    for (int k = 0; k < k_count; ++k)
      if (inside(k)) sum += k * step + VEC <= left ? VEC : left - k * step;
    return left > begin ? sum - begin : 0;
  }
  __device__ Slot<T, VEC> load(const T* plane, int k) const {
    Slot<T, VEC> slot;
    plane += first + k * step;
    if (WHOLE ? inside(k) : inside(k, 0) && k * step + VEC <= left && aligned16(plane)) {
      slot.load(plane);
    } else if (!WHOLE) {
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        if (inside(k, j)) slot.load(j, plane + j);
    }
    return slot;
  }
  template <bool LAST = false>
  __device__ void store(const Slot<T, VEC>& slot, T* plane, int k) const {
    plane += first + k * step;
    if (WHOLE ? inside(k) : inside(k, 0) && k * step + VEC <= left && aligned16(plane)) {
      slot.template store<LAST>(plane);
    } else if (!WHOLE) {
#pragma unroll
      for (int j = 0; j < VEC; ++j)
        if (inside(k, j)) slot.store(j, plane + j);
    }
  }
};

// ---- Channels_last (N, S, C): slabs -------------------------------------------------------------
// A slab is `width` neighbouring channels: whole groups, or a part of one that is too wide. A block
// walks over its rows, `rows` of them at a time; a thread keeps to one column of vectors, so that
// its channels stay the same. Sums per channel meet in shared memory, `stride` floats per row.

struct SlabTile {
  int64_t units;       // N * slabs * s_parts
  int64_t s_parts;     // pieces of S
  int64_t s_rows;      // rows in a piece
  int slabs;           // of an image
  int parts;           // slabs of a group that is wider than a slab; else 1
  int width, columns;  // channels and vectors of a slab's row
  int rows;
  int threads;

  __host__ __device__ int stride() const { return width | 1; }  // odd: no bank is hit twice
};

constexpr int kSlabThreads = 512;

// vec: elements in a vector (1 when channels cannot be read as vectors); row_bytes: what a slab of
// `stats` has of each row at least, where groups allow it. Returns as above.
inline bool choose_slab_tile(const GroupNormSilu& p, int element_size, int vec, int k,
                             SlabTile* tile, int threads = kSlabThreads, int row_bytes = 128) {
  const int64_t group = p.C / p.G;
  const int64_t max_width = vec == 1 ? 256 : 64 * vec;
  int64_t unit = group;
  while (unit % vec != 0) unit += group;  // divides C, as vec does
  const auto fits = [&](int64_t width) {
    return (p.S + k - 1) / k * (width / vec) <= kSlabThreads;
  };
  int64_t width = unit;
  const bool wide = unit > max_width;
  const bool resident = !wide && fits(unit);
  const int64_t enough = (resident ? 64 : row_bytes) / element_size;  // whole sectors
  if (wide) {
    width = max_width;
  } else {
    while (width < enough && width + unit <= p.C && width + unit <= max_width &&
           (!resident || fits(width + unit)))
      width += unit;
  }
  tile->parts = wide ? static_cast<int>((group + width - 1) / width) : 1;
  tile->slabs = static_cast<int>(wide ? p.G * tile->parts : (p.C + width - 1) / width);
  tile->width = static_cast<int>(width);
  tile->columns = static_cast<int>(width / vec);
  int64_t rows = (resident ? kSlabThreads : threads) / tile->columns;
  // Enough blocks: fewer threads with more vectors each, so that more blocks share a processor.
  if (resident && p.N * tile->slabs * kSlabThreads > kEnoughThreads) rows = (p.S + k - 1) / k;
  tile->rows = static_cast<int>(rows < p.S ? rows : p.S);
  tile->s_rows = static_cast<int64_t>(tile->rows) * k;
  tile->s_parts = (p.S + tile->s_rows - 1) / tile->s_rows;
  tile->units = p.N * tile->slabs * tile->s_parts;
  tile->threads = (tile->columns * tile->rows + 31) / 32 * 32;
  return resident;
}

// Whether rows of channels can be read as vectors of `vec`, given aligned pointers.
inline bool slab_vectors(const GroupNormSilu& p, int vec) {
  const int64_t group = p.C / p.G;
  if (p.C % vec != 0 || p.C2 % vec != 0) return false;
  int64_t unit = group;
  while (unit % vec != 0) unit += group;
  return unit <= 64 * vec || group % vec == 0;
}

// A block's and a thread's place in a SlabTile.
struct SlabPlace {
  int64_t n, s_part;
  int slab_part;               // piece of a wide group
  int c_first, width;          // the slab's channels
  int g_first, groups, group;  // its groups, and the channels of each that lie in the slab
  int column, r;
  bool active;

  __device__ SlabPlace(const GroupNormSilu& p, const SlabTile& tile, int vec, int64_t unit) {
    const int channels = static_cast<int>(p.C / p.G);
    s_part = unit % tile.s_parts;
    const int slab = static_cast<int>(unit / tile.s_parts % tile.slabs);
    n = unit / tile.s_parts / tile.slabs;
    slab_part = slab % tile.parts;
    g_first = tile.parts == 1 ? slab * tile.width / channels : slab / tile.parts;
    c_first = g_first * channels + slab_part * tile.width;
    const int c_end = tile.parts == 1 ? static_cast<int>(p.C) : (g_first + 1) * channels;
    width = c_first + tile.width < c_end ? tile.width : c_end - c_first;
    groups = tile.parts == 1 ? width / channels : 1;
    group = tile.parts == 1 ? channels : width;
    column = threadIdx.x % tile.columns;
    r = threadIdx.x / tile.columns;
    active = r < tile.rows && column * vec < width;
  }
};

}  // namespace
}  // namespace engine
