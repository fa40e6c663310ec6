// Sixteen lanes of numbers, and the few things that the kernels do with them: once for AVX-512, once for AVX2.
//
// ISA is the namespace, so that the linker keeps the sets apart. With AVX-512 a value is one register; with AVX2 it is
// two, the low eight lanes and the high eight.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#define INLINE inline __attribute__((always_inline))

namespace tokenmill::ISA {

using bf16 = uint16_t;         // its bits: the upper half of a float's
enum class fp8 : uint8_t {};   // its bits: e4m3

INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

INLINE bf16 narrow(float x) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16(bits >> 16 | 0x40);  // NaN stays NaN
  return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef __AVX512F__

using Floats = __m512;  // 16 of fp32
using Words = __m512i;  // 16 of 4 bytes: an int32, four int8 or uint8, two bf16

constexpr int kRegisters = 32;   // for values of this size
constexpr int kWeightBias = 128;  // `dot4` takes int8 weights as w + 128: vpdpbusd wants one side unsigned

INLINE Floats broadcast(float x) { return _mm512_set1_ps(x); }
INLINE Words broadcast(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Floats load(const float* p) { return _mm512_loadu_ps(p); }
INLINE Words load_words(const void* p) { return _mm512_loadu_si512(p); }
INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
INLINE Floats load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
INLINE Floats load(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE Floats load_first(const bf16* p, int n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// e4m3 as fp16, whose exponent has another bias: 2^-8 of the number, unless that is not a number. Subnormal ones cost nothing.
INLINE __m256i finite_fp8(__m128i codes) {
  return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(int16_t(0xbfff)));
}
INLINE Floats from_fp8(__m128i codes) {
  const __m256i half = finite_fp8(codes), rest = _mm256_and_si256(half, _mm256_set1_epi16(0x7fff));
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f << 7));
  return _mm512_cvtph_ps(_mm256_or_si256(half, nan)) * _mm512_set1_ps(256.0f);
}
INLINE Floats load_256ths(const fp8* p) { return _mm512_cvtph_ps(finite_fp8(_mm_loadu_si128((const __m128i*)p))); }
INLINE Floats load(const fp8* p) { return from_fp8(_mm_loadu_si128((const __m128i*)p)); }
INLINE Floats load_first(const fp8* p, int n) { return from_fp8(_mm_maskz_loadu_epi8(first(n), p)); }
INLINE Floats load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE Floats load_first(const int8_t* p, int n) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)));
}
INLINE void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
INLINE void store_first(float* p, Floats x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
INLINE void store_int8(int8_t* p, Words x) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x)); }

INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats absolute(Floats x) { return _mm512_abs_ps(x); }
INLINE Floats first_of(Floats x, int n, Floats others) { return _mm512_mask_mov_ps(others, first(n), x); }
INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }
INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }
// Lane i of the result is the sum of x[i]: a tree, which halves the vectors and the lanes that belong together.
INLINE Floats sums(Floats (&x)[16]) {
  for (int i = 0; i < 8; i++) x[i] = _mm512_unpacklo_ps(x[i], x[i + 8]) + _mm512_unpackhi_ps(x[i], x[i + 8]);
  for (int i = 0; i < 4; i++) x[i] = _mm512_unpacklo_ps(x[i], x[i + 4]) + _mm512_unpackhi_ps(x[i], x[i + 4]);
  for (int i = 0; i < 2; i++) {  // a lane of 128 bits now holds a part of the sums of four vectors
    x[i] = _mm512_shuffle_f32x4(x[i], x[i + 2], 0x88) + _mm512_shuffle_f32x4(x[i], x[i + 2], 0xdd);
  }
  const Floats all = _mm512_shuffle_f32x4(x[0], x[1], 0x88) + _mm512_shuffle_f32x4(x[0], x[1], 0xdd);
  const Words order = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
  return _mm512_permutexvar_ps(order, all);
}
INLINE bool any_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
INLINE int32_t sum(Words x) { return _mm512_reduce_add_epi32(x); }
INLINE Words add(Words a, Words b) { return _mm512_add_epi32(a, b); }
INLINE Words nearest(Floats x) { return _mm512_cvtps_epi32(x); }
INLINE Floats to_floats(Words x) { return _mm512_cvtepi32_ps(x); }
INLINE Floats times_two_to(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }
INLINE Floats integral(Floats x) { return _mm512_roundscale_ps(x, 8); }
INLINE Words low_nibbles(Words x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE Words high_nibbles(Words x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
INLINE Words look_up(__m128i table, Words nibbles) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), nibbles);
}

// Each lane of the result: that of `total` plus the products of four unsigned bytes of a and four signed ones of b.
// In assembly, because gcc 12 keeps arrays of more than sixteen accumulators in memory when it is an intrinsic.
INLINE void dot4_unsigned(Words& total, Words a, Words b) { asm("vpdpbusd %2, %1, %0" : "+v"(total) : "v"(a), "v"(b)); }
INLINE void dot4(Words& total, Words weight, Words x) { dot4_unsigned(total, weight, x); }

// Of two bf16 in each lane the one, as fp32.
INLINE Floats lower_bf16(Words x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINE Floats upper_bf16(Words x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xffff0000))); }

#else  // AVX2

struct Floats { __m256 low, high; };
struct Words { __m256i low, high; };

constexpr int kRegisters = 8;
constexpr int kWeightBias = 0;  // `dot4` makes the weights signed again

