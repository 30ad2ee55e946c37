// NEON with the 8-bit integer products of ARMv8.6 (I8MM): bytes by bytes, four of them a lane.
#include "arch.h"

#if LOWBIT_ARM64

#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#pragma GCC target("arch=armv8.2-a+i8mm")

namespace lowbit {
namespace {

#include "kernels/arm_vectors.inc"

#define LOWBIT_HALVES 0
#define LOWBIT_TABLES 0
#define LOWBIT_NIBBLES 0
#define LOWBIT_BYTE_DOT 1
struct Quads {
  int8x16_t a, b, c, d;
};
inline Quads LoadQuads(const int8_t* p) { return {vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}; }
inline uint8x16_t SpreadQuad(const uint8_t* p) {
  uint32_t quad;
  std::memcpy(&quad, p, sizeof quad);
  return vreinterpretq_u8_u32(vdupq_n_u32(quad));
}
inline I DotBytes(const I& sum, uint8x16_t quad, const Quads& w) {  // usdot: it wraps, it doesn't saturate
  return Each<I>([=](int32x4_t s, int8x16_t v) { return vusdotq_s32(s, quad, v); }, sum, w);
}

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_i8mm;
const Kernels kKernels_i8mm = LOWBIT_KERNELS(i8mm);

}  // namespace lowbit

#endif
