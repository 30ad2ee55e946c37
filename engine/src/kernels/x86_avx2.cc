// AVX2 with F16C: a block is two vectors.
#include "arch.h"

#if LOWBIT_X86

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC target("avx2,f16c")

namespace lowbit {
namespace {

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
using Pairs = I;

inline __m256i Load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m128i Load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void Store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void Store128(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }

inline F Splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F LoadF(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void StoreF(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline I LoadS16I(const int16_t* p) {
  return {_mm256_cvtepi16_epi32(Load128(p)), _mm256_cvtepi16_epi32(Load128(p + 8))};
}
inline F ToFloat(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline F LoadS16(const int16_t* p) { return ToFloat(LoadS16I(p)); }
inline F LoadHalf(const uint16_t* p) { return {_mm256_cvtph_ps(Load128(p)), _mm256_cvtph_ps(Load128(p + 8))}; }
inline void StoreHalf(uint16_t* p, F x) {
  Store128(p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  Store128(p + 8, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
inline F RoundStoreHalf(uint16_t* p, F x) {
  const __m128i a = _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT),
                b = _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT);
  Store128(p, a);
  Store128(p + 8, b);
  return {_mm256_cvtph_ps(a), _mm256_cvtph_ps(b)};
}
inline void StoreS16(int16_t* p, F x) {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  Store256(p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void StoreU8(uint8_t* p, F x, int low) {
  alignas(32) int32_t code[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(code), _mm256_cvtps_epi32(x.a));
  _mm256_store_si256(reinterpret_cast<__m256i*>(code + 8), _mm256_cvtps_epi32(x.b));
  for (int i = 0; i < 16; ++i) p[i] = uint8_t(code[i] - low);
}
inline __m256 RoundHalf8(__m256 x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline F RoundHalf(F x) { return {RoundHalf8(x.a), RoundHalf8(x.b)}; }
inline F Mul(F a, F b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
inline F Add(F a, F b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
inline F MaxKeep(F a, F b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }  // a > b ? a : b
inline F MinKeep(F a, F b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }  // a < b ? a : b
inline __m256 Negative8(__m256 x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ); }
inline uint32_t Negative(F x) {
  return uint32_t(_mm256_movemask_ps(Negative8(x.a))) | uint32_t(_mm256_movemask_ps(Negative8(x.b))) << 8;
}
inline __m256 Prelu8(__m256 x, __m256 slope) { return _mm256_blendv_ps(x, _mm256_mul_ps(x, slope), Negative8(x)); }
inline F Prelu(F x, F slope) { return {Prelu8(x.a, slope.a), Prelu8(x.b, slope.b)}; }
inline __m256 Sign8(__m256 x) { return _mm256_blendv_ps(_mm256_set1_ps(1), _mm256_set1_ps(-1), Negative8(x)); }
inline F Sign(F x) { return {Sign8(x.a), Sign8(x.b)}; }

inline I ZeroI() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I LoadI(const int32_t* p) { return {Load256(p), Load256(p + 8)}; }
inline void StoreI(int32_t* p, I x) {
  Store256(p, x.a);
  Store256(p + 8, x.b);
}
inline I AddI(I a, I b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
inline I MulI(I a, I b) { return {_mm256_mullo_epi32(a.a, b.a), _mm256_mullo_epi32(a.b, b.b)}; }
inline I MinusTwice(I a, I b) {
  return {_mm256_sub_epi32(a.a, _mm256_slli_epi32(b.a, 1)), _mm256_sub_epi32(a.b, _mm256_slli_epi32(b.b, 1))};
}
inline uint32_t Above8(__m256i a, __m256i b) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))));
}
inline uint32_t AtMost(I a, I b) { return (Above8(a.a, b.a) | Above8(a.b, b.b) << 8) ^ 0xffff; }
inline uint64_t Signs8(__m256i x) { return uint64_t(uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(x)))); }
template <int B>
inline uint64_t BelowZero(const I (&sums)[B]) {
  uint64_t bits = 0;
  for (int b = 0; b < B; ++b) bits |= (Signs8(sums[b].a) | Signs8(sums[b].b) << 8) << (16 * b);
  return bits;
}
inline Pairs LoadPairs(const int16_t* p) { return {Load256(p), Load256(p + 16)}; }
inline I Dot(I sum, int32_t pair, Pairs w) {
  const __m256i x = _mm256_set1_epi32(pair);
  return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(x, w.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(x, w.b))};
}

// Bits are counted by bytes (two table look-ups, one a nibble); a byte holds 31 words' worth, then the bytes of each
// lane are added up.
struct BitCount {
  using Weights = I;
  static constexpr int kFlush = 31;
  I bytes, sum;
  void Start(const I& sums) {
    bytes = ZeroI();
    sum = sums;
  }
  template <int B>
  static __m256i Spread(const uint32_t* a) {
    return _mm256_set1_epi32(int32_t(*a));
  }
  static Weights Load(const uint32_t* p) { return {Load256(p), Load256(p + 8)}; }
  static __m256i Count(__m256i x) {
    const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2,
                                           2, 3, 2, 3, 3, 4);
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i a = _mm256_shuffle_epi8(table, _mm256_and_si256(x, low));
    const __m256i b = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi32(x, 4), low));
    return _mm256_add_epi8(a, b);
  }
  void Add(__m256i x, const Weights& w) {
    bytes.a = _mm256_add_epi8(bytes.a, Count(_mm256_xor_si256(x, w.a)));
    bytes.b = _mm256_add_epi8(bytes.b, Count(_mm256_xor_si256(x, w.b)));
  }
  // maddubs cannot saturate: 2 * 255 is far below 32767.
  static __m256i Lanes(__m256i x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
  }
  void Flush() {
    sum = AddI(sum, {Lanes(bytes.a), Lanes(bytes.b)});
    bytes = ZeroI();
  }
  I Total() const { return AddI(sum, {Lanes(bytes.a), Lanes(bytes.b)}); }
};

