// The interface between the kernels and their caller: plain pointers, sizes and a stream, no torch.
// csrc/ops_<op>.cpp, tests/native_module.cpp and the emulation tests call these functions; csrc/cpu
// and csrc/cuda define them.
#pragma once

#include <cstdint>
#include <functional>

namespace engine {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3 };  // u8: pictures only

// Runs body(begin, end) over disjoint ranges that cover [0, n), at least `grain` items in each.
// The caller brings the thread pool (torch's own, or none), so that no second one is started.
using ParallelFor = std::function<void(
    int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

// A small operand: element (n, c) at data[n * row_stride + c]; per-channel operands have
// row_stride 0. data == nullptr: the operand is absent.
struct Operand {
  const void* data = nullptr;
  int64_t row_stride = 0;
  DType dtype = DType::f32;
};

// y = act(GN(x + add) * (1 + scale) + shift), GN(u) = (u - mean) * rstd * weight + bias.
struct GroupNormSilu {
  int64_t N, C, S, G;  // batch, channels (of x and x2), spatial size, groups; C % G == 0
  float eps;
  bool silu;           // act is SiLU; else the identity
  bool channels_last;  // x (and y, dx) are (N, S, C) in memory; else (N, C, S)
  DType dtype;         // of x, x2, y, dy, dx, dx2
  const void* x;
  // A pair: the last C2 channels lie in x2, (N, C2, S) in the layout of x, which has the others.
  const void* x2 = nullptr;
  int64_t C2 = 0;
  Operand weight, bias;       // (C,)
  Operand add, scale, shift;  // (N, C)
};

// Gradients of the forward. Every pointer but dx (and dx2 of a pair) may be null: not wanted.
struct GroupNormSiluGrads {
  void* dx;        // dtype, shape and layout of x
  float* dweight;  // (C,)
  float* dbias;    // (C,)
  float* dadd;     // (N, C) contiguous, like dscale and dshift
  float* dscale;
  float* dshift;
  void* dx2 = nullptr;  // of x2
  // The CPU's alone: added to dx (dx2) before it is rounded; dtype, shape and layout of x (x2).
  const void* dx_add = nullptr;
  const void* dx2_add = nullptr;
};

// mean, rstd: (N, G) float32. y: (N, C, S), dtype and layout of x.
void group_norm_silu_fwd_cpu(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                             const ParallelFor& parallel_for);
void group_norm_silu_fwd_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                              void* stream);

// The same by thread-block clusters; false where they do not serve the call or the device.
bool group_norm_silu_fwd_cluster_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                                      void* stream);

// The same by one cooperative launch that reads x once from memory and once from L2; false as
// above. allocate: device memory of so many floats, until the stream has done this.
using Allocate = std::function<float*(int64_t floats)>;
bool group_norm_silu_fwd_blocked_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                                      const Allocate& allocate, void* stream);

// workspace: 3 * N * C float32, sums over S of (du, du * xhat, xhat) per (n, c).
void group_norm_silu_bwd_cpu(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                             const float* mean, const float* rstd, float* workspace,
                             const GroupNormSiluGrads& grads, const ParallelFor& parallel_for);
void group_norm_silu_bwd_cuda(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                              const float* mean, const float* rstd, float* workspace,
                              const GroupNormSiluGrads& grads, void* stream);

// The same by a cooperative launch, as the forward's.
bool group_norm_silu_bwd_blocked_cuda(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                                      const float* mean, const float* rstd, float* workspace,
                                      const GroupNormSiluGrads& grads, const Allocate& allocate,
                                      void* stream);

// y = act(x / max(|x|, eps) * sqrt(C) * weight * (1 + scale) + shift), |x| the 2-norm of a pixel's
// channels.
struct RmsNormSilu {
  int64_t N, C, S;
  float eps;           // at least 1e-18, below which float squares underflow
  bool silu;           // act is SiLU; else the identity
  bool channels_last;  // x (and y, dx) are (N, S, C) in memory; else (N, C, S)
  DType dtype;         // of x, y, dy, dx
  const void* x;
  Operand weight;        // (C,)
  Operand scale, shift;  // (N, C)
};

// Gradients of the forward. Every pointer but dx may be null: not wanted.
struct RmsNormSiluGrads {
  void* dx;        // dtype, shape and layout of x
  float* dweight;  // (C,)
  float* dscale;   // (N, C) contiguous, like dshift
  float* dshift;
};

// rstd: (N, S) float32, sqrt(C) / max(|x|, eps), negative where |x| < eps: there the gradient takes
// it for a constant.
void rms_norm_silu_fwd_cpu(const RmsNormSilu& p, void* y, float* rstd,
                           const ParallelFor& parallel_for);

