// The ops as torch sees them: checks, memory, and the division of the work.
//
// Owns the choice of instruction set, once, by what the processor has. Works in fp32; other activations are widened on
// the way in and rounded once on the way out. `kernels/reference.py` says what each op means.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace tokenmill {
namespace {

using at::Tensor;

struct InstructionSet {
  const char* name;
  const Kernels* kernels;
};

// The sets that this processor has, the best first.
std::vector<InstructionSet> find_instruction_sets() {
  std::vector<InstructionSet> found;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back({"avx512", &kernels_avx512});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &kernels_avx2});
  return found;
}

const std::vector<InstructionSet> instruction_sets = find_instruction_sets();
const Kernels* chosen_kernels = instruction_sets.empty() ? nullptr : instruction_sets.front().kernels;

const Kernels& kernels() { return *chosen_kernels; }

// Rows so cheap that fewer than eight are not worth a second thread, which takes a microsecond to join.
constexpr int64_t kCheapRows = 8;

int num_threads = 0;  // 0: as many as torch uses

// f(begin, end) for all of [0, size), on several threads.
template <class F>
void parallel_for(int64_t size, int64_t grain, const F& f) {
  run_parallel(
      size, grain, num_threads ? num_threads : at::get_num_threads(),
      [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); }, &f);
}

Tensor floats(const Tensor& x) { return x.to(at::kFloat).contiguous(); }

// Heads (T, heads, size) fp32, each contiguous, as they lie in what they are a part of.
struct Heads {
  Tensor memory;
  const float* data;
  int64_t token_stride, head_stride;
  explicit Heads(const Tensor& x)
      : memory(x.scalar_type() == at::kFloat && x.stride(2) == 1 ? x : floats(x)),
        data(memory.const_data_ptr<float>()),
        token_stride(memory.stride(0)),
        head_stride(memory.stride(1)) {}
  const float* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// -------------------------------------------------------------------------------------------------------------- linear

Matrix matrix(const Tensor& packed, int64_t format, int64_t in, int64_t out) {
  const int64_t num_blocks = packed.size(-2);
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous(), "a packed matrix is contiguous bytes");
  TORCH_CHECK(packed.size(-1) == block_bytes(Format(format), in), "the matrix is packed for other inputs than ", in);
  TORCH_CHECK(num_blocks * kBlock >= out && (num_blocks - 1) * kBlock < out, "the matrix is packed for other outputs");
  return {Format(format), packed.const_data_ptr<uint8_t>(), num_blocks, packed.size(-1), in};
}

// Memory of some prepared rows; they go with it.
struct PreparedRows {
  Tensor memory;
  Rows rows;
  PreparedRows(Format format, int64_t num_rows, int64_t in)
      : memory(at::empty({num_rows * row_bytes(format, in)}, at::kByte)),
        rows{memory.mutable_data_ptr<uint8_t>(), row_bytes(format, in)} {}
};

PreparedRows prepare(Format format, const float* x, int64_t num_rows, int64_t in) {
  PreparedRows prepared(format, num_rows, in);
  parallel_for(num_rows, kCheapRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      kernels().prepare_row(format, x + t * in, in, prepared.rows.data + t * prepared.rows.bytes);
    }
  });
  return prepared;
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t format, int64_t out) {
  const Tensor x32 = floats(x);
  const int64_t num_rows = x32.size(0), in = x32.size(1);
  const Matrix weight = matrix(packed, format, in, out);
  Tensor y = at::empty({num_rows, out}, at::kFloat);
  if (num_rows == 0) return y.to(x.scalar_type());
  const PreparedRows prepared = prepare(weight.format, x32.const_data_ptr<float>(), num_rows, in);
  const Product product{y.mutable_data_ptr<float>(), out, nullptr, nullptr};
  parallel_for(weight.num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      kernels().multiply(weight, block, prepared.rows, nullptr, num_rows, product,
                         std::min(kBlock, out - block * kBlock));
    }
  });
  return y.to(x.scalar_type());
}

// ------------------------------------------------------------------------------------------------------------- experts

