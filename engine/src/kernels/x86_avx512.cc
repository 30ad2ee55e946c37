// AVX-512 (F, BW, DQ, VL) with VPOPCNTDQ, VNNI, VBMI and BITALG: one vector is a whole block.
#include "arch.h"

#if LOWBIT_X86

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

// Some compilers' own intrinsics (GCC 12) start from an undefined vector on purpose and then warn about it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx512vnni,avx512vbmi,avx512bitalg,bmi2,f16c")

namespace lowbit {
namespace {

using F = __m512;
using I = __m512i;
using Pairs = __m512i;

inline F Splat(float x) { return _mm512_set1_ps(x); }
inline F LoadF(const float* p) { return _mm512_loadu_ps(p); }
inline void StoreF(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F LoadS16(const int16_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline F LoadHalf(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void StoreHalf(uint16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F RoundStoreHalf(uint16_t* p, F x) {
  const __m256i half = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
  return _mm512_cvtph_ps(half);
}
inline void StoreS16(int16_t* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}
inline void StoreU8(uint8_t* p, F x, int low) {
  const __m512i code = _mm512_sub_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(code));
}
inline void StoreFourU8(uint8_t* p, const F (&x)[4], int low) {
  const __m512i first = _mm512_set1_epi32(low);
  const auto code = [&](int i) { return _mm512_sub_epi32(_mm512_cvtps_epi32(x[i]), first); };
  const __m512i words = _mm512_packus_epi32(code(0), code(1)), more = _mm512_packus_epi32(code(2), code(3));
  // Packing works within lanes of 128 bits.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words, more)));
}
inline F RoundHalf(F x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
inline F Mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F Add(F a, F b) { return _mm512_add_ps(a, b); }
inline F MaxKeep(F a, F b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
inline F MinKeep(F a, F b) { return _mm512_min_ps(a, b); }  // a < b ? a : b
inline uint32_t Negative(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }
inline F Prelu(F x, F slope) {
  return _mm512_mask_mul_ps(x, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), x, slope);
}
inline F Sign(F x) { return _mm512_mask_blend_ps(__mmask16(Negative(x)), _mm512_set1_ps(1), _mm512_set1_ps(-1)); }

inline I ZeroI() { return _mm512_setzero_si512(); }
inline I LoadI(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void StoreI(int32_t* p, I x) { _mm512_storeu_si512(p, x); }
inline I LoadS16I(const int16_t* p) {
  return _mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I AddI(I a, I b) { return _mm512_add_epi32(a, b); }
inline I MulI(I a, I b) { return _mm512_mullo_epi32(a, b); }
inline I MinusTwice(I a, I b) { return _mm512_sub_epi32(a, _mm512_slli_epi32(b, 1)); }
inline uint32_t AtMost(I a, I b) { return _mm512_cmple_epi32_mask(a, b); }
// Packing with saturation keeps signs, and one move then takes the bits of 64 sums. It mixes the blocks by lanes of 128
// bits; a permutation puts them back in order.
template <int B>
inline uint64_t BelowZero(const I (&sums)[B]) {
  if constexpr (B == 1) return _mm512_movepi32_mask(sums[0]);
  if constexpr (B == 2) {
    const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_movepi16_mask(_mm512_permutexvar_epi64(order, _mm512_packs_epi32(sums[0], sums[1])));
  }
  if constexpr (B > 2) {
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const I high = _mm512_packs_epi32(sums[2], B > 3 ? sums[B - 1] : ZeroI());
    const I all = _mm512_packs_epi16(_mm512_packs_epi32(sums[0], sums[1]), high);
    return _mm512_movepi8_mask(_mm512_permutexvar_epi32(order, all));
  }
}
inline F ToFloat(I x) { return _mm512_cvtepi32_ps(x); }
inline Pairs LoadPairs(const int16_t* p) { return _mm512_loadu_si512(p); }
inline I Dot(I sum, int32_t pair, Pairs w) { return _mm512_dpwssd_epi32(sum, _mm512_set1_epi32(pair), w); }

#define LOWBIT_BYTE_DOT 1
using Quads = __m512i;
inline Quads LoadQuads(const int8_t* p) { return _mm512_loadu_si512(p); }
inline I SpreadQuad(const uint8_t* p) {
  int32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}
inline I DotBytes(I sum, I quad, Quads w) { return _mm512_dpbusd_epi32(sum, quad, w); }

#define LOWBIT_HALVES 1
#define LOWBIT_TABLES 1
#define LOWBIT_NIBBLES 0
using Bytes = __m512i;
inline Bytes LoadBytes(const void* p) { return _mm512_loadu_si512(p); }
inline void StoreBytes(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes KeepBytes(Bytes x) {  // in a register: as an operand in memory it would be loaded for each use
  __asm__("" : "+v"(x));
  return x;
}
inline Bytes ZeroBytes() { return _mm512_setzero_si512(); }
inline Bytes AddBytes(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline void AddBytesTo(Bytes& sum, Bytes x) { __asm__("vpaddb %1, %0, %0" : "+v"(sum) : "v"(x)); }  // in place
inline Bytes Pick(Bytes index, Bytes from) { return _mm512_permutexvar_epi8(index, from); }
inline Bytes PickWhere(uint64_t mask, Bytes index, Bytes from) {
  return _mm512_maskz_permutexvar_epi8(mask, index, from);
}
inline int32_t SumBytes(const uint8_t* p, int n) {  // of bytes up to 31; reads whole vectors
  __m128i sum = _mm_setzero_si128();
  for (; n > 0; n -= 64, p += 64) {
    const __mmask64 mask = n >= 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
    const __m512i eights = _mm512_sad_epu8(_mm512_maskz_loadu_epi8(mask, p), _mm512_setzero_si512());
    sum = _mm_add_epi64(sum, _mm_sad_epu8(_mm512_cvtepi64_epi8(eights), _mm_setzero_si128()));
  }
  return _mm_cvtsi128_si32(sum);
}
// Sums of 64 bytes as 16 bits: `all` has both bytes of a word, `high` the second ones alone. The sum of the first ones
// is all - 256 high, whatever overflowed on the way.
struct Wide {
  __m512i all, high;
  void Add(Bytes x) {
    // As for BitCount: GCC would copy the sums otherwise.
    const __m512i second = _mm512_srli_epi16(x, 8);
    __asm__("vpaddw %1, %0, %0" : "+v"(all) : "v"(x));
    __asm__("vpaddw %1, %0, %0" : "+v"(high) : "v"(second));
  }
  __m512i Even() const { return _mm512_sub_epi16(all, _mm512_slli_epi16(high, 8)); }
  __m512i Odd() const { return high; }
  // As 32 bits: bytes 0, 2 .. 30, then 32 .. 62, then 1 .. 31, then 33 .. 63.
  I Block(int b) const {
    const __m512i words = b < 2 ? Even() : Odd();
    return _mm512_cvtepu16_epi32(b % 2 ? _mm512_extracti64x4_epi64(words, 1) : _mm512_castsi512_si256(words));
  }
};
inline I SplatI(int32_t x) { return _mm512_set1_epi32(x); }
inline I ShiftI(I x, int by) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(by)); }
using Words = __m512i;
inline Words LoadWords(const int16_t* p) { return _mm512_loadu_si512(p); }
inline Words SplatWord(int32_t x) { return _mm512_set1_epi16(int16_t(x)); }
inline Words AddWords(Words a, Words b) { return _mm512_add_epi16(a, b); }
inline Words XorWords(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words ShiftWords(Words x, int by) { return _mm512_sll_epi16(x, _mm_cvtsi32_si128(by)); }
inline Words CountReached(Words count, Words x, Words limit) {
  return _mm512_mask_sub_epi16(count, _mm512_cmpge_epi16_mask(x, limit), count, _mm512_set1_epi16(-1));
}
inline void StoreInterleaved(uint8_t* p, Words even, Words odd, int n) {  // n bytes
  const __m512i bytes = _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
  n == 64 ? _mm512_storeu_si512(p, bytes) : _mm512_mask_storeu_epi8(p, (__mmask64{1} << n) - 1, bytes);
}

struct BitCount {
  using Weights = __m512i;
  static constexpr int kFlush = 0;  // never needed
  __m512i sum;
  void Start(I sums) { sum = sums; }
  // For several blocks kept in a register: as an operand in memory it would be loaded for each of them.
  template <int B>
  static I Spread(const uint32_t* a) {
    I x = _mm512_set1_epi32(int32_t(*a));
    if constexpr (B > 1) __asm__("" : "+v"(x));
    return x;
  }
  static Weights Load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  void Add(I a, Weights w) {
    const I count = _mm512_popcnt_epi32(_mm512_xor_si512(a, w));
    __asm__("vpaddd %1, %0, %0" : "+v"(sum) : "v"(count));
  }
  void Flush() {}
  I Total() const { return sum; }
};

// Counts of 16-bit lanes.
inline I LoadWords(const uint32_t* p) { return _mm512_loadu_si512(p); }
struct HalfCount {
  __m512i sum;
  // The first one's low halves, the second one's high ones.
  static I Both(I first, I second) { return _mm512_mask_blend_epi16(0xaaaaaaaa, first, second); }
  void Start(I sums) { sum = sums; }
  template <int B>
  static I Spread(const uint16_t* two) {
    int32_t bits;
    std::memcpy(&bits, two, sizeof bits);
    I x = _mm512_set1_epi32(bits);
    if constexpr (B > 1) __asm__("" : "+v"(x));
    return x;
  }
  void Add(I a, I w) {
    const I count = _mm512_popcnt_epi16(_mm512_xor_si512(a, w));
    __asm__("vpaddw %1, %0, %0" : "+v"(sum) : "v"(count));
  }
  std::pair<uint32_t, uint32_t> BelowZero() const {
    const uint32_t signs = _mm512_movepi16_mask(sum);
    return {_pext_u32(signs, 0x55555555), _pext_u32(signs, 0xaaaaaaaa)};
  }
  // Of two counts, so of four pixels, 16 filters each.
  static uint64_t BelowZero(HalfCount a, HalfCount b) {
    alignas(64) static constexpr auto kOrder = [] {
      std::array<uint8_t, 64> order{};
      for (int i = 0; i < 64; ++i) {  // packing works within lanes of 128 bits, 4 filters each
        const int pixel = i / 16, filter = i % 16;
        order[size_t(i)] = uint8_t(filter / 4 * 16 + pixel / 2 * 8 + filter % 4 * 2 + pixel % 2);
      }
      return order;
    }();
    const I packed = _mm512_packs_epi16(a.sum, b.sum);
    return _mm512_movepi8_mask(_mm512_permutexvar_epi8(_mm512_load_si512(kOrder.data()), packed));
  }
  I First() const { return _mm512_and_si512(sum, _mm512_set1_epi32(0xffff)); }
  I Second() const { return _mm512_srli_epi32(sum, 16); }
};

// 4 x 4 blocks of 4 x 4 numbers: within lanes of 128 bits, then the lanes.
inline void Transpose(F (&x)[16]) {
  F a[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512d ab = _mm512_castps_pd(_mm512_unpacklo_ps(x[i], x[i + 1])),
                  cd = _mm512_castps_pd(_mm512_unpacklo_ps(x[i + 2], x[i + 3])),
                  ef = _mm512_castps_pd(_mm512_unpackhi_ps(x[i], x[i + 1])),
                  gh = _mm512_castps_pd(_mm512_unpackhi_ps(x[i + 2], x[i + 3]));
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ef, gh));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ef, gh));
  }
  for (int i = 0; i < 4; ++i) {
    const F low = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x44), high = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xee);
    const F low2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x44),
            high2 = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xee);
    x[i] = _mm512_shuffle_f32x4(low, low2, 0x88);
    x[i + 4] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    x[i + 8] = _mm512_shuffle_f32x4(high, high2, 0x88);
    x[i + 12] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

constexpr int kLineVectors = 4;
constexpr bool kBitUnroll3x3 = true;
constexpr int kBitBlocks = 4, kGemmPixels = 6, kGemmBlocks = 4, kEpiloguePixels = 8, kEpilogueBlocks = 4;
constexpr int BitPixels(int blocks) { return blocks > 2 ? 4 : 8; }  // 16 sums

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_avx512;
const Kernels kKernels_avx512 = LOWBIT_KERNELS(avx512);

}  // namespace lowbit

#endif
