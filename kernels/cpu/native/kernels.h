// What the kernels are given, and the table of them that each instruction set fills in.
//
// A kernel works on a part of an op's work, on one thread, and knows nothing of torch; `ops.cpp` checks, allocates and
// hands the parts to threads. A row of activations comes out alike whatever the other rows are, to the bit.
#pragma once

#include <cstdint>

namespace tokenmill {

// Weights stand in blocks of 64 output features, each of them one sequential stream: see `packing.py`.
constexpr int64_t kBlock = 64;
constexpr int64_t kGroup = 64;      // inputs that share a scale as activations in int8
constexpr int64_t kFp8Group = 128;  // inputs that share a scale as weights in fp8

enum class Format : int64_t { bf16, int8, int4, fp32, int4_by_64, mxfp4, fp8 };

struct Matrix {
  Format format;
  const uint8_t* data;  // (blocks, block_bytes)
  int64_t num_blocks, block_bytes;
  int64_t in;
};

// T rows of x (T, in), prepared for a format: fp32, or int8 with a scale for each group and a sum for each half of it, which
// undo the bias of the weights. A row is a record of `bytes`: the values, padded to whole groups, scales, sums.
struct Rows {
  uint8_t* data;
  int64_t bytes;
  const uint8_t* operator[](int64_t row) const { return data + row * bytes; }
};

static inline bool is_quantized(Format format) {  // rows are int8 for it
  return format != Format::fp32 && format != Format::bf16 && format != Format::fp8;
}
static inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t num_groups(int64_t in) { return padded(in, kGroup) / kGroup; }
static inline int64_t block_bytes(Format format, int64_t in) {
  switch (format) {
    case Format::fp32: return in * 4 * kBlock;
    case Format::bf16: return padded(in, 2) * 2 * kBlock;
    case Format::int8: return (4 + padded(in, 4)) * kBlock;
    case Format::int4_by_64: return in / 64 * (4 + 32) * kBlock;
    case Format::int4: return in / 32 * (4 + 16) * kBlock;
    case Format::mxfp4: return in / 32 * (2 + 16) * kBlock;
    case Format::fp8: return (padded(in, kFp8Group) / kFp8Group * 4 + in) * kBlock;
  }
  return 0;
}
static inline int64_t values_bytes(Format format, int64_t in) {
  return is_quantized(format) ? num_groups(in) * kGroup : padded(4 * in, 64);
}
static inline int64_t row_bytes(Format format, int64_t in) {
  return padded(values_bytes(format, in) + (is_quantized(format) ? 12 * num_groups(in) : 0), 64);
}

// Where the products of a block go: y[row][column .. column + columns) = product, or += weight[i] * product.
struct Product {
  float* y;
  int64_t stride;
  const int64_t* rows;   // of y, by row of the product; null: the same
  const float* weights;  // null: store
};

// One of the two caches: (N, B, G, row), perhaps a view of a wider one. A row of int8 is `size` levels and their scale.
struct Cache {
  const void* data;
  int64_t size, slot_stride, group_stride;
};

enum class CacheType { fp32, bf16, fp8, int8 };  // of `kernels/cache.py`

struct Attention {
  const float* query;  // (T, H, D)
  int64_t token_stride, head_stride;  // of it
  float* output;                      // (T, H, Dv)
  Cache keys, values;
  CacheType type;  // of both caches
  int64_t num_heads, num_groups, block_size;
  float scale;
  int64_t window;      // positions that a row sees, its own the last
  const float* sinks;  // (H,) or null
};

constexpr int64_t kAttentionRows = 32;  // of a task, at most: their state stays in the first-level cache

// Rows first .. last of those of one sequence and one key-value head. A row is a query of one head: token by token, and
// for each token the heads that share the key-value head.
struct AttentionTask {
  const int64_t* blocks;
  int64_t token, position;  // of the sequence's first row in this step
  int64_t group;
  int64_t first, last;
};

struct Kernels {
  void (*prepare_row)(Format, const float* x, int64_t in, uint8_t* row);
  void (*swiglu_row)(const float* gate, const float* up, int64_t size, float* y);
  void (*rms_norm_row)(const float* x, const float* weight, int64_t size, float eps, float* y);
  void (*rotate_row)(const float* x, const float* cos, const float* sin, int64_t half, float* y);
  float (*greatest)(const float* x, int64_t size);  // NaN if any is
  void (*narrow_row)(const float* x, int64_t size, uint16_t* y);
  void (*multiply)(const Matrix&, int64_t block, const Rows&, const int64_t* chosen, int64_t num_rows, const Product&,
                   int64_t columns);
  void (*attend)(const Attention&, const AttentionTask&, float* scratch);
  int64_t (*attention_floats)(const Attention&);  // of scratch for one thread
};

extern const Kernels kernels_avx512, kernels_avx2;

}  // namespace tokenmill