// A sample is cut into pieces of so many positions; what is summed where follows from the shape.
inline int64_t rms_norm_silu_piece(const RmsNormSilu& p) {
  if (p.N >= 32 || p.N * p.C * p.S <= 65536) return p.S;
  const int64_t piece = (16384 / p.C / 128 + 1) * 128;  // whole vectors
  return piece < p.S ? piece : p.S;
}
inline int64_t rms_norm_silu_pieces(const RmsNormSilu& p) {
  const int64_t piece = rms_norm_silu_piece(p);
  return (p.S + piece - 1) / piece;
}
// workspace: (N, pieces, 2, C) float32, sums over a piece of (dv, dv * xhat) per (n, c).
void rms_norm_silu_bwd_cpu(const RmsNormSilu& p, const void* dy, bool dy_channels_last,
                           const float* rstd, float* workspace, const RmsNormSiluGrads& grads,
                           const ParallelFor& parallel_for);

// out = softmax(q k^T * scale) v per head. Element (n, h, s, d) of a view lies at
// n * n_stride + h * h_stride + s * s_stride + d * d_stride, in elements (the fields n, h, s, d).
struct AttentionView {
  void* data = nullptr;  // written where the view is a result
  int64_t n = 0, h = 0, s = 0;
  int64_t d = 1;  // 3: packed qkv of order "hd3"
};
struct Attention {
  DType dtype;             // of every view
  int64_t N, H, S, Sk, D;  // none is 0
  AttentionView q;         // (N, H, S, D)
  AttentionView k, v;      // (N, H, Sk, D)
  float scale;
};
// out: (N, H, S, D). lse: (N, H, S) contiguous, ln sum exp(q k^T * scale); null: not wanted.
void attention_fwd_cpu(const Attention& p, const AttentionView& out, float* lse,
                       const ParallelFor& parallel_for);
// dout, out: (N, H, S, D); dq like q, dk and dv like k. The bits do not depend on the threads.
struct AttentionGrads {
  AttentionView dout, out;  // read
  const float* lse;
  AttentionView dq, dk, dv;  // written
};
void attention_bwd_cpu(const Attention& p, const AttentionGrads& grads,
                       const ParallelFor& parallel_for);

// The noise contract (csrc/philox.h): element i of a contiguous tensor takes the normal number
// offset + i of (seed, step, stream_id). seed and step are read from memory by the kernel, so that
// a captured launch can be replayed with other values.
void noise_cpu(void* out, DType dtype, int64_t n, const int64_t* seed, const int64_t* step,
               uint32_t stream_id, int64_t offset, const ParallelFor& parallel_for);
void noise_cuda(void* out, DType dtype, int64_t n, const int64_t* seed, const int64_t* step,
                uint32_t stream_id, int64_t offset, void* stream);

// One plain reverse step. With row = coeffs[step] = (a, b, c, d, s, ...):
//   x0 = clamp(a * x + b * model_out, -clip, clip);  x_next = c * x0 + d * x + s * z
// z: `noise` if given, else normal number offset + i of (seed, step, stream 0), i the element's
// index in the contiguous (N, C, S) order whatever the layouts; not drawn where s == 0. NaN passes
// the clamp. A step outside [0, n_steps) gives NaN.
struct ReverseStep {
  int64_t N, C, S;
  DType dtype;  // of x, noise and x_next
  DType model_out_dtype;
  bool x_channels_last;  // x and x_next
  bool model_out_channels_last;
  bool noise_channels_last;
  const void* x;
  const void* model_out;
  const void* noise;    // null: drawn from the key
  const float* coeffs;  // (n_steps, columns) contiguous
  int64_t n_steps;
  int64_t columns = 5;
  const int64_t* step;
  const int64_t* seed;  // read only when noise is null
  int64_t offset;
  float clip;  // infinity: no clipping
};
void reverse_step_fwd_cpu(const ReverseStep& p, void* x_next, const ParallelFor& parallel_for);
void reverse_step_fwd_cuda(const ReverseStep& p, void* x_next, void* stream);

// An (N, C, S) operand, possibly a slice of a larger tensor: element (n, c, s) at
// n * sample + c * pitch + s, or, channels_last, at n * sample + s * pitch + c.
struct StepOperand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::f32;
  bool channels_last = false;
  int64_t sample = 0, pitch = 0;
};

