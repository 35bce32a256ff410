// Elements of the three dtypes, alone and in vectors, as float32.
#pragma once

#ifndef ENGINE_CUDA_ON_CPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstring>
#include <type_traits>

#include "../kernels.h"
#include "launch.h"

namespace engine {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(bf16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float to_float(f16 a) { return __half2float(a); }

template <typename T>
__device__ __forceinline__ T from_float(float a) {
  if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(a);
  if constexpr (std::is_same_v<T, f16>) return __float2half_rn(a);
  if constexpr (std::is_same_v<T, float>) return a;
}

// Calls f(T()) with the type that `dtype` names.
template <typename F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float());
  if (dtype == DType::bf16) return f(bf16());
  f(f16());
}

template <typename T>
constexpr int kVector = 16 / sizeof(T);  // elements in one 16-byte access

// Two floats as one word of 16-bit elements, the first one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// COUNT neighbouring elements in registers, always as whole words: kept as single 16-bit elements,
// they would take a register each.
template <typename T, int COUNT>
struct Slot {
  static constexpr int BYTES = sizeof(T) * COUNT;
  static constexpr int PER_WORD = BYTES < 4 ? 1 : 4 / sizeof(T);  // elements
  static constexpr int WORDS = COUNT / PER_WORD;
  uint32_t words[WORDS] = {};

  __device__ __forceinline__ float get(int j) const {
    const uint32_t word = words[j / PER_WORD];
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    const bool high = j % PER_WORD == 1;
    if constexpr (std::is_same_v<T, bf16>)
      return __uint_as_float(high ? word & 0xFFFF0000u : word << 16);
    if constexpr (std::is_same_v<T, f16>)
      return __half2float(__ushort_as_half(static_cast<unsigned short>(high ? word >> 16 : word)));
  }
  // Word i from its elements, `PER_WORD` of them.
  __device__ __forceinline__ void set(int i, const float* values) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(values[0]);
    else
      words[i] = pack<T>(values[0], PER_WORD == 2 ? values[PER_WORD - 1] : 0.0f);
  }

  // All elements, from memory aligned to min(BYTES, 16).
  __device__ __forceinline__ void load(const T* p) {
    if constexpr (BYTES == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(p);
    } else if constexpr (BYTES == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(p);
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(p)[i / 4];
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    }
  }
  // LAST: nobody reads it soon; 16 bytes and more are the first to leave the L2.
  template <bool LAST = false>
  __device__ __forceinline__ void store(T* p) const {
    if constexpr (BYTES == 2) {
      *reinterpret_cast<uint16_t*>(p) = static_cast<uint16_t>(words[0]);
    } else if constexpr (BYTES == 4) {
      *reinterpret_cast<uint32_t*>(p) = words[0];
    } else {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint4 four = {words[i], words[i + 1], words[i + 2], words[i + 3]};
        if constexpr (LAST)
          __stcs(reinterpret_cast<uint4*>(p) + i / 4, four);
        else
          reinterpret_cast<uint4*>(p)[i / 4] = four;
      }
    }
  }
  // Element j alone; an element is loaded at most once.
  __device__ __forceinline__ void load(int j, const T* p) {
    if constexpr (sizeof(T) == 4)
      words[j] = *reinterpret_cast<const uint32_t*>(p);
    else
      words[j / PER_WORD] |= uint32_t{*reinterpret_cast<const uint16_t*>(p)} << 16 * (j % PER_WORD);
  }
  __device__ __forceinline__ void store(int j, T* p) const {
    if constexpr (sizeof(T) == 4)
      *reinterpret_cast<uint32_t*>(p) = words[j];
    else
      *reinterpret_cast<uint16_t*>(p) =
          static_cast<uint16_t>(words[j / PER_WORD] >> 16 * (j % PER_WORD));
  }
};

__host__ __device__ inline bool aligned16(const void* p) {
  return (reinterpret_cast<uintptr_t>(p) & 15) == 0;
}

// Elements [first, first + COUNT) of a row of `length`; zero outside the row.
template <typename T, int COUNT>
__device__ __forceinline__ Slot<T, COUNT> load_slot(const T* row, int64_t first, int64_t length) {
  Slot<T, COUNT> slot;
  if (first >= 0 && first + COUNT <= length && aligned16(row + first)) {
    slot.load(row + first);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      if (first + j >= 0 && first + j < length) slot.load(j, row + first + j);
  }
  return slot;
}

template <typename T, int COUNT>
__device__ __forceinline__ void store_slot(const Slot<T, COUNT>& slot, T* row, int64_t first,
                                           int64_t length) {
  if (first >= 0 && first + COUNT <= length && aligned16(row + first)) {
    slot.store(row + first);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      if (first + j >= 0 && first + j < length) slot.store(j, row + first + j);
  }
}

// Makes the compiler forget what it derived from these slots. Without it, it keeps the float32
// copies of 16-bit elements from one pass over the registers to the next, and spills them.
template <typename T, int COUNT, int K>
__device__ __forceinline__ void forget(Slot<T, COUNT> (&slots)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (uint32_t& word : slots[k].words) asm volatile("" : "+r"(word));
}

// The same for a number: addresses made from it are made again rather than kept in registers.
__device__ __forceinline__ void forget(int& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  if (dtype == DType::bf16) return to_float(static_cast<const bf16*>(data)[i]);
  return to_float(static_cast<const f16*>(data)[i]);
}

// Element (n, c) of a small operand, or `absent`.
__device__ __forceinline__ float load_operand(const Operand& operand, int64_t n, int64_t c,
                                              float absent) {
  if (!operand.data) return absent;
  return load_as_float(operand.data, operand.dtype, n * operand.row_stride + c);
}

}  // namespace engine
