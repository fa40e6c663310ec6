// Multiplying rows of activations by blocks of a packed matrix, and preparing the rows.
//
// Bound: with few rows by the bytes of the weights, each read once; with many by dot products. A tile is up to
// kTileRows rows times as many vectors of 16 output features as the registers hold; the tiles of a block find it in the
// cache.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"
#include "vector.h"

namespace tokenmill::ISA {

constexpr int kTileRows = kRegisters == 32 ? 6 : 4;
constexpr int64_t kPrefetchBytes = 2048;  // ahead in the stream: 1 to 4 KB do equally well

// f(0), f(1), ... f(N - 1) with constants: gcc unrolls loops too late to keep arrays in registers.
template <int... I, class F>
INLINE void unroll(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}
#define FOR(variable) [&](auto variable) __attribute__((always_inline))

INLINE Words broadcast_word(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  return broadcast(word);
}
INLINE void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p + kPrefetchBytes, _MM_HINT_T0); }

// How many vectors of a block a tile of M rows computes at once, with `sets` accumulators for each row and vector.
template <int M>
constexpr int vectors(int sets) {
  const int room = (kRegisters == 32 ? 24 : 4) / (M * sets);
  return room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

// One accumulator for each of M rows, for one vector. Arrays of their own, since gcc 12 gives up on one of 1 KB.
template <class T, int M>
struct Column {
  T row[M];
};
template <class T, int M, int V>
struct Columns {
  Column<T, M> a, b, c, d;
  template <int v>
  INLINE T* at() {
    static_assert(v < V);
    if constexpr (v == 0) return a.row;
    else if constexpr (v == 1) return b.row;
    else if constexpr (v == 2) return c.row;
    else return d.row;
  }
};

// What follows the values of M rows in int8: a scale for each group, a sum for each 32 inputs.
template <int M>
struct Groups {
  const float* scales[M];
  const int32_t* sums[M];
  INLINE Groups(const uint8_t* const (&rows)[M], int64_t in) {
    unroll<M>(FOR(m) {
      scales[m] = (const float*)(rows[m] + values_bytes(Format::int8, in));
      sums[m] = (const int32_t*)(scales[m] + num_groups(in));
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------- int8
//
// A block: 64 scales, then for each four inputs 64 features x 4 bytes w + 128.
// For each group scale_x (sum (w + 128) x - 128 sum x); y = scale_w times their sum.

struct Int8 {
  template <int M>
  static constexpr int kVectors = vectors<M>(1);  // the totals, needed once a group, may lie in memory

  template <int M, int V>
  static INLINE void multiply(const uint8_t* block, int first, int64_t in, const uint8_t* const (&rows)[M],
                              float* out) {
    const Groups<M> groups(rows, in);
    Columns<Floats, M, V> totals;
    unroll<V>(FOR(v) { unroll<M>(FOR(m) { totals.template at<v>()[m] = broadcast(0.0f); }); });
    const uint8_t* w = block + 4 * kBlock + 64 * first;
    for (int64_t k = 0, g = 0; k < in; g++) {
      Columns<Words, M, V> sums;
      unroll<M>(FOR(m) {
        const Words bias = broadcast(-kWeightBias * (groups.sums[m][2 * g] + groups.sums[m][2 * g + 1]));
        unroll<V>(FOR(v) { sums.template at<v>()[m] = bias; });
      });
      for (const int64_t end = k + kGroup < in ? k + kGroup : in; k < end; k += 4, w += 4 * kBlock) {
        Words weights[V];
        unroll<V>(FOR(v) { weights[v] = load_words(w + 64 * v), prefetch(w + 64 * v); });
        unroll<M>(FOR(m) {
          const Words x = broadcast_word(rows[m] + k);
          unroll<V>(FOR(v) { dot4(sums.template at<v>()[m], weights[v], x); });
        });
      }
      unroll<M>(FOR(m) {
        const Floats scale = broadcast(groups.scales[m][g]);
        unroll<V>(FOR(v) {
          Floats& total = totals.template at<v>()[m];
          total = fma(scale, to_floats(sums.template at<v>()[m]), total);
        });
      });
    }
    const float* scales = (const float*)block + 16 * first;
    unroll<V>(FOR(v) {
      const Floats scale = load(scales + 16 * v);
      unroll<M>(FOR(m) { store(out + kBlock * m + 16 * v, totals.template at<v>()[m] * scale); });
    });
  }
};

// --------------------------------------------------------------------------------------------------------- int4, mxfp4
//
// A block: for each group of 32 or 64 inputs its heads, which are 64 numbers in bf16 each, then for each eight inputs 64
// features x 4 bytes, the first four inputs in the low nibbles. A nibble stands for an unsigned level q, whose middle is 0.
// y = the sum over the groups of scale_x (scale_w (sum q x - middle sum x) + zero sum x), with mxfp4 without a zero.

struct Int4 {
  static constexpr int kHeads = 2;  // scales, zeros
  static constexpr int kMiddle = 8;
  static INLINE Words levels(Words nibbles) { return nibbles; }
};

struct Mxfp4 {
  static constexpr int kHeads = 1;    // scales of a half
  static constexpr int kMiddle = 12;  // twice e2m1 is 0 1 2 3 4 6 8 12, and the same below 0
  static INLINE Words levels(Words nibbles) {
    return look_up(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0), nibbles);
  }
};

template <class Kind, int64_t kScaled>
struct Nibbles {
  template <int M>
  static constexpr int kVectors = vectors<M>(2);

  template <int M, int V>
  static INLINE void multiply(const uint8_t* block, int first, int64_t in, const uint8_t* const (&rows)[M],
                              float* out) {
    constexpr int64_t kHeadBytes = 2 * Kind::kHeads * kBlock, kGroupBytes = kHeadBytes + kScaled / 2 * kBlock;
    constexpr int64_t kHalves = kScaled / 32;  // of a group of activations, each with its sum
    const Groups<M> groups(rows, in);
    Columns<Floats, M, V> totals;
    unroll<V>(FOR(v) { unroll<M>(FOR(m) { totals.template at<v>()[m] = broadcast(0.0f); }); });
    for (int64_t g = 0; g < in / kScaled; g++, block += kGroupBytes) {
      Columns<Words, M, V> sums;
      int32_t xs[M];
      unroll<M>(FOR(m) {
        xs[m] = groups.sums[m][kHalves * g] + (kHalves == 2 ? groups.sums[m][kHalves * g + 1] : 0);
        const Words bias = broadcast(-Kind::kMiddle * xs[m]);
        unroll<V>(FOR(v) { sums.template at<v>()[m] = bias; });
      });
      unroll<kScaled / 8>(FOR(eight) {
        const uint8_t* w = block + kHeadBytes + 4 * kBlock * eight + 64 * first;
        const int64_t k = g * kScaled + 8 * eight;
        Words low[V], high[V];
        unroll<V>(FOR(v) {
          const Words bytes = load_words(w + 64 * v);
          prefetch(w + 64 * v);
          low[v] = Kind::levels(low_nibbles(bytes)), high[v] = Kind::levels(high_nibbles(bytes));
        });
        unroll<M>(FOR(m) {
          const Words x = broadcast_word(rows[m] + k);
          unroll<V>(FOR(v) { dot4_unsigned(sums.template at<v>()[m], low[v], x); });
        });
        unroll<M>(FOR(m) {
          const Words x = broadcast_word(rows[m] + k + 4);
          unroll<V>(FOR(v) { dot4_unsigned(sums.template at<v>()[m], high[v], x); });
        });
      });
      const bf16* heads = (const bf16*)block + 16 * first;
      unroll<V>(FOR(v) {
        const Floats scale = load(heads + 16 * v);
        unroll<M>(FOR(m) {
          Floats product = to_floats(sums.template at<v>()[m]);
          if constexpr (Kind::kHeads == 1) product = scale * product;
          else product = fma(scale, product, load(heads + kBlock + 16 * v) * broadcast(float(xs[m])));
          Floats& total = totals.template at<v>()[m];
          total = fma(broadcast(groups.scales[m][g * kScaled / kGroup]), product, total);
        });
      });
    }
    unroll<M>(FOR(m) { unroll<V>(FOR(v) { store(out + kBlock * m + 16 * v, totals.template at<v>()[m]); }); });
  }
};

// ----------------------------------------------------------------------------------------------------- fp32, bf16, fp8
//
// y = the sum over the inputs of w x, in fp32 and in their order, however many rows there are. A kind calls f(k, the weights
// of input k and of V vectors from the `first` on) for each input.

// A block: for each input 64 features x 4 bytes.
struct Fp32 {
  template <int V, class F>
  static INLINE void each(const uint8_t* block, int first, int64_t in, F&& f) {
    for (int64_t k = 0; k < in; k++, block += 4 * kBlock) {
      Floats weights[V];
      unroll<V>(FOR(v) {
        const uint8_t* w = block + 64 * (first + v);
        weights[v] = load((const float*)w), prefetch(w);
      });
      f(k, weights);
    }
  }
};

// A block: for each two inputs 64 features x 4 bytes, the first input in the lower half. A product of bf16 (vdpbf16ps) would
// be no faster: docs/log.md.
struct Bf16 {
  template <int V, class F>
  static INLINE void each(const uint8_t* block, int first, int64_t in, F&& f) {
    for (int64_t k = 0; k < in; k += 2, block += 4 * kBlock) {
      Floats weights[V];
      const uint8_t* w = block + 64 * first;
      unroll<V>(FOR(v) { weights[v] = lower_bf16(load_words(w + 64 * v)), prefetch(w + 64 * v); });
      f(k, weights);
      unroll<V>(FOR(v) { weights[v] = upper_bf16(load_words(w + 64 * v)); });
      f(k + 1, weights);
    }
  }
};

// A block: for each group of 128 inputs 64 scales x 256 in fp32, then for each input 64 features x 1 byte.
struct Fp8 {
  template <int V, class F>
  static INLINE void each(const uint8_t* block, int first, int64_t in, F&& f) {
    for (int64_t k = 0; k < in;) {
      Floats scales[V], weights[V];
      unroll<V>(FOR(v) { scales[v] = load((const float*)block + 16 * (first + v)); });
      block += 4 * kBlock;
      for (const int64_t end = k + kFp8Group < in ? k + kFp8Group : in; k < end; k++, block += kBlock) {
        prefetch(block);
        unroll<V>(FOR(v) { weights[v] = load_256ths((const fp8*)block + 16 * (first + v)) * scales[v]; });
        f(k, weights);
      }
    }
  }
};

template <class Kind>
struct Floating {
  template <int M>
  static constexpr int kVectors = vectors<M>(1);

  template <int M, int V>
  static INLINE void multiply(const uint8_t* block, int first, int64_t in, const uint8_t* const (&rows)[M],
                              float* out) {
    Columns<Floats, M, V> totals;
    unroll<V>(FOR(v) { unroll<M>(FOR(m) { totals.template at<v>()[m] = broadcast(0.0f); }); });
    Kind::template each<V>(block, first, in, [&](int64_t k, const Floats(&weights)[V]) __attribute__((always_inline)) {
      unroll<M>(FOR(m) {
        const Floats x = broadcast(((const float*)rows[m])[k]);
        unroll<V>(FOR(v) { totals.template at<v>()[m] = fma(weights[v], x, totals.template at<v>()[m]); });
      });
    });
    unroll<M>(FOR(m) { unroll<V>(FOR(v) { store(out + kBlock * m + 16 * v, totals.template at<v>()[m]); }); });
  }
};

// ----------------------------------------------------------------------------------------------------------- the whole

// out (M, 64) = M rows times one block, of which `columns` features are not padding.
template <class F, int M>
void tile(const uint8_t* block, int64_t in, const uint8_t* const* some_rows, float* out, int64_t columns) {
  constexpr int V = F::template kVectors<M>;
  const uint8_t* rows[M];
  unroll<M>(FOR(m) { rows[m] = some_rows[m]; });
  if (columns <= 16) return F::template multiply<M, 1>(block, 0, in, rows, out);  // a router reads a quarter
  for (int first = 0; first < 4; first += V) F::template multiply<M, V>(block, first, in, rows, out + 16 * first);
}

template <class F, int... M>
INLINE void tile(int num_rows, const uint8_t* block, int64_t in, const uint8_t* const* rows, float* out,
                 int64_t columns, std::integer_sequence<int, M...>) {
  ((num_rows == M + 1 ? tile<F, M + 1>(block, in, rows, out, columns) : void()), ...);
}

INLINE void put(const Product& product, int64_t row, int64_t column, const float* tile_row, int64_t columns) {
  float* y = product.y + (product.rows ? product.rows[row] : row) * product.stride + column;
  for (int64_t i = 0; i < columns; i += 16) {
    const Floats x = load(tile_row + i);
    const Floats old = product.weights ? load_up_to(y + i, columns - i) : x;
    store_up_to(y + i, product.weights ? fma(x, broadcast(product.weights[row]), old) : x, columns - i);
  }
}

template <class F>
void multiply_as(const Matrix& matrix, int64_t block, const Rows& rows, const int64_t* chosen, int64_t num_rows,
                 const Product& product, int64_t columns) {
  alignas(64) float out[kTileRows * kBlock];
  const int64_t num_tiles = (num_rows + kTileRows - 1) / kTileRows;
  int64_t row = 0;
  for (int64_t t = 0; t < num_tiles; t++) {
    const int size = int((num_rows - row + num_tiles - t - 1) / (num_tiles - t));  // evenly: two of 4, not 6 and 2
    const uint8_t* some_rows[kTileRows];
    for (int m = 0; m < size; m++) some_rows[m] = rows[chosen ? chosen[row + m] : row + m];
    tile<F>(size, matrix.data + block * matrix.block_bytes, matrix.in, some_rows, out,
            columns, std::make_integer_sequence<int, kTileRows>{});
    for (int m = 0; m < size; m++) put(product, row + m, block * kBlock, out + kBlock * m, columns);
    row += size;
  }
}

// With more rows than a tile has, the block is widened once for all of them.
inline void multiply_fp8(const Matrix& matrix, int64_t block, const Rows& rows, const int64_t* chosen, int64_t num_rows,
                         const Product& product, int64_t columns) {
  if (num_rows <= kTileRows) return multiply_as<Floating<Fp8>>(matrix, block, rows, chosen, num_rows, product, columns);
  thread_local std::vector<float> wide;
  wide.resize(matrix.in * kBlock);
  Fp8::each<4>(matrix.data + block * matrix.block_bytes, 0, matrix.in, [&](int64_t k, const Floats(&weights)[4]) {
    unroll<4>(FOR(v) { store(&wide[kBlock * k + 16 * v], weights[v]); });
  });
  const Matrix widened{Format::fp32, (const uint8_t*)wide.data(), matrix.num_blocks, 0, matrix.in};
  multiply_as<Floating<Fp32>>(widened, block, rows, chosen, num_rows, product, columns);
}

// The rows chosen[0 .. num_rows) (null: 0 .. num_rows) times the block, of which `columns` features are not padding.
inline void multiply(const Matrix& matrix, int64_t block, const Rows& rows, const int64_t* chosen, int64_t num_rows,
                     const Product& product, int64_t columns) {
  const auto by = [&](auto multiply) { multiply(matrix, block, rows, chosen, num_rows, product, columns); };
  switch (matrix.format) {
    case Format::fp32: return by(multiply_as<Floating<Fp32>>);
    case Format::bf16: return by(multiply_as<Floating<Bf16>>);
    case Format::fp8: return by(multiply_fp8);
    case Format::int8: return by(multiply_as<Int8>);
    case Format::int4: return by(multiply_as<Nibbles<Int4, 32>>);
    case Format::int4_by_64: return by(multiply_as<Nibbles<Int4, 64>>);
    case Format::mxfp4: return by(multiply_as<Nibbles<Mxfp4, 32>>);
  }
}

// The scale of a group is its largest magnitude / 127.
inline void quantize_row(const float* x, int64_t in, uint8_t* row) {
  float* scales = (float*)(row + values_bytes(Format::int8, in));
  int32_t* sums = (int32_t*)(scales + num_groups(in));
  Floats nothing = broadcast(0.0f);
  for (int64_t g = 0; g < num_groups(in); g++) {
    constexpr int kVectors = kGroup / 16;
    Floats some[kVectors], largest_yet = broadcast(0.0f);
    unroll<kVectors>(FOR(v) {
      const int64_t k = g * kGroup + 16 * v;
      some[v] = k < in ? load_up_to(x + k, in - k) : broadcast(0.0f);
      largest_yet = maximum(largest_yet, absolute(some[v]));
      nothing = fma(some[v], broadcast(0.0f), nothing);
    });
    const float magnitude = largest(largest_yet);
    const Floats inverse = broadcast(magnitude > 0 ? 127.0f / magnitude : 0.0f);
    Words q[kVectors];
    unroll<kVectors>(FOR(v) {
      q[v] = nearest(some[v] * inverse);
      store_int8((int8_t*)row + g * kGroup + 16 * v, q[v]);
    });
    scales[g] = magnitude / 127.0f;
    unroll<2>(FOR(half) { sums[2 * g + half] = sum(add(q[2 * half], q[2 * half + 1])); });
  }
  scales[0] += sum(nothing);  // not a number if any is not finite, and so then is the whole product
}

inline void prepare_row(Format format, const float* x, int64_t in, uint8_t* row) {
  if (is_quantized(format)) return quantize_row(x, in, row);
  std::memcpy(row, x, 4 * in);
  std::memset(row + 4 * in, 0, values_bytes(format, in) - 4 * in);
}

}  // namespace tokenmill::ISA
