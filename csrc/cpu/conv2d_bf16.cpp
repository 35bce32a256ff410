// Convolution and projection of bfloat16 by AMX, or by AVX512_BF16: inference alone.
//
//   out[n, y, x] = sum over sources, taps (i, j) of W[i, j] source[n, s y + i - p, s x + j - p]
//                  + bias + add
//
// A source is a tensor (N, H, W, C) whose channels follow those of the one before: a pair needs no
// concatenation. It has 3 x 3 taps, or the one of a 1 x 1 convolution of the result's size, as a
// block's shortcut, which can be summed with its last convolution. s is 1 or 2; the pictures may be
// read as if each pixel were 2 x 2 (nearest neighbour).
//
// Blocking: rows of A are 16 positions, B 16 channels of the result; up to six tiles of positions
// are summed at a time, for each of which a tile of the weights is read once. The weights lie in
// the order of reading: [16 channels of the result][32 channels of a source][tap],
// kernels/conv2d_bf16.py packs them. What a thread needs of 3 x 3 taps' sources it copies: a plane
// of 64 bytes per position for each 32 channels, a column of zeros behind each row, a row of zeros
// around each picture. Every tap of 16 neighbours is then a tile of stride 64, and the nine taps of
// 32 channels read the same few KB. Rows of A that fall on the zeros between two rows of the
// picture are not stored (of whole sixteens there are none). Stride 2: four planes, of even and odd
// rows and columns. 1 x 1 alone reads its sources in place.
//
// Without AMX the same tiles of weights serve vdpbf16ps: conv2d_bf16_dots.h.
//
// Precision: products of bfloat16 summed in float32, bias and add added to the sum, one rounding.
//
// Parallel: over (group of tiles, 32 channels of the result), in the order that reads less: groups
// first where the weights are the smaller. Each result has one writer and one order of summation,
// so threads change no bit. One region of threads a call; scratch is a thread's own, and kept.
//
// Refused: a CPU without both (conv2d_bf16_level).
//
// Bound: of few positions the weights, 2 bytes for each of (taps C Co) from L3; else the products.
// AMX: rounding and storing take as long as four steps of 32 channels: from kDeep steps on they are
// done between the products (144 against 165 us, 128 channels of 32 x 32), below that is slower.
#include "../kernels.h"
#include "amx.h"
#include "scratch.h"

#ifdef ENGINE_AMX
#include <immintrin.h>

#include <algorithm>

#include "conv2d_bf16_blocks.h"
#include "conv2d_bf16_dots.h"

ENGINE_BF16_TARGET

namespace engine {
namespace conv2d_bf16 {
namespace {

// Copies `count` pixels of 32 channels, `stride` pixels apart, and zeros up to `pixels`.
ENGINE_INLINE void copy_pixels(const char* from, int64_t bytes, __mmask32 mask, int64_t first,
                               int64_t stride, int shift, int64_t width, int64_t pixels, char* to) {
  for (int64_t x = 0; x < pixels; ++x, to += kLine) {
    const int64_t at = first + stride * x;
    const __mmask32 here = from != nullptr && at < width ? mask : 0;
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(here, from + (at >> shift) * bytes));
  }
}

// Sums that are made and not yet rounded and stored.
struct Pending {
  const char* stage = nullptr;
  const Row *next = nullptr, *end = nullptr;
  int64_t channel = 0;
};

// A thread's part of a call.
struct Worker {
  const Convolution& c;
  char* stage;  // kGroup tiles, twice
  Step* steps;
  char* window;
  int64_t window_begin = 0, window_end = 0, top = 0;  // groups; its first padded row
  Pending pending = {};
  int64_t at[kGroup], count = 0, listed = -1;  // tiles of the group `listed`
  Row rows[2][kGroup * kTile];                 // of this group and the one before
  Row *rows_begin = rows[0], *rows_end = rows[0];
  int64_t places[kGroup * kTile];  // of this group's rows in the sources, for dots

