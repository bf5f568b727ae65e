// Noise that depends on a key and a place alone, in the same bits as JAX's: what ../noise.py documents.
#pragma once

#include <cmath>

#include "vectors.h"

constexpr float kMostNoise = 16;  // there is less: uniform numbers have 23 bits

inline BitVec rotate(BitVec x, int by) { return (x << by) | (x >> (32 - by)); }

// Counters become bits: Threefry-2x32 of 20 rounds (Salmon et al. 2011). A round waits for the one before it, so several
// vectors go side by side.
template <int N>
inline void threefry(uint32_t seed, uint32_t position, BitVec (&counters)[N]) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {seed, position, seed ^ position ^ 0x1BD11BDAu};
  BitVec high[N], (&low)[N] = counters;
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) high[n] = BitVec{} + keys[0], low[n] += keys[1];
#pragma GCC unroll 5
  for (int i = 0; i < 5; i++) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        high[n] += low[n];
        low[n] = rotate(low[n], kRotations[i % 2][j]) ^ high[n];
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) high[n] += keys[(i + 1) % 3], low[n] += keys[(i + 2) % 3] + (i + 1);
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) low[n] ^= high[n];
}

// Of normal numbers above 0, to a relative error of about 1e-7 next to 1, too: x = 2^e * (1 + f) with 1 + f between the
// roots of 1/2 and of 2, and a polynomial of f (Cephes, logf.c).
inline Vec log_of_positive(Vec x) {
  const IntVec exponent = ((IntVec)x - 0x3f3504f3) >> 23;
  const Vec f = (Vec)((IntVec)x - (exponent << 23)) - 1.0f, e = __builtin_convertvector(exponent, Vec);
  const Vec square = f * f;
  Vec y = broadcast(7.0376836292e-2f);
  y = y * f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * square - e * 2.12194440e-4f - 0.5f * square;
  return (f + y) + e * 0.693359375f;
}

// What JAX makes of bits.
inline Vec gumbel(BitVec bits) {
  const Vec drawn = (Vec)((bits >> 9) | 0x3f800000u) - 1.0f;
  const Vec uniform = drawn == 0.0f ? broadcast(std::numeric_limits<float>::min()) : drawn;
  return -log_of_positive(-log_of_positive(uniform));
}

// Bits that are lower make less noise than this.
inline uint32_t bits_of(float noise) {
  const double uniform = std::exp(-std::exp(0.01 - noise));  // 0.01: far more than `gumbel` is off by
  return static_cast<uint32_t>(uniform * (1 << 23)) << 9;
}
