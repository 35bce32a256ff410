// GroupNorm, modulation and SiLU in one op on the CPU.
//
// Forward: u = x + add; y = act((u - mean) * rstd * weight * (1 + scale) + bias * (1 + scale) +
// shift), statistics over the C/G channels and S positions of a group. Computed as d = x + t,
// v = d * a + b with t = add - mean rounded to float; b takes in what the rounding left.
// The mean is taken twice, the second time of the centred values, so that 1e3 +- 1e-2 loses
// nothing; the variance is of the centred values. Saved: mean, rstd, float32.
// Backward: dv = dy * act'(v); A, B, X = sums over S of dv, dv * xhat, xhat per (n, c);
// dx = rstd * (g * dv - (S1 + xhat * S2) / M), g = weight * (1 + scale), S1 and S2 the sums over
// the group of g * A and g * B, M = C/G * S. All other gradients follow from A, B, X.
// Parallel: over units, a group's slab (contiguous) or a sample (channels last), each read from
// memory once and then from cache; where there are few units, over pieces of them, in stages.
// What is summed, and in which order, follows from the shape alone, never from the threads.
// Bound: forward 2 and backward 3 elements of x's dtype per element from memory; in 16-bit types
// arithmetic, about 0.8 clock cycles per element in all with AVX-512.
#include "group_norm_silu.h"

#include <memory>
#include <vector>

#include "isa.h"
#define ENGINE_KERNELS "group_norm_silu_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kPiece = 16384;   // elements of a piece, where units are cut
constexpr int64_t kManyUnits = 32;  // enough for every thread: units stay whole
constexpr int64_t kSmall = 65536;   // elements below which stages cost more than they bring

float plain(double v) { return v == v ? static_cast<float>(v) : NAN; }  // see store2 for bf16

// How x is cut: into units that hold whole groups, and units into pieces.
struct Cut {
  const GroupNormSilu& p;
  const GroupNormLoops& loops;
  int64_t size;      // bytes per element
  int64_t channels;  // of a unit
  int64_t groups;    // of a unit
  int64_t units;
  int64_t length;  // of a unit: elements (contiguous) or rows (channels last)
  int64_t piece;   // of the same kind
  int64_t pieces;  // per unit

  explicit Cut(const GroupNormSilu& p)
      : p(p), loops(ENGINE_PICK(group_norm_loops)(p.dtype)), size(p.dtype == DType::f32 ? 4 : 2) {
    channels = p.channels_last ? p.C : p.C / p.G;
    groups = p.channels_last ? p.G : 1;
    units = p.channels_last ? p.N : p.N * p.G;
    length = p.channels_last ? p.S : channels * p.S;
    const bool whole = units >= kManyUnits || p.N * p.C * p.S <= kSmall;
    const int64_t cut = p.channels_last ? (kPiece + p.C - 1) / p.C : kPiece;
    piece = whole || cut > length ? length : cut;
    pieces = (length + piece - 1) / piece;
  }
  int64_t elements() const { return channels * p.S; }  // of a unit
  int64_t sample(int64_t unit) const { return p.channels_last ? unit : unit / p.G; }
  int64_t first_channel(int64_t unit) const { return p.channels_last ? 0 : unit % p.G * channels; }
  int64_t begin(int64_t k) const { return k * piece; }
  int64_t end(int64_t k) const { return k + 1 < pieces ? (k + 1) * piece : length; }
  const char* unit_of(const void* data, int64_t unit) const {
    return static_cast<const char*>(data) + unit * elements() * size;
  }
  char* unit_of(void* data, int64_t unit) const {
    return static_cast<char*>(data) + unit * elements() * size;
  }
  int64_t row_bytes(int64_t row) const { return row * channels * size; }
};

// The small operands of one unit as floats, and the parameters of the loops. One per thread.
class Parameters {
 public:
  explicit Parameters(const Cut& cut)
      : cut_(cut), memory_(new float[11 * cut.channels]), unit_(-1) {
    float** all[] = {&weight, &bias, &add, &scale, &shift, &t, &a, &b, &p, &q, &r};
    for (int i = 0; i < 11; ++i) *all[i] = memory_.get() + i * cut.channels;
  }
  void load(int64_t unit) {
    if (unit == unit_) return;
    first_ = unit_ < 0;
    unit_ = unit;
    read(weight, cut_.p.weight, 1.0f);
    read(bias, cut_.p.bias, 0.0f);
    read(add, cut_.p.add, 0.0f);
    read(scale, cut_.p.scale, 0.0f);
    read(shift, cut_.p.shift, 0.0f);
  }
  float gain(int64_t c) const { return weight[c] * (1.0f + scale[c]); }
  float offset(int64_t c) const { return bias[c] * (1.0f + scale[c]) + shift[c]; }

