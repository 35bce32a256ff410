// GroupNorm, modulation and SiLU in one op on the CPU, forward (backward: group_norm_silu_bwd.cpp).
//
// u = x + add; y = act((u - mean) * rstd * weight * (1 + scale) + bias * (1 + scale) + shift),
// statistics over the C/G channels and S positions of a group. Computed as d = x + t,
// v = d * a + b with t = add - mean rounded to float; b takes in what the rounding left.
// Statistics: sums of d and d^2 with t of a first mean, taken from a few vectors of the unit. That
// is as exact as two passes while the first mean lies within a standard deviation of the mean;
// where it does not, which the sums themselves tell, they are taken again around the mean they
// gave. So 1e3 +- 1e-2 loses nothing, and x is read twice, not three times. Saved: mean, rstd,
// float32. Parallel: over units, a group's slab (contiguous) or a sample (channels last), each read
// from memory once and then from cache; where there are few units, over pieces of them, in stages.
// What is summed, and in which order, follows from shape and values alone, never from the threads.
// Bound: 2 elements of x's dtype per element from memory; in 16-bit types arithmetic, about 0.7
// clock cycles per element in all with AVX-512.
#include "group_norm_silu.h"

#include <vector>

#include "group_norm_silu_units.h"
#include "isa.h"
#define ENGINE_KERNELS "group_norm_silu_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kPilotRows = 16;  // rows that the first mean looks at, channels last

// One thread's operands, and its sums of a piece's columns. Only a group's sums leave the piece:
// merging those of all columns, from the other core's cache, cost a tenth of batch 1's time.
struct Thread : Parameters {
  Thread(const Cut& cut, ToFloat to_float)
      : Parameters(cut, to_float),
        columns(cut.p.channels_last ? new double[2 * cut.p.C] : nullptr) {}
  std::unique_ptr<double[]> columns;
};

class Forward {
 public:
  Forward(const GroupNormSilu& p, void* y, float* mean, float* rstd)
      : cut_(p),
        loops_(ENGINE_PICK(group_norm_loops)(p.dtype)),
        p_(p),
        y_(y),
        mean_(mean),
        rstd_(rstd),
        centers_(new double[p.N * p.G]),
        width_(2 * cut_.groups) {}

  void run(const ParallelFor& parallel_for) {
    cut_.pieces == 1 ? run_whole(parallel_for) : run_pieces(parallel_for);
  }

 private:
  void run_whole(const ParallelFor& parallel_for) {
    parallel_for(cut_.units, grain_of(cut_.elements()), [&](int64_t begin, int64_t end) {
      Thread thread(cut_, loops_.to_float);
      std::unique_ptr<double[]> sums(new double[width_]);
      for (int64_t unit = begin; unit < end; ++unit) {
        thread.load(unit);
        pilot(unit, thread);
        stats(unit, 0, thread, sums.get());
        if (!finish(unit, sums.get(), thread)) {
          stats(unit, 0, thread, sums.get());
          finish(unit, sums.get(), thread);
        }
        apply(unit, 0, thread, unit + 1 < end);
      }
    });
  }

