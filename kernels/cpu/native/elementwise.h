// What stands between the products: norm, rotation, gate, and the choice of the likeliest. A row at a time, bound by
// the bytes of the row.
#pragma once

#include <math.h>

#include "vector.h"

namespace tokenmill::ISA {

// The largest of x, or NaN if there is one, which a maximum alone would lose.
inline float greatest(const float* x, int64_t size) {
  Floats best = broadcast(-INFINITY);
  bool is_number = true;
  for (int64_t i = 0; i < size; i += 16) {
    const Floats some = size - i >= 16 ? load(x + i) : first_of(load_first(x + i, int(size - i)), int(size - i), best);
    best = maximum(best, some);
    is_number &= !any_nan(some);
  }
  return is_number ? largest(best) : NAN;
}

// y = x / sqrt(mean x^2 + eps) * weight
inline void rms_norm_row(const float* x, const float* weight, int64_t size, float eps, float* y) {
  Floats squares = broadcast(0.0f);
  for (int64_t i = 0; i < size; i += 16) {
    const Floats some = load_up_to(x + i, size - i);
    squares = fma(some, some, squares);
  }
  const Floats scale = broadcast(1.0f / sqrtf(sum(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += 16) {
    const Floats some = load_up_to(x + i, size - i) * scale * load_up_to(weight + i, size - i);
    store_up_to(y + i, some, size - i);
  }
}

// The pairs (x[i], x[i + half]) turned by their angles.
inline void rotate_row(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
  for (int64_t i = 0; i < half; i += 16) {
    const int64_t n = half - i;
    const Floats a = load_up_to(x + i, n), b = load_up_to(x + half + i, n);
    const Floats c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
    store_up_to(y + i, a * c - b * s, n);
    store_up_to(y + half + i, fma(b, c, a * s), n);
  }
}

// y = gate / (1 + e^-gate) * up
inline void swiglu_row(const float* gate, const float* up, int64_t size, float* y) {
  for (int64_t i = 0; i < size; i += 16) {
    const Floats g = load_up_to(gate + i, size - i);
    const Floats silu = g / (broadcast(1.0f) + exponential(broadcast(0.0f) - g));
    store_up_to(y + i, silu * load_up_to(up + i, size - i), size - i);
  }
}

inline void narrow_row(const float* x, int64_t size, bf16* y) {
  for (int64_t i = 0; i < size; i++) y[i] = narrow(x[i]);
}

}  // namespace tokenmill::ISA
