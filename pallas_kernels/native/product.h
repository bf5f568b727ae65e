// What a kernel multiplies.
#pragma once

#include <cstdint>

// y[m, o] = sum over i of x[m, i] * weight[o, i]; W is the type of the weight's numbers.
template <typename W>
struct Product {
  const float* x;   // [M, I]
  const W* weight;  // [O, I]
  float* y;         // [M, O]
  int64_t num_rows, in, out;
};