// The pairs of a token and one of its experts, by expert and then by token. Expert E is none of ours and has none.
struct Pairs {
  std::vector<int64_t> starts, tokens, active;  // (E + 1), one of each pair, the experts that have any
  std::vector<float> weights;                   // one of each pair
  Pairs(const Tensor& chosen, const Tensor& chosen_weights, int64_t num_experts) : starts(num_experts + 1) {
    const int64_t* expert = chosen.const_data_ptr<int64_t>();
    const float* weight = chosen_weights.const_data_ptr<float>();
    const int64_t num_pairs = chosen.numel();
    for (int64_t i = 0; i < num_pairs; i++) {
      TORCH_CHECK_INDEX(expert[i] >= 0 && expert[i] <= num_experts, "there is no expert ", expert[i]);
      if (expert[i] < num_experts) starts[expert[i] + 1]++;
    }
    for (int64_t e = 0; e < num_experts; e++) {
      if (starts[e + 1]) active.push_back(e);
      starts[e + 1] += starts[e];
    }
    tokens.resize(starts[num_experts]);
    weights.resize(starts[num_experts]);
    std::vector<int64_t> next(starts);
    for (int64_t i = 0; i < num_pairs; i++) {
      if (expert[i] == num_experts) continue;
      const int64_t place = next[expert[i]]++;
      tokens[place] = i / chosen.size(1);
      weights[place] = weight[i];
    }
  }
  int64_t size(int64_t expert) const { return starts[expert + 1] - starts[expert]; }
};

Matrix one_of(Matrix all, int64_t expert) {
  all.data += expert * all.num_blocks * all.block_bytes;
  return all;
}

// The gated hidden values of all pairs, prepared for the second product.
PreparedRows hidden(const Pairs& pairs, const Rows& inputs, const Matrix& gate_up, int64_t size) {
  const int64_t num_pairs = pairs.tokens.size(), num_active = pairs.active.size();
  const Tensor gates_and_ups = at::empty({num_pairs, 2 * size}, at::kFloat);
  float* y = gates_and_ups.mutable_data_ptr<float>();
  // Block by block, so that every thread has a share of each expert, however the tokens are spread.
  parallel_for(gate_up.num_blocks * num_active, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i / num_active, expert = pairs.active[i % num_active], first = pairs.starts[expert];
      const Product product{y + first * 2 * size, 2 * size, nullptr, nullptr};
      kernels().multiply(one_of(gate_up, expert), block, inputs, &pairs.tokens[first], pairs.size(expert), product,
                         std::min(kBlock, 2 * size - block * kBlock));
    }
  });
  PreparedRows prepared(gate_up.format, num_pairs, size);
  parallel_for(num_pairs, kCheapRows, [&](int64_t begin, int64_t end) {
    std::vector<float> gated(size);
    for (int64_t i = begin; i < end; i++) {
      kernels().swiglu_row(y + i * 2 * size, y + i * 2 * size + size, size, gated.data());
      kernels().prepare_row(gate_up.format, gated.data(), size, prepared.rows.data + i * prepared.rows.bytes);
    }
  });
  return prepared;
}

Tensor experts(const Tensor& x, const Tensor& chosen_weights, const Tensor& chosen, const Tensor& packed_gate_up,
               const Tensor& packed_down, int64_t format, int64_t size) {
  const Tensor x32 = floats(x);
  const int64_t num_tokens = x32.size(0), out = x32.size(1);
  const Matrix gate_up = matrix(packed_gate_up, format, out, 2 * size), down = matrix(packed_down, format, size, out);
  const Tensor y = at::zeros({num_tokens, out}, at::kFloat);
  const Pairs pairs(chosen.contiguous(), floats(chosen_weights), packed_down.size(0));
  if (pairs.active.empty()) return y.to(x.scalar_type());
  const PreparedRows inputs = prepare(gate_up.format, x32.const_data_ptr<float>(), num_tokens, out);
  const PreparedRows rows = hidden(pairs, inputs.rows, gate_up, size);
  float* total = y.mutable_data_ptr<float>();
  // A thread owns columns of y and walks the experts in order: no two add to one number, and always in the same order.
  parallel_for(down.num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      for (const int64_t expert : pairs.active) {
        const int64_t first = pairs.starts[expert];
        const Rows some{rows.rows.data + first * rows.rows.bytes, rows.rows.bytes};
        const Product product{total, out, &pairs.tokens[first], &pairs.weights[first]};
        kernels().multiply(one_of(down, expert), block, some, nullptr, pairs.size(expert), product,
                           std::min(kBlock, out - block * kBlock));
      }
    }
  });
  return y.to(x.scalar_type());
}

