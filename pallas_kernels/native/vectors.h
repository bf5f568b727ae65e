// Vectors as wide as the processor that this is compiled for has them, and the numbers that memory holds.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfBits __attribute__((vector_size(2 * kLanes)));
typedef uint8_t ByteBits __attribute__((vector_size(kLanes)));
typedef int8_t ByteInts __attribute__((vector_size(kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Float8 {  // e4m3fn: no infinity
  uint8_t bits;
};

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* from) {
  Vec out;
  memcpy(&out, from, sizeof out);
  return out;
}
inline BitVec load(const uint32_t* from) {
  BitVec out;
  memcpy(&out, from, sizeof out);
  return out;
}
inline Vec load(const int8_t* from) {
  ByteInts numbers;
  memcpy(&numbers, from, sizeof numbers);
  return __builtin_convertvector(numbers, Vec);
}
// GCC takes four instructions for what is one.
inline BitVec widen(HalfBits bits) {
#if defined(__AVX512F__)
  return (BitVec)_mm512_cvtepu16_epi32((__m256i)bits);
#else
  return __builtin_convertvector(bits, BitVec);
#endif
}
inline Vec load(const BFloat16* from) {
  HalfBits bits;
  memcpy(&bits, from, sizeof bits);
  return (Vec)(widen(bits) << 16);
}
// What is denormal there is made from a whole number: threads may take denormal operands for zero.
inline Vec load(const Float16* from) {
  HalfBits bits;
  memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#else
  const BitVec wide = widen(bits), magnitude = wide & 0x7fffu;
  const BitVec denormal = (BitVec)(__builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-24f);
  const BitVec normal = (magnitude << 13) + (112u << 23), other = (magnitude << 13) | 0x7f800000u;
  const BitVec number = magnitude < 0x400u ? denormal : magnitude < 0x7c00u ? normal : other;
  return (Vec)(number | (wide & 0x8000u) << 16);
#endif
}
inline Vec load(const Float8* from) {
  ByteBits bits;
  memcpy(&bits, from, sizeof bits);
  const BitVec wide = __builtin_convertvector(bits, BitVec), magnitude = wide & 0x7fu;
  const BitVec denormal = (BitVec)(__builtin_convertvector((IntVec)magnitude, Vec) * 0x1p-9f);
  const BitVec normal = (magnitude << 20) + (120u << 23), nan = BitVec{} + 0x7fc00000u;
  const BitVec number = magnitude < 8u ? denormal : magnitude < 0x7fu ? normal : nan;
  return (Vec)(number | (wide & 0x80u) << 24);
}
inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

// The first n numbers, then zeros.
template <typename T>
Vec load_first(const T* from, int64_t n) {
  T numbers[kLanes] = {};
  memcpy(numbers, from, n * sizeof(T));
  return load(numbers);
}

inline void store_first(float* to, Vec x, int64_t n) { memcpy(to, &x, n * sizeof *to); }

// Every second number of a, then of b, from the first on and from the second on.
inline Vec evens(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6);
#endif
}
inline Vec odds(Vec a, Vec b) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX__)
  return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Sums of neighbours: those of a, then those of b.
inline Vec add_pairs(Vec a, Vec b) { return evens(a, b) + odds(a, b); }

// The sum of each of as many vectors as have lanes. They are overwritten.
inline Vec sum_each(Vec* vectors) {
#pragma GCC unroll 16
  for (int n = kLanes / 2; n; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) vectors[i] = add_pairs(vectors[2 * i], vectors[2 * i + 1]);
  }
  return vectors[0];
}

inline float sum(Vec x) {
#pragma GCC unroll 4
  for (int n = kLanes; n > 1; n /= 2) x = add_pairs(x, x);
  return x[0];
}

// None is NaN.
inline float largest(Vec x) {
#pragma GCC unroll 4
  for (int n = kLanes; n > 1; n /= 2) {
    const Vec a = evens(x, x), b = odds(x, x);
    x = a > b ? a : b;
  }
  return x[0];
}

inline bool any(IntVec mask) {
  int32_t found = 0;
  for (int i = 0; i < kLanes; i++) found |= mask[i];
  return found;
}

// n, n + 1, ...
inline BitVec count_from(uint32_t n) {
  constexpr uint32_t kFirst[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kFirst) + n;
}

// e^x of x <= 0, to a relative error of about 1e-7, and 0 below -87: 2^n * e^r with |r| <= ln(2) / 2, where e^r is a
// polynomial (Cephes, expf.c). NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec e = broadcast(1.9875691500e-4f);
  e = e * r + 1.3981999507e-3f;
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * r * r + r + 1.0f;
  const Vec power = (Vec)(((IntVec)shifted + 127) << 23);  // 2^n: the lowest bits of `shifted` are n
  return x < -87.0f ? Vec{} : e * power;
}

// The hyperbolic tangent, to about 1e-7: a polynomial near 0 (Cephes, tanhf.c), from e^-2|x| elsewhere.
inline Vec tanh_of(Vec x) {
  const Vec size = x < 0 ? -x : x, square = x * x, e = exp_of_negative(-2 * size), far = (1 - e) / (1 + e);
  Vec near = broadcast(-5.70498872745e-3f);
  near = near * square + 2.06390887954e-2f;
  near = near * square - 5.37397155531e-2f;
  near = near * square + 1.33314422036e-1f;
  near = near * square - 3.33332819422e-1f;
  near = near * square * x + x;
  return size < 0.625f ? near : x < 0 ? -far : far;
}