#define LOWBIT_HALVES 0
#define LOWBIT_TABLES 0
#define LOWBIT_NIBBLES 1
using Bytes = __m256i;
inline Bytes LoadBytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Bytes ZeroBytes() { return _mm256_setzero_si256(); }
inline Bytes RepeatSixteen(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(p)));
}
inline Bytes Pick(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline void AddBytesTo(Bytes& sum, Bytes x) {  // in place; GCC would look everything up first and keep it in memory
  __asm__("vpaddb %1, %0, %0" : "+x"(sum) : "x"(x));
}
struct Wide {  // sums of 32 bytes as 16 bits
  __m256i even, odd;
  void Add(Bytes x) {
    even = _mm256_add_epi16(even, _mm256_and_si256(x, _mm256_set1_epi16(255)));
    odd = _mm256_add_epi16(odd, _mm256_srli_epi16(x, 8));
  }
  I Block(int b) const {  // bytes 0, 2 .. 30 or 1, 3 .. 31
    const __m256i words = b == 0 ? even : odd;
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)),
            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1))};
  }
};
#define LOWBIT_BYTE_DOT 0  // its byte products saturate
inline void Transpose8(__m256 (&x)[8]) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256d ab = _mm256_castps_pd(_mm256_unpacklo_ps(x[i], x[i + 1])),
                  cd = _mm256_castps_pd(_mm256_unpacklo_ps(x[i + 2], x[i + 3])),
                  ef = _mm256_castps_pd(_mm256_unpackhi_ps(x[i], x[i + 1])),
                  gh = _mm256_castps_pd(_mm256_unpackhi_ps(x[i + 2], x[i + 3]));
    a[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd));
    a[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd));
    a[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ef, gh));
    a[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ef, gh));
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
    x[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
  }
}
inline void Transpose(F (&x)[16]) {
  __m256 q[4][8];  // quarters: pixels 0..7 and 8..15 by channels 0..7 and 8..15
  for (int i = 0; i < 8; ++i) {
    q[0][i] = x[i].a;
    q[1][i] = x[i].b;
    q[2][i] = x[i + 8].a;
    q[3][i] = x[i + 8].b;
  }
  for (auto& quarter : q) Transpose8(quarter);
  for (int i = 0; i < 8; ++i) {
    x[i] = {q[0][i], q[2][i]};
    x[i + 8] = {q[1][i], q[3][i]};
  }
}

constexpr int kLineVectors = 1;
constexpr bool kBitUnroll3x3 = false;
constexpr int kBitBlocks = 2, kGemmPixels = 2, kGemmBlocks = 2, kEpiloguePixels = 4, kEpilogueBlocks = 1;
constexpr int BitPixels(int blocks) { return blocks == 1 ? 4 : 2; }

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_avx2;
const Kernels kKernels_avx2 = LOWBIT_KERNELS(avx2);

}  // namespace lowbit

#endif