  // Stages: the sums of all pieces are there before any unit goes on.
  void run_pieces(const ParallelFor& parallel_for) {
    const int64_t pieces = cut_.pieces;
    std::unique_ptr<double[]> all(new double[cut_.units * pieces * width_]);
    std::vector<char> again(cut_.units, 1);
    const auto sums = [&](int64_t item) { return all.get() + item * width_; };
    const auto on_units = [&](int64_t cost, auto&& body) {
      parallel_for(cut_.units, grain_of(cost), [&](int64_t begin, int64_t end) {
        Thread thread(cut_, loops_.to_float);
        for (int64_t unit = begin; unit < end; ++unit) {
          if (!again[unit]) continue;
          thread.load(unit);
          body(unit, thread);
        }
      });
    };
    const auto on_pieces = [&](auto&& body) {
      parallel_for(cut_.units * pieces, 1, [&](int64_t begin, int64_t end) {
        Thread thread(cut_, loops_.to_float);
        for (int64_t item = begin; item < end; ++item) {
          thread.load(item / pieces);
          body(item / pieces, item % pieces, thread);
        }
      });
    };
    on_units(kPilotRows * cut_.channels, [&](int64_t unit, Thread& s) { pilot(unit, s); });
    for (bool wanted = true; wanted;) {
      on_pieces([&](int64_t unit, int64_t k, Thread& s) {
        if (again[unit]) stats(unit, k, s, sums(unit * pieces + k));
      });
      on_units(pieces * width_, [&](int64_t unit, Thread& s) {
        const bool second = again[unit] == 2;
        again[unit] = finish(unit, sums(unit * pieces), s) || second ? 0 : 2;
      });
      wanted = false;
      for (const char unit : again) wanted |= unit != 0;
    }
    on_pieces([&](int64_t unit, int64_t k, Thread& s) { apply(unit, k, s, false); });
  }

  Halves x_of(int64_t unit) const { return cut_.halves(p_.x, p_.x2, unit); }
  double* centers(int64_t unit) { return centers_.get() + unit * cut_.groups; }

  // The first means, to centre by.
  void pilot(int64_t unit, const Thread& s) {
    const Halves x = x_of(unit);
    const int64_t D = p_.C / p_.G, length = D * p_.S;
    const int64_t rows = p_.S < kPilotRows ? p_.S : kPilotRows;
    for (const Half& h : x) {
      if (!p_.channels_last) break;
      loops_.columns_pilot(h.data, rows, p_.S / rows * h.width(), h.width(), s.t + h.c0);
    }
    for (int64_t g = 0; g < cut_.groups; ++g) {
      double total = 0, added = 0;
      if (!p_.channels_last) {
        cut_.on_halves(x, g * length, (g + 1) * length, [&](const Half& h, int64_t i0, int64_t i1) {
          total += (i1 - i0) * loops_.slab_pilot(h.data + i0 * cut_.size, i1 - i0) / p_.S;
        });
      }
      for (int64_t c = g * D; c < (g + 1) * D; ++c) {
        if (p_.channels_last) total += s.t[c] / rows;
        if (!s.alike) added += s.add[c];
      }
      centers(unit)[g] = (total + added) / D;
    }
  }

