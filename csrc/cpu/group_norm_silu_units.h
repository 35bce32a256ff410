// How GroupNorm's tensors are cut into work, and the small operands of a piece of work.
#pragma once

#include <cmath>
#include <memory>

#include "../kernels.h"

namespace engine {

constexpr int64_t kPiece = 16384;    // elements of a piece, where units are cut
constexpr int64_t kManyUnits = 32;   // enough for every thread: units stay whole
constexpr int64_t kSmall = 65536;    // elements below which stages cost more than they bring
constexpr int64_t kTogether = 4096;  // elements up to which small slabs make one unit

// A NaN without payload, for store2 of bfloat16.
inline float plain(float v) { return v == v ? v : NAN; }
inline float plain(double v) { return plain(static_cast<float>(v)); }

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// The channels [c0, c1) of a unit that lie in one tensor: all of them, or one half's of a pair.
// data + i is element i of the unit (contiguous; only those between c0 and c1 are there), or row
// r's channel c0 at data + r * width elements (channels last).
struct Half {
  int64_t c0, c1;
  char* data;
  int64_t width() const { return c1 - c0; }
};
struct Halves {
  Half both[2];
  int64_t count;
  const Half* begin() const { return both; }
  const Half* end() const { return both + count; }
};

// x is cut into units that hold whole groups, and units into pieces. Contiguous: one group's slab,
// or several small ones, whose statistics then overlap in the pipeline. Channels last: a sample.
struct Cut {
  const GroupNormSilu& p;
  int64_t size;      // bytes per element
  int64_t channels;  // of a unit
  int64_t groups;    // of a unit
  int64_t units;
  int64_t length;  // of a unit: elements (contiguous) or rows (channels last)
  int64_t piece;   // of the same kind
  int64_t pieces;  // per unit

  explicit Cut(const GroupNormSilu& p) : p(p), size(size_of(p.dtype)) {
    const int64_t D = p.C / p.G;
    groups = p.channels_last ? p.G : together(p.G, D * p.S, p.N);
    channels = groups * D;
    units = p.N * (p.G / groups);
    length = p.channels_last ? p.S : channels * p.S;
    const bool whole = units >= kManyUnits || p.N * p.C * p.S <= kSmall;
    const int64_t cut = p.channels_last ? (kPiece + p.C - 1) / p.C : kPiece;
    piece = whole || cut > length ? length : cut;
    pieces = (length + piece - 1) / piece;
  }
  int64_t elements() const { return channels * p.S; }  // of a unit
  int64_t sample(int64_t unit) const { return unit / (p.G / groups); }
  int64_t first_channel(int64_t unit) const { return unit % (p.G / groups) * channels; }
  int64_t begin(int64_t k) const { return k * piece; }
  int64_t end(int64_t k) const { return k + 1 < pieces ? (k + 1) * piece : length; }
  const char* unit_of(const void* data, int64_t unit) const {
    return static_cast<const char*>(data) + unit * elements() * size;
  }
  // The unit in x or dx, whose last C2 channels lie in data2.
  Halves halves(const void* data, const void* data2, int64_t unit) const {
    char* a = static_cast<char*>(const_cast<void*>(data));
    if (data2 == nullptr) return {{{0, channels, a + unit * elements() * size}}, 1};
    char* b = static_cast<char*>(const_cast<void*>(data2));
    const int64_t n = sample(unit), first = first_channel(unit), Ca = p.C - p.C2;
    const int64_t seam = Ca < first ? 0 : Ca - first < channels ? Ca - first : channels;
    const int64_t skip = p.channels_last ? 0 : first;
    a += (n * Ca + skip) * p.S * size;
    b += (n * p.C2 + (p.channels_last ? 0 : first - Ca)) * p.S * size;
    if (seam == 0) return {{{0, channels, b}}, 1};
    if (seam == channels) return {{{0, channels, a}}, 1};
    return {{{0, seam, a}, {seam, channels, b}}, 2};
  }
  // body(half, i0, i1) for what each half has of the unit's elements [begin, end); contiguous.
  template <class Body>
  void on_halves(const Halves& halves, int64_t begin, int64_t end, Body&& body) const {
    for (const Half& half : halves) {
      const int64_t i0 = half.c0 * p.S > begin ? half.c0 * p.S : begin;
      const int64_t i1 = half.c1 * p.S < end ? half.c1 * p.S : end;
      if (i0 < i1) body(half, i0, i1);
    }
  }
  char* unit_of(void* data, int64_t unit) const {
    return static_cast<char*>(data) + unit * elements() * size;
  }
  int64_t row_bytes(int64_t row) const { return row * channels * size; }