// The largest `num_chosen` logits of a row, the earlier one on ties.
void choose(const float* logits, int64_t num_experts, int64_t num_chosen, int64_t* chosen) {
  int64_t num = 0;
  for (int64_t e = 0; e < num_experts; e++) {
    int64_t place = num;
    while (place > 0 && logits[e] > logits[chosen[place - 1]]) place--;
    if (place == num_chosen) continue;
    num = std::min(num + 1, num_chosen);
    for (int64_t i = num - 1; i > place; i--) chosen[i] = chosen[i - 1];
    chosen[place] = e;
  }
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t num_chosen, std::string score, bool renormalise,
                                 double scale) {
  TORCH_CHECK_VALUE(score == "softmax" || score == "sigmoid" || score == "unit", "router score '", score,
                    "' is not one of \"softmax\", \"sigmoid\", \"unit\"");
  const Tensor logits32 = floats(logits);
  const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
  Tensor weights = at::empty({num_tokens, num_chosen}, at::kFloat);
  Tensor chosen = at::empty({num_tokens, num_chosen}, at::kLong);
  float* weight = weights.mutable_data_ptr<float>();
  int64_t* expert = chosen.mutable_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_tokens; t++, weight += num_chosen, expert += num_chosen) {
    const float* row = logits32.const_data_ptr<float>() + t * num_experts;
    choose(row, num_experts, num_chosen, expert);
    float all = 0.0f, kept = 0.0f;
    if (score == "softmax") {
      for (int64_t e = 0; e < num_experts; e++) all += std::exp(row[e] - row[expert[0]]);
    }
    for (int64_t k = 0; k < num_chosen; k++) {
      const float x = row[expert[k]];
      weight[k] = score == "softmax"   ? std::exp(x - row[expert[0]]) / all
                  : score == "sigmoid" ? 1 / (1 + std::exp(-x))
                                       : 1;
      kept += weight[k];
    }
    for (int64_t k = 0; k < num_chosen; k++) weight[k] = float(scale) * (renormalise ? weight[k] / kept : weight[k]);
  }
  return {weights, chosen};
}

// ----------------------------------------------------------------------------------------------------------- attention

CacheType type_of(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case at::kFloat: return CacheType::fp32;
    case at::kBFloat16: return CacheType::bf16;
    case at::kFloat8_e4m3fn: return CacheType::fp8;
    case at::kChar: return CacheType::int8;
    default: TORCH_CHECK(false, "a cache cannot be of ", cache.scalar_type());
  }
}

// A cache (N, B, G, row) of which blocks follow on blocks, whatever lies between two slots.
Cache cache_of(const Tensor& cache) {
  TORCH_CHECK(cache.stride(3) == 1 && cache.stride(0) == cache.size(1) * cache.stride(1), "the cache has gaps");
  const int64_t scale_bytes = type_of(cache) == CacheType::int8 ? sizeof(float) : 0;
  return {cache.const_data_ptr(), cache.size(3) - scale_bytes, cache.stride(1), cache.stride(2)};
}

// To the nearest number of e4m3, ties to even, 448 at most; what is not finite becomes NaN.
uint8_t to_fp8(float x) {
  if (!std::isfinite(x)) return 0x7f;
  const float magnitude = std::min(std::abs(x), 448.0f);
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (magnitude < 0x1p-6f) return sign | uint8_t(std::nearbyint(magnitude * 512));  // even steps of 2^-9
  uint32_t bits;
  std::memcpy(&bits, &magnitude, 4);
  bits += 0x7ffff + (bits >> 20 & 1);
  return sign | uint8_t((bits >> 20) - ((127 - 7) << 3));
}

void to_int8(const float* x, int64_t size, int8_t* row) {
  float largest = 0.0f;
  bool is_finite = true;
  for (int64_t i = 0; i < size; i++) {
    is_finite &= std::isfinite(x[i]);
    largest = std::max(largest, std::abs(x[i]));
  }
  const float scale = is_finite ? largest / 127 : NAN;
  for (int64_t i = 0; i < size; i++) row[i] = scale > 0 ? int8_t(std::nearbyint(x[i] / scale)) : 0;
  std::memcpy(row + size, &scale, sizeof scale);
}

