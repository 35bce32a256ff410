// GroupNorm, modulation and SiLU on the CPU, backward (forward: group_norm_silu.cpp).
//
// dv = dy * act'(v); A, B, X = sums over S of dv, dv * xhat, xhat per (n, c);
// dx = rstd * (g * dv - (S1 + xhat * S2) / M) + dx_add, g = weight * (1 + scale), S1 and S2 the
// sums over the group of g * A and g * B, M = C/G * S. All other gradients follow from A, B, X. dv
// costs a sigmoid, so the first pass keeps it for the second: float32 in dx, 16-bit types in a
// buffer of one unit per thread (4 bytes per element, in L2) unless the unit is too large for that.
// Parallel: as the forward. Fixed order of sums, one writer per value.
// Bound: 3 elements of x's dtype per element from memory, 4 with dx_add; in 16-bit
// types arithmetic.
#include <algorithm>
#include <vector>

#include "group_norm_silu.h"
#include "group_norm_silu_units.h"
#include "isa.h"
#include "transpose.h"
#define ENGINE_KERNELS "group_norm_silu_bwd_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kKept = 196608;  // floats of dv that a thread keeps: 768 KB of a 2 MB L2

// One buffer per thread, for good: fresh memory would cost a page fault per 4 KB in every call.
float* kept_buffer() {
  thread_local std::unique_ptr<float[]> buffer(new float[kKept]);
  return buffer.get();
}

class Backward {
 public:
  Backward(const GroupNormSilu& p, const void* dy, const float* mean, const float* rstd,
           float* workspace, const GroupNormSiluGrads& grads)
      : cut_(p),
        loops_(ENGINE_PICK(group_norm_grad_loops)(p.dtype)),
        p_(p),
        dy_(dy),
        mean_(mean),
        rstd_(rstd),
        A_(workspace),
        B_(workspace + p.N * p.C),
        grads_(grads),
        group_sums_(new double[2 * p.N * p.G]),
        width_(3 * cut_.channels),
        kept_row_(!p.channels_last ? padded(p.S)
                  : p.x2           ? padded(p.C - p.C2) + padded(p.C2)
                                   : padded(p.C)),
        single_(p.C == p.G && p.S == 1),
        with_x_(grads.dadd != nullptr) {}

  void run(const ParallelFor& parallel_for) {
    cut_.pieces == 1 ? run_whole(parallel_for) : run_pieces(parallel_for);
    if (grads_.dweight || grads_.dbias) {
      parallel_for(p_.C, grain_of(p_.N),
                   [&](int64_t begin, int64_t end) { channel_gradients(begin, end); });
    }
  }

 private:
  // Where a first pass leaves dv; null: nowhere, the second computes it again.
  struct Kept {
    float* dv;
    int64_t row;
  };
  int64_t padded(int64_t row) const { return (row + loops_.pair - 1) / loops_.pair * loops_.pair; }

  // float32 keeps dv in dx, 16-bit types in a buffer: rows of whole Pairs, each half's apart.
  Kept kept(const Half& x, const Half& dx, int64_t first_row, float* buffer) const {
    if (!p_.silu) return {nullptr, 0};
    if (p_.dtype == DType::f32) {
      float* dv = reinterpret_cast<float*>(dx.data);
      return p_.channels_last ? Kept{dv + first_row * dx.width(), dx.width()} : Kept{dv, p_.S};
    }
    if (!buffer) return {nullptr, 0};
    if (!p_.channels_last) return {buffer, padded(p_.S)};
    return {buffer + (x.c0 ? padded(x.c0) : 0), kept_row_};
  }

  void run_whole(const ParallelFor& parallel_for) {
    const int64_t rows = p_.channels_last ? p_.S : cut_.channels;
    const bool fits = rows * kept_row_ <= kKept;
    parallel_for(cut_.units, grain_of(cut_.elements()), [&](int64_t begin, int64_t end) {
      Parameters parameters(cut_, loops_.to_float);
      std::unique_ptr<double[]> sums(new double[width_]);
      float* buffer = fits && p_.dtype != DType::f32 ? kept_buffer() : nullptr;
      for (int64_t unit = begin; unit < end; ++unit) {
        affine(unit, parameters);
        sum(unit, 0, parameters, sums.get(), buffer);
        combine(unit, sums.get(), parameters);
        apply(unit, 0, parameters, unit + 1 < end, buffer);
      }
    });
  }