 private:
  static int64_t together(int64_t G, int64_t slab, int64_t N) {
    int64_t groups = 1;
    const bool small = N * G * slab <= kSmall;
    while (G % (2 * groups) == 0 && 2 * groups * slab <= kTogether &&
           (small || N * (G / (2 * groups)) >= kManyUnits)) {
      groups *= 2;
    }
    return groups;
  }
};

// The small operands of one unit as floats, and the parameters of the loops. One per thread.
class Parameters {
 public:
  using ToFloat = void (*)(float* to, const void* from, DType dtype, int64_t n);

  Parameters(const Cut& cut, ToFloat to_float)
      : cut_(cut),
        to_float_(to_float),
        memory_(new float[7 * cut.p.C + 5 * cut.channels]),
        sample_(-1),
        alike(cut.p.add.data == nullptr) {
    float** all[] = {&t, &a, &b, &q, &r};
    for (int i = 0; i < 5; ++i) *all[i] = memory_.get() + 7 * cut.p.C + i * cut.channels;
  }
  void load(int64_t unit) {
    if (cut_.sample(unit) != sample_) {
      const bool first = sample_ < 0;
      sample_ = cut_.sample(unit);
      read(0, cut_.p.weight, 1.0f, first);
      read(1, cut_.p.bias, 0.0f, first);
      read(2, cut_.p.add, 0.0f, first);
      read(3, cut_.p.scale, 0.0f, first);
      read(4, cut_.p.shift, 0.0f, first);
      if (first || cut_.p.scale.data || cut_.p.shift.data) modulate();
    }
    const float** all[] = {&weight, &bias, &add, &scale, &shift, &gain, &offset};
    for (int i = 0; i < 7; ++i) *all[i] = operand(i) + cut_.first_channel(unit);
  }

  // t of the channels [c0, c1), so that x + t is centred at `mean`.
  void center(int64_t c0, int64_t c1, double mean) {
    if (alike) {
      const float same = plain(-mean);
      for (int64_t c = c0; c < c1; ++c) t[c] = same;
      return;
    }
    for (int64_t c = c0; c < c1; ++c) t[c] = plain(add[c] - mean);
  }
  // What rounding left of t: add - mean = t + rest.
  double rest(int64_t c, double mean) const { return add[c] - mean - t[c]; }

  // t, a, b of the channels [c0, c1)
  void affine(int64_t c0, int64_t c1, double mean, float rstd, float silu_scale) {
    center(c0, c1, mean);
    const float first = static_cast<float>(rest(c0, mean));
    for (int64_t c = c0; c < c1; ++c) {
      a[c] = plain(rstd * gain[c]);
      b[c] = plain(offset[c] + (alike ? first : static_cast<float>(rest(c, mean))) * a[c]);
    }
    for (int64_t c = c0; silu_scale != 1.0f && c < c1; ++c) a[c] *= silu_scale, b[c] *= silu_scale;
  }

  // Of the unit's channels; gain = weight * (1 + scale), offset = bias * (1 + scale) + shift.
  const float *weight, *bias, *add, *scale, *shift, *gain, *offset;
  float *t, *a, *b, *q, *r;

 private:
  void modulate() {
    for (int64_t c = 0; c < cut_.p.C; ++c) {
      const float more = 1.0f + operand(3)[c];
      operand(5)[c] = operand(0)[c] * more;
      operand(6)[c] = operand(1)[c] * more + operand(4)[c];
    }
  }
  float* operand(int i) const { return memory_.get() + i * cut_.p.C; }
  void read(int i, const Operand& from, float absent, bool first) {
    if (from.data == nullptr) {
      for (int64_t c = 0; first && c < cut_.p.C; ++c) operand(i)[c] = absent;
    } else if (first || from.row_stride != 0) {  // (C,) operands are the same in every sample
      const int64_t skip = sample_ * from.row_stride * size_of(from.dtype);
      to_float_(operand(i), static_cast<const char*>(from.data) + skip, from.dtype, cut_.p.C);
    }
  }

  const Cut& cut_;
  ToFloat to_float_;
  std::unique_ptr<float[]> memory_;
  int64_t sample_;

 public:
  const bool alike;  // no `add`: t is the same in all channels of a group
};

}  // namespace engine
