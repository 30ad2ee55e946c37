// The reference row: plain C++, runs everywhere.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "half.h"
#include "kernels/kernels.h"

namespace lowbit {
namespace {

struct F {
  float v[kLanes];
};
struct I {
  int32_t v[kLanes];
};
struct Pairs {
  const int16_t* v;
};

template <typename Function>
inline F Each(Function f) {
  F out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

template <typename Function>
inline I EachI(Function f) {
  I out;
  for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
  return out;
}

inline F Splat(float x) {
  return Each([=](int) { return x; });
}
inline F LoadF(const float* p) {
  return Each([=](int i) { return p[i]; });
}
inline void StoreF(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
inline F LoadS16(const int16_t* p) {
  return Each([=](int i) { return float(p[i]); });
}
inline F LoadHalf(const uint16_t* p) {
  return Each([=](int i) { return HalfToFloat(p[i]); });
}
inline void StoreHalf(uint16_t* p, const F& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = FloatToHalf(x.v[i]);
}
inline F RoundStoreHalf(uint16_t* p, const F& x) {
  StoreHalf(p, x);
  return LoadHalf(p);
}
inline void StoreS16(int16_t* p, const F& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = int16_t(std::lrint(x.v[i]));
}
inline void StoreU8(uint8_t* p, const F& x, int low) {
  for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(std::lrint(x.v[i]) - low);
}
inline F RoundHalf(const F& x) {
  return Each([&](int i) { return HalfToFloat(FloatToHalf(x.v[i])); });
}
inline F Mul(const F& a, const F& b) {
  return Each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F Add(const F& a, const F& b) {
  return Each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F MaxKeep(const F& a, const F& b) {  // a > b ? a : b
  return Each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F MinKeep(const F& a, const F& b) {  // a < b ? a : b
  return Each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F Prelu(const F& x, const F& slope) {
  return Each([&](int i) { return x.v[i] < 0 ? x.v[i] * slope.v[i] : x.v[i]; });
}
inline F Sign(const F& x) {
  return Each([&](int i) { return x.v[i] < 0 ? -1.0f : 1.0f; });
}
inline uint32_t Negative(const F& x) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(x.v[i] < 0) << i;
  return mask;
}

inline I ZeroI() { return {}; }
inline I LoadI(const int32_t* p) {
  return EachI([=](int i) { return p[i]; });
}
inline void StoreI(int32_t* p, const I& x) { std::memcpy(p, x.v, sizeof x.v); }
inline I LoadS16I(const int16_t* p) {
  return EachI([=](int i) { return int32_t(p[i]); });
}
inline I AddI(const I& a, const I& b) {
  return EachI([&](int i) { return a.v[i] + b.v[i]; });
}
inline I MulI(const I& a, const I& b) {
  // Lanes behind the last channel hold anything: unsigned, so that they may wrap.
  return EachI([&](int i) { return int32_t(uint32_t(a.v[i]) * uint32_t(b.v[i])); });
}
inline I MinusTwice(const I& a, const I& b) {  // a - 2 b
  return EachI([&](int i) { return a.v[i] - 2 * b.v[i]; });
}
inline uint32_t AtMost(const I& a, const I& b) {  // a <= b
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a.v[i] <= b.v[i]) << i;
  return mask;
}
template <int B>
inline uint64_t BelowZero(const I (&sums)[B]) {
  uint64_t bits = 0;
  for (int b = 0; b < B; ++b) {
    for (int i = 0; i < kLanes; ++i) bits |= uint64_t(sums[b].v[i] < 0) << (16 * b + i);
  }
  return bits;
}
inline F ToFloat(const I& x) {
  return Each([&](int i) { return float(x.v[i]); });
}

inline Pairs LoadPairs(const int16_t* p) { return {p}; }
inline I Dot(const I& sum, int32_t pair, Pairs w) {
  const int32_t low = int16_t(pair & 0xffff), high = int16_t(uint32_t(pair) >> 16);
  return EachI([&](int i) { return sum.v[i] + low * w.v[2 * i] + high * w.v[2 * i + 1]; });
}

#define LOWBIT_HALVES 0
#define LOWBIT_TABLES 0
#define LOWBIT_NIBBLES 0
#define LOWBIT_BYTE_DOT 1
using Quads = const int8_t*;
inline Quads LoadQuads(const int8_t* p) { return p; }
inline const uint8_t* SpreadQuad(const uint8_t* p) { return p; }
inline I DotBytes(const I& sum, const uint8_t* quad, Quads w) {
  return EachI([&](int i) {
    uint32_t total = uint32_t(sum.v[i]);  // may pass the ends of int32 on its way
    for (int k = 0; k < 4; ++k) total += uint32_t(quad[k] * w[4 * i + k]);
    return int32_t(total);
  });
}

struct BitCount {
  using Weights = const uint32_t*;
  static constexpr int kFlush = 0;  // never needed
  int32_t sum[kLanes];
  void Start(const I& sums) { StoreI(sum, sums); }
  template <int B>
  static uint32_t Spread(const uint32_t* a) {
    return *a;
  }
  static Weights Load(const uint32_t* p) { return p; }
  void Add(uint32_t a, Weights w) {
    for (int i = 0; i < kLanes; ++i) {
      uint32_t x = a ^ w[i];
      x -= (x >> 1) & 0x55555555u;
      x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
      x = (x + (x >> 4)) & 0x0f0f0f0fu;
      sum[i] += int32_t((x * 0x01010101u) >> 24);
    }
  }
  void Flush() {}
  I Total() const { return LoadI(sum); }
};

inline void Transpose(F (&x)[16]) {
  float from[16][16], to[16][16];
  for (int i = 0; i < 16; ++i) StoreF(from[i], x[i]);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) to[i][k] = from[k][i];
  }
  for (int i = 0; i < 16; ++i) x[i] = LoadF(to[i]);
}

constexpr int kLineVectors = 1;
constexpr bool kBitUnroll3x3 = false;
constexpr int kBitBlocks = 2, kGemmPixels = 2, kGemmBlocks = 2, kEpiloguePixels = 4, kEpilogueBlocks = 1;
constexpr int BitPixels(int) { return 2; }

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_scalar;
const Kernels kKernels_scalar = LOWBIT_KERNELS(scalar);

}  // namespace lowbit
