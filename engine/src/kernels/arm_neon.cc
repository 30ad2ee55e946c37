// NEON as every 64-bit ARM CPU has it: a block is four vectors. No target pragma: this is the base instruction set.
#include "arch.h"

#if LOWBIT_ARM64

#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace lowbit {
namespace {

struct F {
  float32x4_t a, b, c, d;
};
struct I {
  int32x4_t a, b, c, d;
};
struct Masks {  // all ones where a lane's condition holds
  uint32x4_t a, b, c, d;
};

// V{f of the first vector of each argument, of the second, ...}
template <typename V, typename Body, typename... Args>
inline V Each(Body f, const Args&... x) {
  return {f(x.a...), f(x.b...), f(x.c...), f(x.d...)};
}

// Conversions to and from float16 round as FPCR says, which FloatMode has set to nearest-even and IEEE halves.
inline float16x4_t ToHalf(float32x4_t x) { return vcvt_f16_f32(x); }
inline float32x4_t FromHalf(float16x4_t x) { return vcvt_f32_f16(x); }
inline float16x4_t LoadHalf4(const uint16_t* p) { return vreinterpret_f16_u16(vld1_u16(p)); }
inline void StoreHalf4(uint16_t* p, float16x4_t x) { vst1_u16(p, vreinterpret_u16_f16(x)); }

inline F Splat(float x) {
  const float32x4_t v = vdupq_n_f32(x);
  return {v, v, v, v};
}
inline F LoadF(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
inline void StoreF(float* p, const F& x) {
  vst1q_f32(p, x.a);
  vst1q_f32(p + 4, x.b);
  vst1q_f32(p + 8, x.c);
  vst1q_f32(p + 12, x.d);
}
inline I LoadS16I(const int16_t* p) {
  const int16x8_t low = vld1q_s16(p), high = vld1q_s16(p + 8);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
inline F ToFloat(const I& x) {
  return Each<F>([](int32x4_t v) { return vcvtq_f32_s32(v); }, x);
}
inline F LoadS16(const int16_t* p) { return ToFloat(LoadS16I(p)); }
inline F LoadHalf(const uint16_t* p) {
  return {FromHalf(LoadHalf4(p)), FromHalf(LoadHalf4(p + 4)), FromHalf(LoadHalf4(p + 8)), FromHalf(LoadHalf4(p + 12))};
}
inline F RoundStoreHalf(uint16_t* p, const F& x) {
  const float16x4_t a = ToHalf(x.a), b = ToHalf(x.b), c = ToHalf(x.c), d = ToHalf(x.d);
  StoreHalf4(p, a);
  StoreHalf4(p + 4, b);
  StoreHalf4(p + 8, c);
  StoreHalf4(p + 12, d);
  return {FromHalf(a), FromHalf(b), FromHalf(c), FromHalf(d)};
}
inline void StoreHalf(uint16_t* p, const F& x) { RoundStoreHalf(p, x); }
inline I Rint(const F& x) {  // ties to even
  return Each<I>([](float32x4_t v) { return vcvtnq_s32_f32(v); }, x);
}
inline void StoreS16(int16_t* p, const F& x) {
  const I code = Rint(x);
  vst1q_s16(p, vcombine_s16(vmovn_s32(code.a), vmovn_s32(code.b)));
  vst1q_s16(p + 8, vcombine_s16(vmovn_s32(code.c), vmovn_s32(code.d)));
}
inline void StoreU8(uint8_t* p, const F& x, int low) {
  const int32x4_t zero = vdupq_n_s32(low);
  const I code = Each<I>([=](int32x4_t v) { return vsubq_s32(v, zero); }, Rint(x));
  const int16x8_t first = vcombine_s16(vmovn_s32(code.a), vmovn_s32(code.b));
  const int16x8_t last = vcombine_s16(vmovn_s32(code.c), vmovn_s32(code.d));
  vst1q_u8(p, vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(first), vmovn_s16(last))));
}
inline F RoundHalf(const F& x) {
  return Each<F>([](float32x4_t v) { return FromHalf(ToHalf(v)); }, x);
}
inline F Mul(const F& a, const F& b) {
  return Each<F>([](float32x4_t x, float32x4_t y) { return vmulq_f32(x, y); }, a, b);
}
inline F Add(const F& a, const F& b) {
  return Each<F>([](float32x4_t x, float32x4_t y) { return vaddq_f32(x, y); }, a, b);
}
// Not fmax and fmin: these would order -0 and +0.
inline F MaxKeep(const F& a, const F& b) {  // a > b ? a : b
  return Each<F>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }, a, b);
}
inline F MinKeep(const F& a, const F& b) {  // a < b ? a : b
  return Each<F>([](float32x4_t x, float32x4_t y) { return vbslq_f32(vcltq_f32(x, y), x, y); }, a, b);
}
inline F Prelu(const F& x, const F& slope) {
  return Each<F>([](float32x4_t v, float32x4_t s) { return vbslq_f32(vcltzq_f32(v), vmulq_f32(v, s), v); }, x, slope);
}
inline F Sign(const F& x) {
  return Each<F>([](float32x4_t v) { return vbslq_f32(vcltzq_f32(v), vdupq_n_f32(-1), vdupq_n_f32(1)); }, x);
}

// 16 masks as bytes that hold one bit each, bit i % 8 at byte i: sums of 8 neighbours are the masks' bits, packed.
inline uint8x16_t Spots(uint8x16_t masks) {
  return vandq_u8(masks, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201u)));
}
inline uint32_t Bits(const Masks& x) {
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(x.a), vreinterpretq_u16_u32(x.b));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(x.c), vreinterpretq_u16_u32(x.d));
  const uint8x16_t spots = Spots(vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)));
  const uint8x16_t twos = vpaddq_u8(spots, spots), fours = vpaddq_u8(twos, twos);
  return vgetq_lane_u16(vreinterpretq_u16_u8(vpaddq_u8(fours, fours)), 0);
}
inline uint32_t Negative(const F& x) {
  return Bits(Each<Masks>([](float32x4_t v) { return vcltzq_f32(v); }, x));
}