  // t, so that x + t is centred at `mean`, of channel c; returns what rounding it left.
  double center(int64_t c, double mean) {
    const double exact = static_cast<double>(add[c]) - mean;
    t[c] = plain(exact);
    return exact - t[c];
  }
  // t, a, b of channel c
  double affine(int64_t c, double mean, float rstd) {
    const double rest = center(c, mean);
    a[c] = plain(rstd * gain(c));
    b[c] = plain(offset(c) + static_cast<float>(rest) * a[c]);
    return rest;
  }

  float *weight, *bias, *add, *scale, *shift, *t, *a, *b, *p, *q, *r;

 private:
  void read(float* to, const Operand& from, float absent) {
    if (from.data == nullptr) {
      for (int64_t c = 0; first_ && c < cut_.channels; ++c) to[c] = absent;
      return;
    }
    const int64_t first = cut_.sample(unit_) * from.row_stride + cut_.first_channel(unit_);
    const int64_t size = from.dtype == DType::f32 ? 4 : 2;
    ENGINE_PICK(to_float)
    (to, static_cast<const char*>(from.data) + first * size, from.dtype, cut_.channels);
  }

  const Cut& cut_;
  std::unique_ptr<float[]> memory_;
  int64_t unit_;
  bool first_ = true;  // absent operands are filled in once
};

// ---- Forward ------------------------------------------------------------------------------------

class Forward {
 public:
  Forward(const GroupNormSilu& p, void* y, float* mean, float* rstd)
      : cut_(p), p_(p), y_(y), mean_(mean), rstd_(rstd), centers_(new double[p.N * p.G]) {
    width_ = p.channels_last ? 2 * p.C : 2;
  }

  void run(const ParallelFor& parallel_for) {
    const int64_t pieces = cut_.pieces, items = cut_.units * pieces;
    if (pieces == 1) {
      parallel_for(cut_.units, grain_of(cut_.elements()), [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        std::unique_ptr<double[]> sums(new double[width_]);
        for (int64_t unit = begin; unit < end; ++unit) {
          parameters.load(unit);
          sum(unit, 0, sums.get());
          center(unit, sums.get(), parameters);
          stats(unit, 0, parameters, sums.get());
          finish(unit, sums.get(), parameters);
          apply(unit, 0, parameters, unit + 1 < end);
        }
      });
      return;
    }
    // Stages: the sums of all pieces are there before any unit goes on.
    std::unique_ptr<double[]> all(new double[items * width_]);
    const auto sums = [&](int64_t item) { return all.get() + item * width_; };
    const auto on_pieces = [&](auto&& body) {
      parallel_for(items, 1, [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        for (int64_t item = begin; item < end; ++item) {
          parameters.load(item / pieces);
          body(item / pieces, item % pieces, sums(item), parameters);
        }
      });
    };
    const auto on_units = [&](auto&& body) {
      parallel_for(cut_.units, grain_of(pieces * width_), [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        for (int64_t unit = begin; unit < end; ++unit) {
          parameters.load(unit);
          body(unit, sums(unit * pieces), parameters);
        }
      });
    };
    on_pieces([&](int64_t unit, int64_t k, double* out, Parameters&) { sum(unit, k, out); });
    on_units([&](int64_t unit, double* in, Parameters& s) { center(unit, in, s); });
    on_pieces([&](int64_t unit, int64_t k, double* out, Parameters& s) { stats(unit, k, s, out); });
    on_units([&](int64_t unit, double* in, Parameters& s) { finish(unit, in, s); });
    on_pieces([&](int64_t unit, int64_t k, double*, Parameters& s) {
      affine(unit, s);
      apply(unit, k, s, false);
    });
  }

 private:
  double* centers(int64_t unit) { return centers_.get() + unit * cut_.groups; }

  void sum(int64_t unit, int64_t k, double* out) {
    const char* x = cut_.unit_of(p_.x, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k);
    if (p_.channels_last) {
      for (int64_t c = 0; c < p_.C; ++c) out[c] = 0;
      cut_.loops.columns_sum(x + cut_.row_bytes(begin), end - begin, p_.C, out);
    } else {
      out[0] = cut_.loops.sum(x, begin, end);
    }
  }

