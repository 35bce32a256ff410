// A tensor in the other one of the two layouts.
#pragma once

#include <memory>

#include "isa.h"

namespace engine {

// (N, rows, columns) -> (N, columns, rows), in tiles that stay in cache.
template <class T>
void transpose(const T* from, T* to, int64_t N, int64_t rows, int64_t columns,
               const ParallelFor& parallel_for) {
  constexpr int64_t kTile = 32;
  const int64_t tiles = (rows + kTile - 1) / kTile;
  parallel_for(N * tiles, grain_of(kTile * columns), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t base = item / tiles * rows * columns, r0 = item % tiles * kTile;
      const int64_t r1 = r0 + kTile < rows ? r0 + kTile : rows;
      for (int64_t c0 = 0; c0 < columns; c0 += kTile) {
        const int64_t c1 = c0 + kTile < columns ? c0 + kTile : columns;
        for (int64_t c = c0; c < c1; ++c) {
          for (int64_t r = r0; r < r1; ++r) to[base + c * rows + r] = from[base + r * columns + c];
        }
      }
    }
  });
}

// (N, C, S), or channels last (N, S, C), of elements of `size` bytes -> a copy in the other layout.
inline std::unique_ptr<char[]> other_layout(const void* from, bool channels_last, int64_t size,
                                            int64_t N, int64_t C, int64_t S,
                                            const ParallelFor& parallel_for) {
  const int64_t rows = channels_last ? S : C, columns = channels_last ? C : S;
  std::unique_ptr<char[]> copy(new char[N * rows * columns * size]);
  if (size == 4) {
    transpose(static_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(copy.get()), N, rows,
              columns, parallel_for);
  } else {
    transpose(static_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(copy.get()), N, rows,
              columns, parallel_for);
  }
  return copy;
}

}  // namespace engine