// One reverse step with any of its variants; kernels/reverse_step.py has the equations. The row
// (a, b, c, d, s, e, g0, g1, lo, hi) of coeffs ends after s if columns is 5: the rest is then 0.
//   out = uncond + guidance * (model_out - uncond)
//   x0 = bound(a * x + b * out + g0 * grad), bound: the clamp, or with m = threshold[n]: the clamp
//   to +-m divided by m
//   var = exp(lo + (hi - lo) * (v + 1) / 2), 1 if v is absent
//   x_next = c * x0 + d * x + e * x0_prev + g1 * var * grad + s * sqrt(var) * z
// noise is not touched where s == 0, x0_prev not where e == 0, v not where lo == hi.
struct ReverseStepGeneral {
  int64_t N, C, S;
  StepOperand x, model_out, v, uncond, grad, x0_prev, noise;
  DType dtype;               // of x_next and x0
  bool channels_last;        // layout of all results
  void* x_next = nullptr;    // may be x.data if x is dense
  void* x0 = nullptr;        // null: not wanted
  void* model_in = nullptr;  // x_next again, in model_in_dtype; null: not wanted
  DType model_in_dtype = DType::f32;
  const float* threshold = nullptr;  // (N,); null: static clipping
  const float* coeffs;
  int64_t n_steps, columns = 5;
  const int64_t* step;
  const int64_t* seed = nullptr;
  int64_t offset = 0;
  float guidance = 1, clip = 1;
};
void reverse_step_general_fwd_cpu(const ReverseStepGeneral& p, const ParallelFor& parallel_for);
void reverse_step_general_fwd_cuda(const ReverseStepGeneral& p, void* stream);

// threshold[n] = max(1, quantile of |x0| over sample n), x0 before any bound; NaN if one is NaN.
// The quantile lies between the order statistics `rank` and rank + 1 (from 0), `fraction` past the
// first. C * S < 2^31.
void reverse_step_threshold_fwd_cpu(const ReverseStepGeneral& p, int64_t rank, float fraction,
                                    float* threshold, const ParallelFor& parallel_for);
void reverse_step_threshold_fwd_cuda(const ReverseStepGeneral& p, int64_t rank, float fraction,
                                     float* threshold, void* stream);

// The forward process, its noise drawn in place. With (a, b, p, q) = coeffs[t[n]] and eps normal
// number offset + i of (seed, step, stream 2), i the element's index in the contiguous (N, C, S)
// order whatever the layouts:
//   x_t = a * x0 + b * eps,  target = p * x0 + q * eps
// x0: u8 means x0 / 127.5 - 1. A t outside [0, T) gives NaN.
struct ForwardNoise {
  int64_t N, C, S;
  DType x0_dtype;
  bool x0_channels_last;
  bool noise_channels_last;
  const void* x0;
  const float* noise;   // null: drawn from the key
  const float* coeffs;  // (T, 4) contiguous
  int64_t T;
  const int64_t* t;     // (N,)
  const int64_t* seed;  // read, like step, only when noise is null
  const int64_t* step;
  int64_t offset;
};
void forward_noise_fwd_cpu(const ForwardNoise& p, void* x_t, DType dtype, bool channels_last,
                           const ParallelFor& parallel_for);
void forward_noise_fwd_cuda(const ForwardNoise& p, void* x_t, DType dtype, bool channels_last,
                            void* stream);

// loss[n] = weights[n] / M * sum of l(model_out - target), M = C * S, with the target made again
// from x0 and the noise's key; l(r) is |r|, r^2, or r^2 / 2 where |r| < 1 and |r| - 1/2 beyond.
enum class Loss : int32_t { l1 = 0, l2 = 1, huber = 2 };
struct ForwardNoiseLoss {
  const void* model_out;
  DType dtype;  // of model_out and its gradient
  bool channels_last;
  const float* weights;  // (N,); null: 1
  Loss loss;
};
// A sample's sum is taken in chunks, each by one writer, and these are added in order.
constexpr int64_t kForwardNoiseChunk = 2048;
inline int64_t forward_noise_chunks(const ForwardNoise& p) {
  return (p.C * p.S + kForwardNoiseChunk - 1) / kForwardNoiseChunk;
}
// workspace: (N, chunks) double. On the CPU: mean, loss is one number, the mean over N, not (N,);
// grad, null, or like model_out: the gradient of loss, of each sample's own where there are N.
void forward_noise_loss_fwd_cpu(const ForwardNoise& p, const ForwardNoiseLoss& l, double* workspace,
                                float* loss, bool mean, void* grad,
                                const ParallelFor& parallel_for);
void forward_noise_loss_fwd_cuda(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                 double* workspace, float* loss, void* stream);
// dmodel_out = dloss[n] * weights[n] / M * l'(model_out - target), layout of model_out.
void forward_noise_loss_bwd_cpu(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                const float* dloss, void* dmodel_out,
                                const ParallelFor& parallel_for);
void forward_noise_loss_bwd_cuda(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                 const float* dloss, void* dmodel_out, void* stream);

