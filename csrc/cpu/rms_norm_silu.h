// The loops of rms_norm_silu.cpp and rms_norm_silu_bwd.cpp that are compiled per instruction set,
// for one dtype of x; and what the two share.
//
// xhat = x * |rstd|, v = xhat * gain + offset, gain = weight * (1 + scale), offset = shift.
// Contiguous ("planes"): x points at a sample's first position, rstd at its too; [s0, s1) is a
// range of the positions of all C planes of S elements. Channels last ("rows"): x is `rows` rows of
// C elements, rstd has a value per row.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>

#include "../kernels.h"
#include "group_norm_silu_units.h"

namespace engine {

struct RmsNormLoops {
  float silu_scale;  // with silu, gain and offset are wanted multiplied by this

  void (*to_float)(float* to, const void* from, DType dtype, int64_t n);

  void (*planes)(const void* x, void* y, float* rstd, int64_t s0, int64_t s1, int64_t C, int64_t S,
                 float eps, const float* gain, const float* offset, bool silu);
  void (*rows)(const void* x, void* y, float* rstd, int64_t rows, int64_t C, float eps,
               const float* gain, const float* offset, bool silu);
};

// out[c], out[C + c] += sums of (dv, dv * xhat). kept: floats for dv, which costs a sigmoid,
// between the two passes over a few positions; as many as planes_kept(C) or rows_kept(C).
struct RmsNormGradLoops {
  void (*to_float)(float* to, const void* from, DType dtype, int64_t n);
  int64_t (*planes_kept)(int64_t C);
  int64_t (*rows_kept)(int64_t C);

  void (*planes)(const void* x, const void* dy, void* dx, const float* rstd, int64_t s0, int64_t s1,
                 int64_t C, int64_t S, const float* gain, const float* offset, bool silu,
                 double* out, float* kept);
  void (*rows)(const void* x, const void* dy, void* dx, const float* rstd, int64_t rows, int64_t C,
               const float* gain, const float* offset, bool silu, double* out, float* kept);
};

// How the tensor is cut: an item is a piece of a sample's positions.
struct RmsNormItems {
  const RmsNormSilu& p;
  int64_t size, piece, pieces;  // bytes per element; positions of a piece; pieces of a sample

  explicit RmsNormItems(const RmsNormSilu& p)
      : p(p),
        size(size_of(p.dtype)),
        piece(rms_norm_silu_piece(p)),
        pieces(rms_norm_silu_pieces(p)) {}

  int64_t count() const { return p.N * pieces; }
  int64_t begin(int64_t item) const { return item % pieces * piece; }
  int64_t end(int64_t item) const {
    const int64_t end = begin(item) + piece;
    return end < p.S ? end : p.S;
  }
  // Bytes from the start of x to the sample (contiguous) or to the item (channels last).
  int64_t skip(int64_t item) const {
    const int64_t position = item / pieces * p.S + (p.channels_last ? begin(item) : 0);
    return position * p.C * size;
  }
};

// gain and offset of one sample. One per thread.
class RmsNormParameters {
 public:
  using ToFloat = void (*)(float* to, const void* from, DType dtype, int64_t n);

  RmsNormParameters(const RmsNormSilu& p, ToFloat to_float)
      : p_(p), to_float_(to_float), memory_(new float[3 * p.C]) {
    gain = memory_.get(), offset = gain + p.C;
  }
  void load(int64_t n, float silu_scale) {
    if (n == sample_ || (sample_ >= 0 && !p_.scale.data && !p_.shift.data)) return;
    sample_ = n;
    float* other = memory_.get() + 2 * p_.C;
    read(gain, p_.weight, 1.0f);
    read(other, p_.scale, 0.0f);
    read(offset, p_.shift, 0.0f);
    for (int64_t c = 0; c < p_.C; ++c) {
      gain[c] = plain(gain[c] * (1.0f + other[c])) * silu_scale;
      offset[c] = plain(offset[c]) * silu_scale;
    }
  }
  float *gain, *offset;

 private:
  void read(float* to, const Operand& from, float absent) const {
    if (from.data == nullptr) {
      for (int64_t c = 0; c < p_.C; ++c) to[c] = absent;
      return;
    }
    const int64_t skip = sample_ * from.row_stride * size_of(from.dtype);
    to_float_(to, static_cast<const char*>(from.data) + skip, from.dtype, p_.C);
  }

  const RmsNormSilu& p_;
  ToFloat to_float_;
  std::unique_ptr<float[]> memory_;
  int64_t sample_ = -1;
};

}  // namespace engine
