// Causal attention over the block cache, by tiles of positions with a running softmax (as in arXiv 2205.14135).
//
// Bound: with one token a sequence by the bytes of its keys and values, read once for all heads that share them. Tiles
// begin at position 0 whatever was computed before, so a token's result is the same in a prefill and in a decode.
#pragma once

#include <math.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "vector.h"

namespace tokenmill::ISA {

constexpr int64_t kTile = 32;  // positions: with 64 numbers of fp32 their keys are 8 KB, their values as much

// One row's state beside its output: the largest score yet, and the sum of e^(score - largest).
struct Running {
  float largest, sum;
};

// Scratch of one task: for each row its query and its output, padded to whole registers.
inline int64_t attention_floats(const Attention& a) {
  return kAttentionRows * (padded(a.keys.size, 16) + padded(a.values.size, 16));
}

INLINE void fetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
}

// Where the keys and values of a tile's positions stand; they are on their way to the cache.
template <class T>
struct Places {
  const T *keys[kTile], *values[kTile];
  int64_t size;
};

template <class T>
INLINE void find(const Attention& a, const AttentionTask& task, int64_t start, int64_t end, Places<T>& places) {
  const int64_t size = end - start < kTile ? end - start : kTile;
  places.size = size;
  for (int64_t i = 0; i < kTile; i++) {
    const int64_t position = start + (i < size ? i : size - 1);  // the last one again, for whole registers
    const int64_t slot = task.blocks[position / a.block_size] * a.block_size + position % a.block_size;
    places.keys[i] = (const T*)a.keys.data + slot * a.keys.slot_stride + task.group * a.keys.group_stride;
    places.values[i] = (const T*)a.values.data + slot * a.values.slot_stride + task.group * a.values.group_stride;
    fetch(places.keys[i], a.keys.size * sizeof(T));
    fetch(places.values[i], a.values.size * sizeof(T));
  }
}

// By what a row's numbers are to be multiplied: rows of int8 have a scale behind them.
template <class T>
INLINE float scale_of(const T*, int64_t) {
  return 1.0f;
}
template <>
INLINE float scale_of(const int8_t* row, int64_t size) {
  float scale;
  std::memcpy(&scale, row + size, sizeof scale);
  return scale;
}
template <class T>
constexpr bool kHasScale = std::is_same_v<T, int8_t>;

INLINE int lanes(int64_t n) { return n < 0 ? 0 : n > 16 ? 16 : int(n); }

// x in the lanes first .. last of those that begin at `begin`, `others` in all other ones.
INLINE Floats between(Floats x, int64_t first, int64_t last, int64_t begin, Floats others) {
  return first_of(others, lanes(first - begin), first_of(x, lanes(last - begin), others));
}

// scores[i] = query . key of place i, for first <= i < last; minus infinity elsewhere.
template <class T>
INLINE void score(const Places<T>& places, int64_t first, int64_t last, const float* query, int64_t size,
                  float* scores) {
  for (int64_t begin = 0; begin < kTile; begin += 16) {
    Floats products[16];
    for (int i = 0; i < 16; i++) {
      const T* key = places.keys[begin + i];
      products[i] = broadcast(0.0f);
      int64_t d = 0;
      for (; d + 16 <= size; d += 16) products[i] = fma(load(query + d), load(key + d), products[i]);
      if (d < size) products[i] = fma(load(query + d), load_first(key + d, int(size - d)), products[i]);
    }
    Floats some = sums(products);
    if constexpr (kHasScale<T>) {
      float scales[16];
      for (int i = 0; i < 16; i++) scales[i] = scale_of(places.keys[begin + i], size);
      some = some * load(scales);
    }
    store(scores + begin, between(some, first, last, begin, broadcast(-INFINITY)));
  }
}

// output = output * fade + sum of masses[i] * value of place i, for V registers from d on, or for a part of one.
template <int V, bool is_whole, class T>
INLINE void add_some(const Places<T>& places, int64_t first, int64_t last, const float* masses, float fade, int64_t d,
                     int rest, float* output) {
  Floats totals[V];
  for (int v = 0; v < V; v++) totals[v] = load(output + d + 16 * v) * broadcast(fade);
  for (int64_t i = first; i < last; i++) {
    const Floats mass = broadcast(masses[i]);
    for (int v = 0; v < V; v++) {
      const T* value = places.values[i] + d + 16 * v;
      totals[v] = fma(mass, is_whole ? load(value) : load_first(value, rest), totals[v]);
    }
  }
  for (int v = 0; v < V; v++) store(output + d + 16 * v, totals[v]);
}