  void run_pieces(const ParallelFor& parallel_for) {
    const int64_t pieces = cut_.pieces, items = cut_.units * pieces;
    std::unique_ptr<double[]> sums(new double[items * width_]);
    parallel_for(items, 1, [&](int64_t begin, int64_t end) {
      Parameters parameters(cut_, loops_.to_float);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t unit = item / pieces, k = item % pieces;
        affine(unit, parameters);
        sum(unit, k, parameters, sums.get() + item * width_, nullptr);
      }
    });
    parallel_for(cut_.units, grain_of(pieces * width_), [&](int64_t begin, int64_t end) {
      Parameters parameters(cut_, loops_.to_float);
      for (int64_t unit = begin; unit < end; ++unit) {
        affine(unit, parameters);
        combine(unit, sums.get() + unit * pieces * width_, parameters);
      }
    });
    parallel_for(items, 1, [&](int64_t begin, int64_t end) {
      Parameters parameters(cut_, loops_.to_float);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t unit = item / pieces, k = item % pieces;
        affine(unit, parameters);
        apply(unit, k, parameters, false, nullptr);
      }
    });
  }

  void affine(int64_t unit, Parameters& s) {
    s.load(unit);
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t i = unit * cut_.groups + g;
      s.affine(g * D, (g + 1) * D, mean_[i], rstd_[i], 1.0f);
      for (int64_t c = g * D; single_ && c < (g + 1) * D; ++c) {
        s.a[c] = 0, s.b[c] = s.offset[c];
      }
    }
  }

  void sum(int64_t unit, int64_t k, const Parameters& s, double* out, float* buffer) {
    const Halves xs = cut_.halves(p_.x, p_.x2, unit),
                 dxs = cut_.halves(grads_.dx, grads_.dx2, unit);
    const char* dy = cut_.unit_of(dy_, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k), size = cut_.size;
    for (int64_t i = 0; i < width_; ++i) out[i] = 0;
    for (int64_t h = 0; h < xs.count && p_.channels_last; ++h) {
      const Half &x = xs.both[h], &dx = dxs.both[h];
      const Kept dv = kept(x, dx, begin, buffer);
      loops_.columns_sums(x.data + begin * x.width() * size,
                          dy + cut_.row_bytes(begin) + x.c0 * size, end - begin, x.width(), p_.C,
                          s.t + x.c0, s.a + x.c0, s.b + x.c0, p_.silu, with_x_, out + x.c0, dv.dv,
                          dv.row);
    }
    if (p_.channels_last) return;
    cut_.on_halves(xs, begin, end, [&](const Half& x, int64_t i0, int64_t i1) {
      const Kept dv = kept(x, dxs.both[&x - xs.both], 0, buffer);
      loops_.slab_sums(x.data, dy, i0, i1, p_.S, s.t, s.a, s.b, p_.silu, with_x_, out,
                       cut_.channels, dv.dv, dv.row);
    });
  }

  // A, B, X of the unit's channels, the group sums, and the gradients of the (N, C) operands.
  void combine(int64_t unit, double* sums, const Parameters& s) {
    for (int64_t k = 1; k < cut_.pieces; ++k) {
      for (int64_t i = 0; i < width_; ++i) sums[i] += sums[k * width_ + i];
    }
    const int64_t D = p_.C / p_.G, first = cut_.sample(unit) * p_.C + cut_.first_channel(unit);
    double *A = sums, *B = sums + cut_.channels, *X = sums + 2 * cut_.channels;
    const double per_element = 1 / (static_cast<double>(D) * p_.S);
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t group = unit * cut_.groups + g, begin = g * D, end = begin + D;
      const double mean = mean_[group], rstd = single_ ? 0 : rstd_[group];
      for (int64_t c = begin; c < end; ++c) {
        const double rest = s.rest(s.alike ? begin : c, mean);
        B[c] = rstd * (B[c] + rest * A[c]);
        if (with_x_) X[c] = rstd * (X[c] + rest * p_.S);
      }
      double S1 = 0, S2 = 0;
      for (int64_t c = begin; c < end; ++c) S1 += s.gain[c] * A[c], S2 += s.gain[c] * B[c];
      S1 *= per_element, S2 *= per_element;
      group_sums_[2 * group] = S1;
      group_sums_[2 * group + 1] = S2;
      for (int64_t c = begin; grads_.dadd && c < end; ++c) {
        grads_.dadd[first + c] =
            static_cast<float>(rstd * (s.gain[c] * A[c] - (p_.S * S1 + X[c] * S2)));
      }
    }
    float *to_A = A_ + first, *to_B = B_ + first;
    for (int64_t c = 0; c < cut_.channels; ++c) {
      to_A[c] = static_cast<float>(A[c]);
      to_B[c] = static_cast<float>(B[c]);
    }
    if (grads_.dshift) std::copy(to_A, to_A + cut_.channels, grads_.dshift + first);
    for (int64_t c = 0; grads_.dscale && c < cut_.channels; ++c) {
      grads_.dscale[first + c] = static_cast<float>(s.weight[c] * B[c] + s.bias[c] * A[c]);
    }
  }

  void apply(int64_t unit, int64_t k, Parameters& s, bool more, float* buffer) {
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const int64_t group = unit * cut_.groups + g;
      const double mean = mean_[group], rstd = rstd_[group];
      const double S1 = group_sums_[2 * group], S2 = group_sums_[2 * group + 1];
      const float r = single_ ? 0 : plain(rstd * rstd * S2);
      float q = 0;
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        if (!single_ && (c == g * D || !s.alike)) {
          q = plain(rstd * (S1 + s.rest(c, mean) * rstd * S2));
        }
        s.q[c] = q, s.r[c] = r;
      }
    }
    const Halves xs = cut_.halves(p_.x, p_.x2, unit),
                 dxs = cut_.halves(grads_.dx, grads_.dx2, unit);
    const Halves adds = grads_.dx_add ? cut_.halves(grads_.dx_add, grads_.dx2_add, unit) : Halves{};
    const char* dy = cut_.unit_of(dy_, unit);
    // The processor's own prefetching does better than ours in float32 (by 14 %) and channels last
    // (by up to 20 %); not so in 16-bit slabs.
    more = more && p_.x2 == nullptr && p_.dtype != DType::f32;
    const char* x_ahead = more ? cut_.unit_of(p_.x, unit + 1) : nullptr;
    const char* dy_ahead = more ? cut_.unit_of(dy_, unit + 1) : nullptr;
    const int64_t begin = cut_.begin(k), end = cut_.end(k), size = cut_.size;
    for (int64_t h = 0; h < xs.count && p_.channels_last; ++h) {
      const Half &x = xs.both[h], &dx = dxs.both[h];
      const Kept dv = kept(x, dx, begin, buffer);
      const int64_t c = x.c0, skip = begin * x.width() * size;
      const char* add = adds.both[h].data;
      loops_.columns_apply(x.data + skip, dy + cut_.row_bytes(begin) + c * size, dx.data + skip,
                           end - begin, x.width(), p_.C, s.t + c, s.a + c, s.b + c, s.q + c,
                           s.r + c, p_.silu, dv.dv, dv.row, add ? add + skip : nullptr);
    }
    if (p_.channels_last) return;
    cut_.on_halves(xs, begin, end, [&](const Half& x, int64_t i0, int64_t i1) {
      const Half& dx = dxs.both[&x - xs.both];
      const Kept dv = kept(x, dx, 0, buffer);
      loops_.slab_apply(x.data, dy, dx.data, i0, i1, p_.S, s.t, s.a, s.b, s.q, s.r, p_.silu, dv.dv,
                        dv.row, adds.both[&x - xs.both].data, x_ahead, dy_ahead);
    });
  }

  // dweight = sum_n (1 + scale) * B, dbias = sum_n (1 + scale) * A
  void channel_gradients(int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    std::vector<float> scale(count, 0.0f);
    std::vector<double> dweight(count, 0.0), dbias(count, 0.0);
    for (int64_t n = 0; n < p_.N; ++n) {
      if (p_.scale.data) {
        const int64_t skip = n * p_.scale.row_stride + begin;
        loops_.to_float(scale.data(),
                        static_cast<const char*>(p_.scale.data) + skip * size_of(p_.scale.dtype),
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
  const GroupNormGradLoops& loops_;
  const GroupNormSilu& p_;
  const void* dy_;
  const float *mean_, *rstd_;
  float *A_, *B_;  // (N, C)
  const GroupNormSiluGrads& grads_;
  std::unique_ptr<double[]> group_sums_;  // (N, G, 2): S1 / M, S2 / M
  int64_t width_;                         // doubles of sums per piece
  int64_t kept_row_;                      // floats of a row of kept dv
  bool single_;  // groups of one element: xhat and dx are 0, exactly, though rstd is large
  bool with_x_;  // the sums of xhat are wanted: for dadd alone
};

}  // namespace

void group_norm_silu_bwd_cpu(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                             const float* mean, const float* rstd, float* workspace,
                             const GroupNormSiluGrads& grads, const ParallelFor& parallel_for) {
  std::unique_ptr<char[]> copy;
  if (dy_channels_last != p.channels_last) {  // rare: bring dy into the layout of x
    copy = other_layout(dy, dy_channels_last, size_of(p.dtype), p.N, p.C, p.S, parallel_for);
    dy = copy.get();
  }
  Backward(p, dy, mean, rstd, workspace, grads).run(parallel_for);
}

}  // namespace engine