  void fill(int64_t group, int64_t end) {
    window_begin = group, window_end = end, top = c.first_row(group), listed = -1;
    const int64_t rows = c.end_row(end) - top, plane = c.plane(rows);
    char* to = window;
    Step* step = steps;
    const Conv2dBf16& p = c.p;
    for (int i = 0; i < p.count; ++i) {
      const Conv2dSource& s = p.sources[i];
      const int64_t stride = s.taps ? p.stride : 1, shift = s.taps && p.upsample;
      const int64_t Hi = s.taps ? p.Hi : p.H, Wi = s.taps ? p.Wi : p.W;
      for (int64_t channel = 0; channel < s.C; channel += 32) {
        for (int64_t phase = 0; phase < stride * stride; ++phase) {
          char* row = to + phase * plane;
          _mm512_store_si512(row, _mm512_setzero_si512());
          row += kLine;
          for (int64_t r = top; r < top + rows; ++r, row += c.pitch * kLine) {
            const int64_t n = (r - 1) / (c.H + 1), y = (r - 1) % (c.H + 1);
            const int64_t at = stride * y + phase / stride;
            const char* from = nullptr;
            if (r > 0 && n < c.N && at < Hi << shift) {
              from = static_cast<const char*>(s.data) +
                     ((n * Hi + (at >> shift)) * Wi * s.C + channel) * 2;
            }
            copy_pixels(from, s.C * 2, words_mask(s.C - channel), phase % stride, stride,
                        static_cast<int>(shift), Wi << shift, c.pitch, row);
          }
        }
        const int64_t pairs = pairs_of(s.C - channel);
        for (int64_t tap = s.taps ? 0 : 4; tap < (s.taps ? 9 : 5); ++tap) {
          const int64_t i = tap / 3 - (s.taps ? p.padding : 1),
                        j = tap % 3 - (s.taps ? p.padding : 1);
          const int64_t phase = (i & (stride - 1)) * stride + (j & (stride - 1));
          const int64_t shift_y = (i - (i & (stride - 1))) / stride;
          const int64_t shift_x = (j - (j & (stride - 1))) / stride;
          *step++ = {to + phase * plane + (shift_y * c.pitch + shift_x) * kLine, kLine, pairs};
        }
        to += stride * stride * plane;
      }
    }
  }

  void in_place() {
    Step* step = steps;
    for (int i = 0; i < c.p.count; ++i) {
      const Conv2dSource& s = c.p.sources[i];
      for (int64_t channel = 0; channel < s.C; channel += 32) {
        *step++ = {static_cast<const char*>(s.data) + channel * 2, s.C * 2, 16};
      }
    }
  }

  // Makes the group's sources available; groups up to `end` are to come.
  void reach(int64_t group, int64_t end) {
    if (c.direct || (group >= window_begin && group < window_end)) return;
    int64_t last = group + 1;
    while (last < end && c.bytes(group, last + 1) <= kWindow) ++last;
    fill(group, last);
  }