  // Adds up the pieces' sums, each `width` wide, into the first.
  void gather(double* sums, int64_t width) {
    for (int64_t k = 1; k < cut_.pieces; ++k) {
      for (int64_t i = 0; i < width; ++i) sums[i] += sums[k * width_ + i];
    }
  }

  // A first mean, good enough to centre by.
  void center(int64_t unit, double* sums, Parameters& s) {
    gather(sums, p_.channels_last ? p_.C : 1);
    const int64_t D = p_.C / p_.G;
    const double M = static_cast<double>(D) * p_.S;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      double total = p_.channels_last ? 0 : sums[0], added = 0;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        if (p_.channels_last) total += sums[c];
        added += s.add[c];
      }
      const double mean = (total + added * p_.S) / M;
      centers(unit)[g] = mean;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) s.center(c, mean);
    }
  }

  void stats(int64_t unit, int64_t k, Parameters& s, double* out) {
    const char* x = cut_.unit_of(p_.x, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k), D = p_.C / p_.G;
    if (cut_.pieces > 1) {
      for (int64_t c = 0; c < cut_.channels; ++c) s.center(c, centers(unit)[c / D]);
    }
    if (p_.channels_last) {
      for (int64_t i = 0; i < 2 * p_.C; ++i) out[i] = 0;
      cut_.loops.columns_stats(x + cut_.row_bytes(begin), end - begin, p_.C, s.t, out);
    } else {  // without `add` all rows have the same parameter: one long row
      cut_.loops.stats(x, begin, end, p_.add.data ? p_.S : cut_.length, s.t, out);
    }
  }

  void finish(int64_t unit, double* sums, Parameters& s) {
    gather(sums, width_);
    const int64_t D = p_.C / p_.G;
    const double M = static_cast<double>(D) * p_.S;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      double first = p_.channels_last ? 0 : sums[0], second = p_.channels_last ? 0 : sums[1];
      double base = 0;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        if (p_.channels_last) first += sums[c], second += sums[p_.C + c];
        const double exact = static_cast<double>(s.add[c]) - centers(unit)[g];
        base += static_cast<double>(s.add[c]) - static_cast<float>(exact);
      }
      const double mean = (first + base * p_.S) / M;
      double variance = (second - first * first / M) / M;
      variance = variance < 0 ? 0 : variance;
      centers(unit)[g] = mean;
      mean_[unit * cut_.groups + g] = static_cast<float>(mean);
      rstd_[unit * cut_.groups + g] = static_cast<float>(1.0 / std::sqrt(variance + p_.eps));
    }
    if (cut_.pieces == 1) affine(unit, s);
  }

  void affine(int64_t unit, Parameters& s) {
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const float rstd = rstd_[unit * cut_.groups + g];
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        s.affine(c, centers(unit)[g], rstd);
        if (p_.silu) s.a[c] *= cut_.loops.silu_scale, s.b[c] *= cut_.loops.silu_scale;
      }
    }
  }

  void apply(int64_t unit, int64_t k, const Parameters& s, bool more) {
    const char* x = cut_.unit_of(p_.x, unit);
    char* y = cut_.unit_of(y_, unit);
    const char* ahead = more ? cut_.unit_of(p_.x, unit + 1) : nullptr;
    const int64_t begin = cut_.begin(k), end = cut_.end(k);
    if (p_.channels_last) {
      const int64_t skip = cut_.row_bytes(begin);
      cut_.loops.columns_apply(x + skip, y + skip, end - begin, p_.C, s.t, s.a, s.b, p_.silu,
                               ahead);
    } else {
      cut_.loops.apply(x, y, begin, end, p_.S, s.t, s.a, s.b, p_.silu, ahead);
    }
  }

  const Cut cut_;
  const GroupNormSilu& p_;
  void* y_;
  float *mean_, *rstd_;
  std::unique_ptr<double[]> centers_;  // (N, G): the means in double
  int64_t width_;                      // doubles of sums per piece
};

// ---- Backward -----------------------------------------------------------------------------------

class Backward {
 public:
  Backward(const GroupNormSilu& p, const void* dy, const float* mean, const float* rstd,
           float* workspace, const GroupNormSiluGrads& grads)
      : cut_(p),
        p_(p),
        dy_(dy),
        mean_(mean),
        rstd_(rstd),
        A_(workspace),
        B_(workspace + p.N * p.C),
        grads_(grads),
        group_sums_(new double[2 * p.N * p.G]) {
    width_ = 3 * cut_.channels;
    single_ = p.C == p.G && p.S == 1;
  }