  // With `add`, a centre that every add - centre is exact for, as far as a float can tell: what
  // rounding took from t, other in each channel, would be missing in the sums of d^2.
  void center(int64_t unit, Thread& s) {
    const int64_t D = p_.C / p_.G;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      double center = centers(unit)[g];
      float largest = 0;
      for (int64_t c = g * D; p_.add.data && c < (g + 1) * D; ++c) {
        largest = std::fabs(s.add[c]) > largest ? std::fabs(s.add[c]) : largest;
      }
      if (largest > 0 && largest < INFINITY) {
        const double step = std::ldexp(1.0, std::ilogb(largest) - 23);  // the largest one's ulp
        center = std::nearbyint(center / step) * step;
      }
      s.center(g * D, (g + 1) * D, center);
    }
  }

  void stats(int64_t unit, int64_t k, Thread& s, double* out) {
    const Halves x = x_of(unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k);
    center(unit, s);
    for (int64_t i = 0; i < width_; ++i) out[i] = 0;
    const int64_t D = p_.C / p_.G, length = D * p_.S;
    if (p_.channels_last) {
      double* columns = s.columns.get();
      for (int64_t i = 0; i < 2 * p_.C; ++i) columns[i] = 0;
      for (const Half& h : x) {
        loops_.columns_stats(h.data + begin * h.width() * cut_.size, end - begin, h.width(),
                             s.t + h.c0, columns + h.c0, p_.C);
      }
      for (int64_t g = 0; g < cut_.groups; ++g) {
        for (int64_t c = g * D; c < (g + 1) * D; ++c) {
          out[2 * g] += columns[c], out[2 * g + 1] += columns[p_.C + c];
        }
      }
      return;
    }
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const bool pieces = cut_.pieces > 1;  // then the unit is one slab
      cut_.on_halves(x, pieces ? begin : g * length, pieces ? end : (g + 1) * length,
                     [&](const Half& h, int64_t i0, int64_t i1) {
                       // Without `add` all rows have the same parameter: one long row.
                       const int64_t skip = g * length;
                       loops_.slab_stats(h.data + skip * cut_.size, i0 - skip, i1 - skip,
                                         p_.add.data ? p_.S : length, s.t + g * D, out + 2 * g);
                     });
    }
  }

  // Mean and rstd from the sums; false if a first mean was too far from the mean to trust them.
  bool finish(int64_t unit, double* sums, Thread& s) {
    center(unit, s);
    for (int64_t k = 1; k < cut_.pieces; ++k) {
      for (int64_t i = 0; i < width_; ++i) sums[i] += sums[k * width_ + i];
    }
    const int64_t D = p_.C / p_.G;
    const double M = static_cast<double>(D) * p_.S;
    bool centred = true;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const double first = sums[2 * g], second = sums[2 * g + 1];
      double base = 0;
      if (s.alike) base = -static_cast<double>(D) * s.t[g * D];
      for (int64_t c = g * D; !s.alike && c < (g + 1) * D; ++c) {
        base += static_cast<double>(s.add[c]) - s.t[c];
      }
      const double mean = (first + base * p_.S) / M, off = first / M;
      double variance = second / M - off * off;
      variance = variance < 0 ? 0 : variance;
      centred &=
          off * off <= variance && variance < INFINITY;  // an overflow may be the first mean's
      centers(unit)[g] = mean;
      mean_[unit * cut_.groups + g] = static_cast<float>(mean);
      rstd_[unit * cut_.groups + g] = static_cast<float>(1.0 / std::sqrt(variance + p_.eps));
    }
    return centred;
  }

  void apply(int64_t unit, int64_t k, Thread& s, bool more) {
    const int64_t D = p_.C / p_.G;
    const float silu_scale = p_.silu ? loops_.silu_scale : 1.0f;
    for (int64_t g = 0; g < cut_.groups; ++g) {
      const float rstd = rstd_[unit * cut_.groups + g];
      s.affine(g * D, (g + 1) * D, centers(unit)[g], rstd, silu_scale);
    }
    char* y = cut_.unit_of(y_, unit);
    const int64_t begin = cut_.begin(k), end = cut_.end(k);
    const char* ahead = more && p_.x2 == nullptr ? cut_.unit_of(p_.x, unit + 1) : nullptr;
    if (p_.channels_last) {
      for (const Half& h : x_of(unit)) {
        loops_.columns_apply(h.data + begin * h.width() * cut_.size,
                             y + cut_.row_bytes(begin) + h.c0 * cut_.size, end - begin, h.width(),
                             p_.C, s.t + h.c0, s.a + h.c0, s.b + h.c0, p_.silu, ahead);
      }
    } else {
      cut_.on_halves(x_of(unit), begin, end, [&](const Half& h, int64_t i0, int64_t i1) {
        loops_.slab_apply(h.data, y, i0, i1, p_.S, s.t, s.a, s.b, p_.silu, ahead);
      });
    }
  }

  const Cut cut_;
  const GroupNormLoops& loops_;
  const GroupNormSilu& p_;
  void* y_;
  float *mean_, *rstd_;
  std::unique_ptr<double[]> centers_;  // (N, G): the means in double
  int64_t width_;                      // doubles of sums per piece
};

}  // namespace

void group_norm_silu_fwd_cpu(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                             const ParallelFor& parallel_for) {
  Forward(p, y, mean, rstd).run(parallel_for);
}

}  // namespace engine