  // Rounds and stores up to `count` rows of what is pending.
  ENGINE_INLINE void finish(int64_t count) {
    const Conv2dBf16& p = c.p;
    const Row* end = pending.end - pending.next > count ? pending.next + count : pending.end;
    const int64_t channel = pending.channel;
    const __mmask16 mask = lanes_mask(p.Co - channel);
    __m512 bias = _mm512_setzero_ps();
    if (p.bias != nullptr) bias = _mm512_maskz_loadu_ps(mask, p.bias + channel);
    for (const Row* row = pending.next; row < end; ++row) {
      __m512 v = _mm512_add_ps(_mm512_load_ps(pending.stage + row->from), bias);
      if (p.add != nullptr) {
        const uint16_t* add = static_cast<const uint16_t*>(p.add) + row->at + channel;
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, add));
        v = _mm512_add_ps(v, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
      }
      uint16_t* out = static_cast<uint16_t*>(p.out) + row->at + channel;
      const __m256i words = (__m256i)_mm512_cvtneps_pbh(v);
      if (mask == 0xFFFF) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), words);
      } else {
        _mm256_mask_storeu_epi16(out, mask, words);
      }
    }
    pending.next = end;
  }

  template <int M>
  void multiply(const char* w, char* to) {
    const int64_t quota = (pending.end - pending.next + c.steps - 1) / c.steps;
    tile_zero<0>();
    if constexpr (M > 1) tile_zero<1>();
    if constexpr (M > 2) tile_zero<2>();
    if constexpr (M > 3) tile_zero<3>();
    if constexpr (M > 4) tile_zero<4>();
    if constexpr (M > 5) tile_zero<5>();
    for (const Step* s = steps; s < steps + c.steps; ++s, w += kTileBytes) {
      const char* base = s->base;
      const int64_t pitch = s->pitch;
      for (int64_t i = 0; i < kTile; ++i) {
        _mm_prefetch(w + kAhead * kTileBytes + i * kLine, _MM_HINT_T0);
      }
      tile_load<7>(w, kLine);
      tile_load<6>(base + at[0] * pitch, pitch), tile_multiply<0, 6, 7>();
      if constexpr (M > 1) tile_load<6>(base + at[1] * pitch, pitch), tile_multiply<1, 6, 7>();
      if constexpr (M > 2) tile_load<6>(base + at[2] * pitch, pitch), tile_multiply<2, 6, 7>();
      if constexpr (M > 3) tile_load<6>(base + at[3] * pitch, pitch), tile_multiply<3, 6, 7>();
      if constexpr (M > 4) tile_load<6>(base + at[4] * pitch, pitch), tile_multiply<4, 6, 7>();
      if constexpr (M > 5) tile_load<6>(base + at[5] * pitch, pitch), tile_multiply<5, 6, 7>();
      if (quota > 0) finish(quota);
    }
    tile_store<0>(to, kLine);
    if constexpr (M > 1) tile_store<1>(to + kTileBytes, kLine);
    if constexpr (M > 2) tile_store<2>(to + 2 * kTileBytes, kLine);
    if constexpr (M > 3) tile_store<3>(to + 3 * kTileBytes, kLine);
    if constexpr (M > 4) tile_store<4>(to + 4 * kTileBytes, kLine);
    if constexpr (M > 5) tile_store<5>(to + 5 * kTileBytes, kLine);
  }

  // The rows of a tile that are positions of the result.
  Row* list(const Place& place, int64_t tile, Row* to) const {
    int64_t y = place.y, x = place.x, at = ((place.n * c.H + y) * c.W + x) * c.p.Co;
    for (int64_t i = place.first; i < kTile; ++i, ++x) {
      if (x == c.W) {  // the column of zeros
        if (c.by_rows || ++y == c.H) break;
        x = -1;
        continue;
      }
      *to++ = {tile * kTileBytes + i * kLine, at};
      at += c.p.Co;
    }
    return to;
  }

  void enter(int64_t group) {
    const int64_t first = c.first_tile(group);
    listed = group, count = c.first_tile(group + 1) - first;
    rows_end = rows_begin = rows_begin == rows[0] && c.steps >= kDeep ? rows[1] : rows[0];
    for (int64_t m = 0; m < count; ++m) {
      const Place q = c.place(first + m);
      at[m] = c.direct ? q.at : (1 + q.n * (c.H + 1) + q.y - top) * c.pitch + 1 + q.x;
      rows_end = list(q, m, rows_end);
    }
    for (const Row* row = rows_begin; !c.by_tiles && row < rows_end; ++row) {
      places[row - rows_begin] = at[row->from / kTileBytes] + row->from / kLine % kTile;
    }
  }

  // Starts to bring what the next group reads in place, a part of it: 623 against 655 us, 8,192
  // rows of 128 channels to 128 on one core.
  void fetch(int64_t group, int64_t part, int64_t parts) const {
    if (!c.direct || group >= c.groups) return;
    const int64_t begin = c.first_tile(group) * kTile, end = c.first_tile(group + 1) * kTile;
    for (int i = 0; i < c.p.count; ++i) {
      const Conv2dSource& s = c.p.sources[i];
      const int64_t lines = (std::min(end, c.W) - begin) * s.C * 2 / kLine;
      const char* from = static_cast<const char*>(s.data) + begin * s.C * 2;
      for (int64_t n = part * lines / parts; n < (part + 1) * lines / parts; ++n) {
        _mm_prefetch(from + n * kLine, _MM_HINT_T1);
      }
    }
  }

  // All panels of the unit at a time, a block of rows after the other.
  void unit_by_dots(int64_t group, int64_t which, int64_t panel, int64_t end) {
    const bool two = end - panel == 2;
    const int64_t size = c.steps * kTileBytes, most = two ? kDotRows : kDotRowsOfOne;
    const char* w = static_cast<const char*>(c.p.weight) + panel * size;
    const int64_t channel = panel * kTile;
    Result result = {static_cast<uint16_t*>(c.p.out) + channel, nullptr, nullptr, c.p.Co - channel};
    if (c.p.add != nullptr) result.add = static_cast<const uint16_t*>(c.p.add) + channel;
    if (c.p.bias != nullptr) result.bias = c.p.bias + channel;
    const int64_t all = (rows_end - rows_begin + most - 1) / most;
    int64_t blocks = all;
    for (const Row* row = rows_begin; row < rows_end; --blocks) {  // of the same size, nearly
      if (!c.panels_first) fetch(group + 1, (which + 1) * all - blocks, c.units * all);
      const int64_t count = (rows_end - row + blocks - 1) / blocks;
      dots(two, count, steps, steps + c.steps, places + (row - rows_begin), w, size, row, result);
      row += count;
    }
  }

  void unit(int64_t group, int64_t which) {
    if (group != listed) enter(group);
    const int64_t end = std::min(c.panels, (which + 1) * c.each);
    if (!c.by_tiles) return unit_by_dots(group, which, which * c.each, end);
    for (int64_t panel = which * c.each; panel < end; ++panel) {
      const char* w = static_cast<const char*>(c.p.weight) + panel * c.steps * kTileBytes;
      char* to = stage + (pending.stage == stage && c.steps >= kDeep ? kGroup * kTileBytes : 0);
      switch (count) {
        case 1:
          multiply<1>(w, to);
          break;
        case 2:
          multiply<2>(w, to);
          break;
        case 3:
          multiply<3>(w, to);
          break;
        case 4:
          multiply<4>(w, to);
          break;
        case 5:
          multiply<5>(w, to);
          break;
        default:
          multiply<6>(w, to);
      }
      pending = {to, rows_begin, rows_end, panel * kTile};
      if (c.steps < kDeep) finish(kGroup * kTile);
    }
  }
};