INLINE Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Words broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE Words load_words(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE Floats load(const bf16* p) {
  const auto eight = [](const bf16* q) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)q)), 16));
  };
  return {eight(p), eight(p + 8)};
}
INLINE __m128i finite_fp8(__m128i codes) {  // of the lower eight: as with AVX-512 above
  return _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(codes), 7), _mm_set1_epi16(int16_t(0xbfff)));
}
INLINE __m256 from_fp8(__m128i codes) {
  const __m128i half = finite_fp8(codes), rest = _mm_and_si128(half, _mm_set1_epi16(0x7fff));
  const __m128i nan = _mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f << 7));
  return _mm256_cvtph_ps(_mm_or_si128(half, nan)) * _mm256_set1_ps(256.0f);
}
INLINE Floats load_256ths(const fp8* p) {
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtph_ps(finite_fp8(codes)), _mm256_cvtph_ps(finite_fp8(_mm_srli_si128(codes, 8)))};
}
INLINE Floats load(const fp8* p) {
  const __m128i codes = _mm_loadu_si128((const __m128i*)p);
  return {from_fp8(codes), from_fp8(_mm_srli_si128(codes, 8))};
}
INLINE Floats load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
  const auto eight = [](__m128i x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)); };
  return {eight(bytes), eight(_mm_srli_si128(bytes, 8))};
}
template <class T>
INLINE Floats load_first(const T* p, int n) {
  T padded[16] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
INLINE void store(float* p, Floats x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
INLINE void store_first(float* p, Floats x, int n) {
  float whole[16];
  store(whole, x);
  std::memcpy(p, whole, n * sizeof(float));
}
INLINE void store_int8(int8_t* p, Words x) {
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xd8);  // 16 of int16, in order
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

INLINE Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
INLINE Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
INLINE Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
INLINE Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }
INLINE Floats fma(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE Floats maximum(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
INLINE Floats minimum(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
INLINE Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
INLINE Floats first_of(Floats x, int n, Floats others) {
  float lanes[16];
  store(lanes, others);
  store_first(lanes, x, n);
  return load(lanes);
}
INLINE float sum(Floats x) {
  const __m256 eight = x.low + x.high;
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE bool any_nan(Floats x) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, 3)));
}
INLINE Floats sums(Floats (&x)[16]) {
  float lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = sum(x[i]);
  return load(lanes);
}
INLINE Words add(Words a, Words b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
INLINE int32_t sum(Words x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
INLINE Words nearest(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
INLINE Floats to_floats(Words x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
INLINE Floats times_two_to(Floats x, Floats power) {  // power within -126 .. 127
  const auto eight = [](__m256 y, __m256 n) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return y * _mm256_castsi256_ps(exponent);
  };
  return {eight(x.low, power.low), eight(x.high, power.high)};
}
INLINE Floats integral(Floats x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }
INLINE Words low_nibbles(Words x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
INLINE Words high_nibbles(Words x) { return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)}); }
INLINE Words look_up(__m128i table, Words nibbles) {
  const __m256i twice = _mm256_broadcastsi128_si256(table);
  return {_mm256_shuffle_epi8(twice, nibbles.low), _mm256_shuffle_epi8(twice, nibbles.high)};
}

INLINE __m256i dot4_eight(__m256i total, __m256i a, __m256i b) {  // sums of two products must fit into int16
  return _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}
INLINE void dot4_unsigned(Words& total, Words a, Words b) {  // a within 0 .. 127
  total = {dot4_eight(total.low, a.low, b.low), dot4_eight(total.high, a.high, b.high)};
}
INLINE void dot4(Words& total, Words weight, Words x) {  // |w| * (x with w's sign), since one side must be unsigned
  const auto eight = [](__m256i sums, __m256i biased, __m256i other) {
    const __m256i w = _mm256_xor_si256(biased, _mm256_set1_epi8(-128));
    return dot4_eight(sums, _mm256_abs_epi8(w), _mm256_sign_epi8(other, w));
  };
  total = {eight(total.low, weight.low, x.low), eight(total.high, weight.high, x.high)};
}
INLINE Floats lower_bf16(Words x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.low, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.high, 16))};
}
INLINE Floats upper_bf16(Words x) {
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.low, upper)), _mm256_castsi256_ps(_mm256_and_si256(x.high, upper))};
}

#endif

// The first n of 16 lanes, the others 0, with n of 16 and more meaning all.
template <class T>
INLINE Floats load_up_to(const T* p, int64_t n) {
  return n >= 16 ? load(p) : load_first(p, int(n));
}
INLINE void store_up_to(float* p, Floats x, int64_t n) { n >= 16 ? store(p, x) : store_first(p, x, int(n)); }

// e^x to 2 units in the last place, x within -87 .. 88: 2^n e^r with |r| <= ln(2) / 2, by Taylor's series. NaN stays.
INLINE Floats exponential(Floats x) {
  x = minimum(broadcast(88.0f), maximum(broadcast(-87.0f), x));  // the processor gives the second where one is NaN
  const Floats n = integral(x * broadcast(1.44269504f));
  Floats r = fma(n, broadcast(-0.693359375f), x);  // ln(2) in two parts: the first times n is exact
  r = fma(n, broadcast(2.12194440e-4f), r);
  Floats series = broadcast(1.0f / 720);
  for (const float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = fma(series, r, broadcast(term));
  return times_two_to(series, n);
}

}  // namespace tokenmill::ISA