void write_row(const float* x, int64_t size, CacheType type, void* cache, int64_t place) {
  switch (type) {
    case CacheType::fp32: std::copy_n(x, size, (float*)cache + place); break;
    case CacheType::bf16: kernels().narrow_row(x, size, (uint16_t*)cache + place); break;
    case CacheType::fp8: std::transform(x, x + size, (uint8_t*)cache + place, to_fp8); break;
    case CacheType::int8: to_int8(x, size, (int8_t*)cache + place); break;
  }
}

void write_cache(const Tensor& x, const Tensor& cache, const Tensor& slots) {
  const Heads from(x);
  const Cache to = cache_of(cache);
  const CacheType type = type_of(cache);
  TORCH_CHECK(x.size(1) == cache.size(2) && x.size(2) == to.size, "keys or values do not fit into the cache");
  const int64_t num_groups = x.size(1), num_slots = cache.size(0) * cache.size(1);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.size(0) * num_groups; i++) {
    const int64_t token = i / num_groups;
    TORCH_CHECK_INDEX(slot[token] >= 0 && slot[token] < num_slots, "there is no slot ", slot[token]);
    const int64_t place = slot[token] * to.slot_stride + i % num_groups * to.group_stride;
    write_row(from.at(token, i % num_groups), to.size, type, (void*)to.data, place);
  }
}

void write_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache, const Tensor& value_cache,
              const Tensor& slots) {
  write_cache(key, key_cache, slots);
  write_cache(value, value_cache, slots);
}

// By sequence, then by key-value head, then by rows: neighbours read the same keys.
std::vector<AttentionTask> attention_tasks(const Attention& a, const Tensor& tables, at::IntArrayRef starts,
                                           at::IntArrayRef lengths) {
  std::vector<AttentionTask> tasks;
  for (size_t s = 0; s < lengths.size(); s++) {
    const int64_t num_queries = starts[s + 1] - starts[s], num_rows = num_queries * (a.num_heads / a.num_groups);
    TORCH_CHECK(lengths[s] <= tables.size(1) * a.block_size, "sequence ", s, " is longer than its block table");
    for (int64_t group = 0; group < a.num_groups; group++) {
      for (int64_t first = 0; first < num_rows; first += kAttentionRows) {
        tasks.push_back({tables.const_data_ptr<int64_t>() + s * tables.size(1), starts[s], lengths[s] - num_queries,
                         group, first, std::min(first + kAttentionRows, num_rows)});
      }
    }
  }
  return tasks;
}

Tensor attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                 at::IntArrayRef query_starts, at::IntArrayRef context_lens, double scale,
                 std::optional<int64_t> window, const std::optional<Tensor>& sinks) {
  const Heads queries(query);
  const Tensor tables = block_tables.contiguous(), sinks32 = sinks ? floats(*sinks) : Tensor();
  const Cache keys = cache_of(key_cache), values = cache_of(value_cache);
  Tensor y = at::empty({query.size(0), query.size(1), values.size}, at::kFloat);
  TORCH_CHECK(key_cache.scalar_type() == value_cache.scalar_type(), "the caches are of two types");
  TORCH_CHECK(query.size(2) == keys.size && query.size(1) % key_cache.size(2) == 0, "the query does not fit the cache");
  const Attention a{
      queries.data,
      queries.token_stride,
      queries.head_stride,
      y.mutable_data_ptr<float>(),
      keys,
      values,
      type_of(key_cache),
      query.size(1),
      key_cache.size(2),
      key_cache.size(1),
      float(scale),
      window.value_or(INT64_MAX / 2),
      sinks ? sinks32.const_data_ptr<float>() : nullptr,
  };
  const std::vector<AttentionTask> tasks = attention_tasks(a, tables, query_starts, context_lens);
  parallel_for(tasks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(kernels().attention_floats(a));
    for (int64_t i = begin; i < end; i++) kernels().attend(a, tasks[i], scratch.data());
  });
  return y.to(query.scalar_type());
}

Tensor rotary(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const Heads from(x);
  const Tensor cos32 = floats(cos), sin32 = floats(sin);
  const int64_t num_heads = x.size(1), size = x.size(2);
  Tensor y = at::empty(x.sizes(), at::kFloat);
  parallel_for(x.size(0), kCheapRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * num_heads; i < end * num_heads; i++) {
      const int64_t angles = i / num_heads * (size / 2);
      kernels().rotate_row(from.at(i / num_heads, i % num_heads), cos32.const_data_ptr<float>() + angles,
                           sin32.const_data_ptr<float>() + angles, size / 2, y.mutable_data_ptr<float>() + i * size);
    }
  });
  return y.to(x.scalar_type());
}