template <class T>
INLINE void add_values(const Places<T>& places, int64_t first, int64_t last, const float* masses, float fade,
                       int64_t size, float* output) {
  int64_t d = 0;
  for (; d + 64 <= size; d += 64) add_some<4, true>(places, first, last, masses, fade, d, 16, output);
  for (; d + 16 <= size; d += 16) add_some<1, true>(places, first, last, masses, fade, d, 16, output);
  if (d < size) add_some<1, false>(places, first, last, masses, fade, d, int(size - d), output);
}

// The row has seen the places first .. last more.
template <class T>
INLINE void see(const Attention& a, const Places<T>& places, int64_t first, int64_t last, const float* query,
                Running& running, float* output) {
  alignas(64) float scores[kTile];
  score(places, first, last, query, a.keys.size, scores);
  Floats greatest = broadcast(running.largest);
  for (int64_t i = 0; i < kTile; i += 16) greatest = maximum(greatest, load(scores + i));
  const float largest_now = largest(greatest);
  Floats total = broadcast(0.0f);
  for (int64_t i = 0; i < kTile; i += 16) {
    const Floats mass = exponential(load(scores + i) - broadcast(largest_now));  // e^-87 at least, so cut off:
    const Floats some = between(mass, first, last, i, broadcast(0.0f));
    total = total + some;
    store(scores + i, some);
  }
  if constexpr (kHasScale<T>) {
    for (int64_t i = first; i < last; i++) scores[i] *= scale_of(places.values[i], a.values.size);
  }
  const float fade = expf(running.largest - largest_now);  // 0 at first
  running = {largest_now, running.sum * fade + sum(total)};
  add_values(places, first, last, scores, fade, a.values.size, output);
}

template <class T>
void attend_as(const Attention& a, const AttentionTask& task, float* scratch) {
  const int64_t heads = a.num_heads / a.num_groups, num_rows = task.last - task.first;
  const int64_t key_size = padded(a.keys.size, 16), value_size = padded(a.values.size, 16);
  float *queries = scratch, *outputs = scratch + kAttentionRows * key_size;
  Running running[kAttentionRows];
  const auto token = [&](int64_t row) { return (task.first + row) / heads; };  // of the sequence's, in this step
  const auto head = [&](int64_t row) { return task.group * heads + (task.first + row) % heads; };
  for (int64_t row = 0; row < num_rows; row++) {
    running[row] = a.sinks ? Running{a.sinks[head(row)], 1.0f} : Running{-INFINITY, 0.0f};
    const float* query = a.query + (task.token + token(row)) * a.token_stride + head(row) * a.head_stride;
    for (int64_t d = 0; d < key_size; d += 16) {
      store(queries + row * key_size + d, load_up_to(query + d, a.keys.size - d) * broadcast(a.scale));
    }
    for (int64_t d = 0; d < value_size; d += 16) store(outputs + row * value_size + d, broadcast(0.0f));
  }
  const int64_t begin = task.position + token(0) + 1 - a.window;  // of what the first row sees, and below it the tile's
  const int64_t end = task.position + token(num_rows - 1) + 1;    // of what the last row sees
  Places<T> places, next;
  int64_t start = begin > 0 ? begin / kTile * kTile : 0;
  find(a, task, start, end, next);
  for (; start < end; start += kTile) {
    places = next;
    if (start + kTile < end) find(a, task, start + kTile, end, next);
    for (int64_t row = 0; row < num_rows; row++) {
      const int64_t last = task.position + token(row) + 1 - start, first = last > a.window ? last - a.window : 0;
      if (last <= 0 || first >= places.size) continue;
      see(a, places, first, last < places.size ? last : places.size, queries + row * key_size, running[row],
          outputs + row * value_size);
    }
  }
  for (int64_t row = 0; row < num_rows; row++) {
    const Floats inverse = broadcast(1.0f / running[row].sum);
    float* output = a.output + ((task.token + token(row)) * a.num_heads + head(row)) * a.values.size;
    for (int64_t d = 0; d < a.values.size; d += 16) {
      store_up_to(output + d, load(outputs + row * value_size + d) * inverse, a.values.size - d);
    }
  }
}

inline void attend(const Attention& a, const AttentionTask& task, float* scratch) {
  switch (a.type) {
    case CacheType::fp32: return attend_as<float>(a, task, scratch);
    case CacheType::bf16: return attend_as<bf16>(a, task, scratch);
    case CacheType::fp8: return attend_as<fp8>(a, task, scratch);
    case CacheType::int8: return attend_as<int8_t>(a, task, scratch);
  }
}

}  // namespace tokenmill::ISA