  void run(const ParallelFor& parallel_for) {
    const int64_t pieces = cut_.pieces, items = cut_.units * pieces;
    if (pieces == 1) {
      parallel_for(cut_.units, grain_of(cut_.elements()), [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        std::unique_ptr<double[]> sums(new double[width_]);
        for (int64_t unit = begin; unit < end; ++unit) {
          affine(unit, parameters);
          sum(unit, 0, parameters, sums.get());
          combine(unit, sums.get(), parameters);
          apply(unit, 0, parameters, unit + 1 < end);
        }
      });
    } else {
      std::unique_ptr<double[]> sums(new double[items * width_]);
      parallel_for(items, 1, [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        for (int64_t item = begin; item < end; ++item) {
          affine(item / pieces, parameters);
          sum(item / pieces, item % pieces, parameters, sums.get() + item * width_);
        }
      });
      parallel_for(cut_.units, grain_of(pieces * width_), [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        for (int64_t unit = begin; unit < end; ++unit) {
          affine(unit, parameters);
          combine(unit, sums.get() + unit * pieces * width_, parameters);
        }
      });
      parallel_for(items, 1, [&](int64_t begin, int64_t end) {
        Parameters parameters(cut_);
        for (int64_t item = begin; item < end; ++item) {
          affine(item / pieces, parameters);
          apply(item / pieces, item % pieces, parameters, false);
        }
      });
    }
    if (grads_.dweight || grads_.dbias) {
      parallel_for(p_.C, grain_of(p_.N),
                   [&](int64_t begin, int64_t end) { channel_gradients(begin, end); });
    }
  }