void convolve(const Convolution& c, int64_t begin, int64_t end) {
  const int64_t table = round_up(c.steps * sizeof(Step), kLine), stages = 2 * kGroup * kTileBytes;
  const int64_t groups = c.groups;
  int64_t most = 0;
  if (!c.direct) {
    for (int64_t g = 0; g < groups; ++g) most = std::max(most, c.bytes(g, g + 1));
    most = std::max(most, std::min(kWindow, c.bytes(0, groups)));
  }
  char* scratch = thread_scratch(stages + table + most);
  Worker worker{c, scratch, reinterpret_cast<Step*>(scratch + stages), scratch + stages + table};
  if (c.direct) worker.in_place();
  if (c.by_tiles) TileConfig().load();
  for (int64_t item = begin; item < end; ++item) {
    if (c.panels_first) {
      worker.reach(item % groups, groups);
      worker.unit(item % groups, item / groups);
    } else {
      worker.reach(item / c.units, (end - 1) / c.units + 1);
      worker.unit(item / c.units, item % c.units);
    }
  }
  worker.finish(kGroup * kTile);
  if (c.by_tiles) asm volatile("tilerelease");
}

}  // namespace
}  // namespace conv2d_bf16
}  // namespace engine

ENGINE_BF16_TARGET_END

namespace engine {

int conv2d_bf16_level() { return amx_allowed() ? kAmx : bf16_dots_allowed() ? kAvx512 : 0; }

void conv2d_bf16_fwd_cpu(const Conv2dBf16& p, const ParallelFor& parallel_for) {
  const conv2d_bf16::Convolution c(p, amx_allowed());
  parallel_for(c.groups * c.units, 1,
               [&](int64_t begin, int64_t end) { conv2d_bf16::convolve(c, begin, end); });
}

}  // namespace engine
#else  // this compiler cannot, and nobody calls

namespace engine {
int conv2d_bf16_level() { return 0; }
void conv2d_bf16_fwd_cpu(const Conv2dBf16&, const ParallelFor&) {}
}  // namespace engine
#endif
