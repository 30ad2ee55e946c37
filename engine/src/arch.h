// The CPU: which features it has, which kernels that selects, and its floating-point mode.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/kernels.h"

#ifndef LOWBIT_X86
#if defined(__x86_64__)
#define LOWBIT_X86 1
#else
#define LOWBIT_X86 0
#endif
#endif

#ifndef LOWBIT_ARM64
#if defined(__aarch64__)
#define LOWBIT_ARM64 1
#else
#define LOWBIT_ARM64 0
#endif
#endif

namespace lowbit {

enum : uint32_t {
  kCpuAvx2 = 1 << 0,
  kCpuF16c = 1 << 1,
  kCpuAvx512 = 1 << 2,  // F, BW, DQ and VL
  kCpuVpopcntdq = 1 << 3,
  kCpuVnni = 1 << 4,
  kCpuVbmi = 1 << 5,
  kCpuBitalg = 1 << 6,  // and BMI2
  kCpuNeon = 1 << 7,    // every 64-bit ARM CPU
  kCpuI8mm = 1 << 8,
};

// Features of this CPU that the operating system lets us use (cpuid and xgetbv).
uint32_t CpuFeatures();

struct IsaRow {
  std::string name;
  bool available;
};

// Every row of isa.inc, best first, and whether a CPU with `features` can run it.
std::vector<IsaRow> IsaRows(uint32_t features);

// The kernels of row `name` (empty: the best row `features` allows), null entries taken from the next rows. Throws
// std::invalid_argument for an unknown row and for one that `features` lack.
Kernels SelectKernels(const std::string& name, uint32_t features);

// Sets nearest-even, no flush-to-zero, no denormals-are-zero for this thread; puts the caller's mode back at the end.
class FloatMode {
 public:
  FloatMode();
  ~FloatMode();
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace lowbit