// y = conv3x3(x, w) + bias + add, stride 1, padding 1: NHWC, by Winograd's F(2x2, 3x3). E is float
// or bf16.
template <class E>
struct Conv2dWinograd {
  int64_t N, C, H, W, K;  // batch, channels of x and x2, rows and columns of y, channels of y
  bool upsample;  // x is (H / 2, W / 2): each pixel stands for 2x2 of the convolution's input
  const E* x;     // (N, H, W, C - C2)
  const E* x2 = nullptr;        // (N, H, W, C2): the last channels
  int64_t C2 = 0;               // C % 16 == C2 % 16 == 0; of bf16 32
  const E* weight;              // K % 32 == 0: G w G^T of 16 channels of y, as float
                                // (K / 16, 16, C, 16), as bf16 (K / 16, 16, C / 2, 16, 2)
  const float* bias = nullptr;  // (K,)
  const E* add = nullptr;       // (N, H, W, K)
  E* y;                         // (N, H, W, K)
};

// Its packed weight of w (K, C, 3, 3): element (k, c, tap) lies at k * k_stride + c * c_stride +
// tap * tap_stride; the taps in reverse order with `flip`.
void conv2d_winograd_weight_cpu(const float* w, int64_t K, int64_t C, int64_t k_stride,
                                int64_t c_stride, int64_t tap_stride, bool flip, float* packed,
                                const ParallelFor& parallel_for);
void conv2d_winograd_fwd_cpu(const Conv2dWinograd<float>& p, const ParallelFor& parallel_for);

// Gradients of w and bias: C % 16 == 0, K % 32 == 0, no size 0.
struct Conv2dWinogradGrads {
  int64_t N, C, H, W, K;
  const float* dy;  // (N, H, W, K)
  const float* x;   // (N, H, W, C)
  float* dweight;   // (k, c, tap) as w above:
  int64_t k_stride, c_stride, tap_stride;
  float* dbias = nullptr;  // (K,); null: not wanted
};
// workspace: 16 (C K + 16) float32.
void conv2d_winograd_bwd_weight_cpu(const Conv2dWinogradGrads& p, float* workspace,
                                    const ParallelFor& parallel_for);

// out[n, y, x] = sum over sources, taps (i, j) of W[i, j] source[n, s y + i - p, s x + j - p]
//                + bias + add, in bfloat16, where conv2d_bf16_level is not 0.
struct Conv2dSource {
  const void* data;  // (N, H, W, C) bfloat16
  int64_t C;
  bool taps;  // 3 x 3 of a picture of Hi x Wi pixels; else 1 x 1 of one of H x W
};
struct Conv2dBf16 {
  int64_t N, H, W, Co;      // of the result; all > 0
  int64_t Hi, Wi;           // of the pictures in memory
  int64_t stride, padding;  // of 3 x 3: 1 and 1, 2 and 1, or 2 and 0
  bool upsample;            // each pixel is read as 2 x 2; stride 1
  Conv2dSource sources[4];
  int count;
  const void* weight;  // (Co / 16, steps, 16, 16, 2), kernels/conv2d_bf16.py
  const float* bias;   // (Co,), like add and out; null, like add: none
  const void* add;     // (N, H, W, Co) bfloat16
  void* out;           // (N, H, W, Co) bfloat16
};
// Tiles of weights for 16 channels of the result.
inline int64_t conv2d_bf16_steps(const Conv2dBf16& p) {
  int64_t steps = 0;
  for (int i = 0; i < p.count; ++i) {
    steps += (p.sources[i].C + 31) / 32 * (p.sources[i].taps ? 9 : 1);
  }
  return steps;
}
// Whose instructions it takes: 3 AMX's, 2 AVX512_BF16's, 0: there are neither.
int conv2d_bf16_level();
// The best instructions that the CPU's kernels may take: cpu/isa.h. For tests.
void limit_isa_level(int level);
void conv2d_bf16_fwd_cpu(const Conv2dBf16& p, const ParallelFor& parallel_for);

// AdamW (Loshchilov & Hutter 2019, alg. 2) on tensors that lie in memory alike, walked as n floats:
//   g = grad * grad_scale, w = weight * (1 - lr * weight_decay), k the step's number from 1
//   m = lerp(m, g, 1 - beta1), v = beta2 * v + (1 - beta2) * g^2
//   weight = w - lr / (1 - beta1^k) * m / (sqrt(v / (1 - beta2^k)) + eps)
//   average = lerp(average, weight, average_weight), low = weight in bf16
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  float grad_scale, average_weight;
};
struct AdamWTensor {
  int64_t n;
  double step;  // k
  const void* grad;
  DType grad_dtype;  // f32 or bf16
  float* weight;
  float* exp_avg;     // m
  float* exp_avg_sq;  // v
  float* average;     // null: none
  void* low;          // null: none
};
void adamw_step_cpu(const AdamW& p, const AdamWTensor* tensors, int64_t count,
                    const ParallelFor& parallel_for);

// The sum of the squares of all elements.
struct Gradient {
  int64_t n;
  const void* data;
  DType dtype;  // f32 or bf16
};
double grad_squares_cpu(const Gradient* grads, int64_t count, const ParallelFor& parallel_for);

}  // namespace engine