 private:
  void affine(int64_t unit, Parameters& s) {
    s.load(unit);
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t i = unit * cut_.groups + g;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        s.affine(c, mean_[i], rstd_[i]);
        if (single_) s.a[c] = 0, s.b[c] = plain(s.offset(c));
      }
    }
  }

  void sum(int64_t unit, int64_t k, const Parameters& s, double* out) {
    const char *x = cut_.unit_of(p_.x, unit), *dy = cut_.unit_of(dy_, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k), skip = cut_.row_bytes(begin);
    for (int64_t i = 0; i < width_; ++i) out[i] = 0;
    if (p_.channels_last) {
      cut_.loops.columns_grad_sums(x + skip, dy + skip, end - begin, p_.C, s.t, s.a, s.b, p_.silu,
                                   out);
    } else {
      cut_.loops.grad_sums(x, dy, begin, end, p_.S, s.t, s.a, s.b, p_.silu, out);
    }
  }

  // A, B, X of the unit's channels, the group sums, and the gradients of the (N, C) operands.
  void combine(int64_t unit, double* sums, const Parameters& s) {
    for (int64_t k = 1; k < cut_.pieces; ++k) {
      for (int64_t i = 0; i < width_; ++i) sums[i] += sums[k * width_ + i];
    }
    const int64_t D = p_.C / p_.G, first = cut_.sample(unit) * p_.C + cut_.first_channel(unit);
    const int64_t row = p_.channels_last ? 1 : 3, column = p_.channels_last ? p_.C : 1;
    const double M = static_cast<double>(D) * p_.S;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t group = unit * cut_.groups + g;
      const double mean = mean_[group], rstd = rstd_[group];
      double S1 = 0, S2 = 0;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        double* abx = sums + c * row;
        const double rest = static_cast<double>(s.add[c]) - mean - s.t[c];
        const double A = abx[0], B = single_ ? 0 : rstd * (abx[column] + rest * A);
        abx[column] = B;
        abx[2 * column] = single_ ? 0 : rstd * (abx[2 * column] + rest * p_.S);
        S1 += s.gain(c) * A;
        S2 += s.gain(c) * B;
        A_[first + c] = static_cast<float>(A);
        B_[first + c] = static_cast<float>(B);
        if (grads_.dshift) grads_.dshift[first + c] = static_cast<float>(A);
        if (grads_.dscale) {
          grads_.dscale[first + c] = static_cast<float>(s.weight[c] * B + s.bias[c] * A);
        }
      }
      group_sums_[2 * group] = S1 / M;
      group_sums_[2 * group + 1] = S2 / M;
      if (grads_.dadd == nullptr) continue;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        const double A = sums[c * row], X = sums[c * row + 2 * column];
        grads_.dadd[first + c] =
            static_cast<float>(rstd * (s.gain(c) * A - (p_.S * S1 + X * S2) / M));
      }
    }
  }

  void apply(int64_t unit, int64_t k, Parameters& s, bool more) {
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t group = unit * cut_.groups + g;
      const double mean = mean_[group], rstd = rstd_[group];
      const double S1 = group_sums_[2 * group], S2 = group_sums_[2 * group + 1];
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        const double rest = static_cast<double>(s.add[c]) - mean - s.t[c];
        s.p[c] = plain(rstd * s.gain(c));
        s.q[c] = plain(rstd * (S1 + rest * rstd * S2));
        s.r[c] = plain(rstd * rstd * S2);
        if (single_) s.p[c] = s.q[c] = s.r[c] = 0;
      }
    }
    const char *x = cut_.unit_of(p_.x, unit), *dy = cut_.unit_of(dy_, unit);
    const char* x_ahead = more ? cut_.unit_of(p_.x, unit + 1) : nullptr;
    const char* dy_ahead = more ? cut_.unit_of(dy_, unit + 1) : nullptr;
    char* dx = cut_.unit_of(grads_.dx, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k), skip = cut_.row_bytes(begin);
    if (p_.channels_last) {
      cut_.loops.columns_grad_apply(x + skip, dy + skip, dx + skip, end - begin, p_.C, s.t, s.a,
                                    s.b, s.p, s.q, s.r, p_.silu, x_ahead, dy_ahead);
    } else {
      cut_.loops.grad_apply(x, dy, dx, begin, end, p_.S, s.t, s.a, s.b, s.p, s.q, s.r, p_.silu,
                            x_ahead, dy_ahead);
    }
  }

  // dweight = sum_n (1 + scale) * B, dbias = sum_n (1 + scale) * A
  void channel_gradients(int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<float> scale(count, 0.0f);
    std::vector<double> dweight(count, 0.0), dbias(count, 0.0);
    for (int64_t n = 0; n < p_.N; ++n) {
      if (p_.scale.data) {
        const int64_t skip = n * p_.scale.row_stride + begin;
        ENGINE_PICK(to_float)
        (scale.data(),
         static_cast<const char*>(p_.scale.data) + skip * (p_.scale.dtype == DType::f32 ? 4 : 2),
         p_.scale.dtype, count);
      }
      for (int64_t c = 0; c < count; ++c) {
        dweight[c] += (1.0 + scale[c]) * B_[n * p_.C + begin + c];
        dbias[c] += (1.0 + scale[c]) * A_[n * p_.C + begin + c];
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      if (grads_.dweight) grads_.dweight[begin + c] = static_cast<float>(dweight[c]);
      if (grads_.dbias) grads_.dbias[begin + c] = static_cast<float>(dbias[c]);
    }
  }

  const Cut cut_;
  const GroupNormSilu& p_;
  const void* dy_;
  const float *mean_, *rstd_;
  float *A_, *B_;  // (N, C)
  const GroupNormSiluGrads& grads_;
  std::unique_ptr<double[]> group_sums_;  // (N, G, 2): S1 / M, S2 / M
  int64_t width_;
  bool single_;  // groups of one element: xhat and dx are 0, exactly, though rstd is large
};

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

}  // namespace

void group_norm_silu_fwd_cpu(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                             const ParallelFor& parallel_for) {
  Forward(p, y, mean, rstd).run(parallel_for);
}

void group_norm_silu_bwd_cpu(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                             const float* mean, const float* rstd, float* workspace,
                             const GroupNormSiluGrads& grads, const ParallelFor& parallel_for) {
  std::unique_ptr<char[]> copy;
  if (dy_channels_last != p.channels_last) {  // rare: bring dy into the layout of x
    const int64_t rows = dy_channels_last ? p.S : p.C, columns = dy_channels_last ? p.C : p.S;
    const int64_t size = p.dtype == DType::f32 ? 4 : 2;
    copy.reset(new char[p.N * rows * columns * size]);
    if (size == 4) {
      transpose(static_cast<const uint32_t*>(dy), reinterpret_cast<uint32_t*>(copy.get()), p.N,
                rows, columns, parallel_for);
    } else {
      transpose(static_cast<const uint16_t*>(dy), reinterpret_cast<uint16_t*>(copy.get()), p.N,
                rows, columns, parallel_for);
    }
    dy = copy.get();
  }
  Backward(p, dy, mean, rstd, workspace, grads).run(parallel_for);
}

}  // namespace engine
