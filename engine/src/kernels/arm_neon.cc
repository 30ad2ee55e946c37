// NEON as every 64-bit ARM CPU has it. No target pragma: this is the base instruction set.
#include "arch.h"

#if LOWBIT_ARM64

#include <arm_neon.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace lowbit {
namespace {

#include "kernels/arm_vectors.inc"

#define LOWBIT_HALVES 0
#define LOWBIT_TABLES 0
#define LOWBIT_NIBBLES 0
#define LOWBIT_BYTE_DOT 0  // no product of unsigned by signed bytes

#include "kernels/generic.inc"

}  // namespace

extern const Kernels kKernels_neon;
const Kernels kKernels_neon = LOWBIT_KERNELS(neon);

}  // namespace lowbit

#endif