// --------------------------------------------------------------------------------------------------- norms, activation

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Tensor x32 = floats(x), weight32 = floats(weight);
  const int64_t size = x.size(-1);
  Tensor y = at::empty_like(x32);
  parallel_for(x.numel() / size, kCheapRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      kernels().rms_norm_row(x32.const_data_ptr<float>() + t * size, weight32.const_data_ptr<float>(), size, float(eps),
                             y.mutable_data_ptr<float>() + t * size);
    }
  });
  return y.to(x.scalar_type());
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  if (x.scalar_type() != at::kFloat) {  // the sum is rounded before its norm is taken
    const Tensor total = x + residual;
    return {rms_norm(total, weight, eps), total};
  }
  const Tensor x32 = floats(x), residual32 = floats(residual), weight32 = floats(weight);
  const int64_t size = x.size(-1);
  Tensor total = at::empty_like(x32), y = at::empty_like(x32);
  parallel_for(x.numel() / size, kCheapRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin * size; t < end * size; t += size) {
      float* sum = total.mutable_data_ptr<float>() + t;
      std::transform(x32.const_data_ptr<float>() + t, x32.const_data_ptr<float>() + t + size,
                     residual32.const_data_ptr<float>() + t, sum, std::plus<float>());
      kernels().rms_norm_row(sum, weight32.const_data_ptr<float>(), size, float(eps), y.mutable_data_ptr<float>() + t);
    }
  });
  return {y, total};
}

Tensor swiglu(const Tensor& gate_up) {
  const Tensor x = floats(gate_up);
  const int64_t size = x.size(-1) / 2;
  Tensor y = at::empty({x.size(0), size}, at::kFloat);
  parallel_for(x.size(0), kCheapRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* row = x.const_data_ptr<float>() + t * 2 * size;
      kernels().swiglu_row(row, row + size, size, y.mutable_data_ptr<float>() + t * size);
    }
  });
  return y.to(gate_up.scalar_type());
}

std::vector<std::string> instruction_set_names() {
  std::vector<std::string> names;
  for (const InstructionSet& set : instruction_sets) names.push_back(set.name);
  return names;
}

// For tests: the best one is in use from the start.
void use_instruction_set(std::string name) {
  for (const InstructionSet& set : instruction_sets) {
    if (set.name == name) {
      chosen_kernels = set.kernels;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "this processor has no ", name);
}

// ------------------------------------------------------------------------------------------------------------ sampling

// The largest logit of each row and the lowest id that has it; NaN where there is one.
std::tuple<Tensor, Tensor> greatest(const Tensor& logits) {
  const Tensor logits32 = floats(logits);
  const int64_t size = logits.size(1);
  Tensor values = at::empty({logits.size(0)}, at::kFloat), ids = at::empty({logits.size(0)}, at::kLong);
  parallel_for(logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* row = logits32.const_data_ptr<float>() + r * size;
      const float value = kernels().greatest(row, size);
      values.mutable_data_ptr<float>()[r] = value;
      ids.mutable_data_ptr<int64_t>()[r] = std::isnan(value) ? 0 : std::find(row, row + size, value) - row;
    }
  });
  return {values, ids};
}

}  // namespace

TORCH_LIBRARY(tokenmill_cpu, library) {
  library.def("instruction_sets() -> str[]", instruction_set_names);
  library.def("use_instruction_set(str name) -> ()", use_instruction_set);
  library.def("use_threads(int number) -> ()", [](int64_t number) { num_threads = int(number); });
  library.def("linear(Tensor x, Tensor packed, int format, int out) -> Tensor", linear);
  library.def(
      "experts(Tensor x, Tensor weights, Tensor chosen, Tensor gate_up, Tensor down, int format, int size) -> Tensor",
      experts);
  library.def("route(Tensor logits, int num_chosen, str score, bool renormalise, float scale) -> (Tensor, Tensor)",
              route);
  library.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()", write_kv);
  library.def(
      "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, int[] query_starts, "
      "int[] context_lens, float scale, int? window, Tensor? sinks) -> Tensor",
      attention);
  library.def("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", rotary);
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm);
  library.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", add_rms_norm);
  library.def("swiglu(Tensor gate_up) -> Tensor", swiglu);
  library.def("greatest(Tensor logits) -> (Tensor, Tensor)", greatest);
}

}  // namespace tokenmill