inline I ZeroI() {
  const int32x4_t v = vdupq_n_s32(0);
  return {v, v, v, v};
}
inline I LoadI(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
inline void StoreI(int32_t* p, const I& x) {
  vst1q_s32(p, x.a);
  vst1q_s32(p + 4, x.b);
  vst1q_s32(p + 8, x.c);
  vst1q_s32(p + 12, x.d);
}
inline I AddI(const I& a, const I& b) {
  return Each<I>([](int32x4_t x, int32x4_t y) { return vaddq_s32(x, y); }, a, b);
}
inline I MulI(const I& a, const I& b) {
  return Each<I>([](int32x4_t x, int32x4_t y) { return vmulq_s32(x, y); }, a, b);
}
inline I MinusTwice(const I& a, const I& b) {
  return Each<I>([](int32x4_t x, int32x4_t y) { return vsubq_s32(x, vshlq_n_s32(y, 1)); }, a, b);
}
inline uint32_t AtMost(const I& a, const I& b) {
  return Bits(Each<Masks>([](int32x4_t x, int32x4_t y) { return vcleq_s32(x, y); }, a, b));
}
// The sign bits are in the highest byte of each sum.
inline uint8x16_t SignSpots(const I& x) {
  const int16x8_t low = vuzp2q_s16(vreinterpretq_s16_s32(x.a), vreinterpretq_s16_s32(x.b));
  const int16x8_t high = vuzp2q_s16(vreinterpretq_s16_s32(x.c), vreinterpretq_s16_s32(x.d));
  return Spots(vcltzq_s8(vuzp2q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high))));
}
template <int B>
inline uint64_t BelowZero(const I (&sums)[B]) {
  const uint8x16_t none = vdupq_n_u8(0), first = SignSpots(sums[0]);
  const uint8x16_t low = vpaddq_u8(first, B > 1 ? SignSpots(sums[B > 1 ? 1 : 0]) : none);
  const uint8x16_t high =
      B > 2 ? vpaddq_u8(SignSpots(sums[B > 2 ? 2 : 0]), B > 3 ? SignSpots(sums[B - 1]) : none) : none;
  const uint8x16_t fours = vpaddq_u8(low, high);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(fours, none)), 0);
}

// The weights of a pair's two numbers, each in vectors of its own. Widening products: nothing can saturate.
struct Pairs {
  int16x8x2_t low, high;  // 8 filters each
};
inline Pairs LoadPairs(const int16_t* p) { return {vld2q_s16(p), vld2q_s16(p + 16)}; }
inline I Dot(const I& sum, int32_t pair, const Pairs& w) {
  const int16x4_t x = vreinterpret_s16_s32(vdup_n_s32(pair));
  const auto low = [=](int32x4_t s, int16x8x2_t v) {
    s = vmlal_lane_s16(s, vget_low_s16(v.val[0]), x, 0);
    return vmlal_lane_s16(s, vget_low_s16(v.val[1]), x, 1);
  };
  const auto high = [=](int32x4_t s, int16x8x2_t v) {
    return vmlal_high_lane_s16(vmlal_high_lane_s16(s, v.val[0], x, 0), v.val[1], x, 1);
  };
  return {low(sum.a, w.low), high(sum.b, w.low), low(sum.c, w.high), high(sum.d, w.high)};
}

// Bits are counted by bytes; a byte holds 31 words' worth, then the bytes of each lane are added up.
struct BitCount {
  struct Weights {
    uint32x4_t a, b, c, d;
  };
  struct Bytes {
    uint8x16_t a, b, c, d;
  };
  static constexpr int kFlush = 31;
  Bytes bytes;
  I sum;
  void Start(const I& sums) {
    const uint8x16_t zero = vdupq_n_u8(0);
    bytes = {zero, zero, zero, zero};
    sum = sums;
  }
  template <int B>
  static uint32x4_t Spread(const uint32_t* a) {
    return vld1q_dup_u32(a);
  }
  static Weights Load(const uint32_t* p) {
    return {vld1q_u32(p), vld1q_u32(p + 4), vld1q_u32(p + 8), vld1q_u32(p + 12)};
  }
  void Add(uint32x4_t x, const Weights& w) {
    bytes = Each<Bytes>(
        [=](uint8x16_t count, uint32x4_t v) {
          return vaddq_u8(count, vcntq_u8(vreinterpretq_u8_u32(veorq_u32(x, v))));
        },
        bytes, w);
  }
  I Total() const {
    return Each<I>(
        [](int32x4_t s, uint8x16_t b) {
          return vreinterpretq_s32_u32(vpadalq_u16(vreinterpretq_u32_s32(s), vpaddlq_u8(b)));
        },
        sum, bytes);
  }
  void Flush() { Start(Total()); }
};

#define LOWBIT_BYTE_DOT 0  // no product of unsigned by signed bytes in the base instruction set
constexpr bool kBitUnroll3x3 = false;
// 16 of the 32 registers are sums; weights take up to 8 more.
constexpr int kBitBlocks = 2, kGemmPixels = 2, kGemmBlocks = 2, kEpiloguePixels = 4;
constexpr int BitPixels(int blocks) { return blocks == 1 ? 4 : 2; }

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_neon;
const Kernels kKernels_neon = LOWBIT_KERNELS(neon);

}  // namespace lowbit

#endif
