#include "arch.h"

#include <atomic>
#include <stdexcept>

#include "lowbit/engine.h"

#if LOWBIT_X86
#include <cpuid.h>
#include <xmmintrin.h>
#elif LOWBIT_ARM64 && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace lowbit {

#define LOWBIT_ISA(name, features) extern const Kernels kKernels_##name;
#include "kernels/isa.inc"
#undef LOWBIT_ISA

namespace {

struct Row {
  const char* name;
  uint32_t needs;
  const Kernels* kernels;
};

constexpr Row kRows[] = {
#define LOWBIT_ISA(name, features) {#name, features, &kKernels_##name},
#include "kernels/isa.inc"
#undef LOWBIT_ISA
};

template <typename T>
void FillIn(T& entry, T next) {
  if (entry == nullptr) entry = next;
}

#if LOWBIT_ARM64
// The system says it: user programs can't read the CPU's own registers everywhere.
bool HasI8mm() {
#if defined(__linux__)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM
  return getauxval(AT_HWCAP2) & kI8mm;
#else
  return false;
#endif
}
#endif

std::atomic<uint32_t> without{0};  // features that tests take away

uint32_t Detect() {
#if LOWBIT_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool osxsave = c & (1u << 27), avx = c & (1u << 28), f16c = c & (1u << 29);
  if (!osxsave || !avx) return 0;
  uint32_t xcr0, high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  if ((xcr0 & 0x6) != 0x6) return 0;  // the system saves no ymm registers
  uint32_t features = f16c ? uint32_t{kCpuF16c} : 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  if (b & (1u << 5)) features |= kCpuAvx2;
  const uint32_t avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);
  if ((xcr0 & 0xe6) == 0xe6 && (b & avx512) == avx512) {
    features |= kCpuAvx512;
    if (c & (1u << 14)) features |= kCpuVpopcntdq;
    if (c & (1u << 11)) features |= kCpuVnni;
    if (c & (1u << 1)) features |= kCpuVbmi;
    if (c & (1u << 12) && b & (1u << 8)) features |= kCpuBitalg;
  }
  return features;
#elif LOWBIT_ARM64
  return kCpuNeon | (HasI8mm() ? uint32_t{kCpuI8mm} : 0);
#else
  return 0;
#endif
}

}  // namespace

uint32_t CpuFeatures() { return Detect() & ~without; }

void DebugWithout(const std::string& isa) {
  const Row* found = nullptr;
  for (const Row& row : kRows) {
    if (row.name == isa) found = &row;
  }
  if (!isa.empty() && !found) throw std::invalid_argument("unknown isa '" + isa + "'");
  without = found ? found->needs : 0;
}

std::vector<IsaRow> IsaRows(uint32_t features) {
  std::vector<IsaRow> rows;
  for (const Row& row : kRows) rows.push_back({row.name, (row.needs & ~features) == 0});
  return rows;
}

Kernels SelectKernels(const std::string& name, uint32_t features) {
  Kernels out{};
  std::string known;
  bool reached = false, exists = false;
  for (const Row& row : kRows) {
    const bool available = (row.needs & ~features) == 0;
    known += (known.empty() ? "" : ", ") + std::string(row.name);
    if (row.name == name) exists = true;
    if (!reached && (name.empty() ? available : row.name == name)) {
      if (!available) throw std::invalid_argument("isa '" + name + "' can't run on this CPU");
      reached = true;
      out = *row.kernels;
    } else if (reached && available) {
      const Kernels& next = *row.kernels;
      FillIn(out.bit_threshold, next.bit_threshold);
      FillIn(out.bit_steps, next.bit_steps);
      FillIn(out.int_gemm, next.int_gemm);
      FillIn(out.float_gemm, next.float_gemm);
      FillIn(out.planes, next.planes);
      FillIn(out.line_conv, next.line_conv);
      FillIn(out.patches, next.patches);
      FillIn(out.depthwise, next.depthwise);
      FillIn(out.code_sums, next.code_sums);
      FillIn(out.sum_pool, next.sum_pool);
      FillIn(out.max_pool, next.max_pool);
      FillIn(out.resize_down, next.resize_down);
      FillIn(out.resize_across, next.resize_across);
      FillIn(out.epilogue, next.epilogue);
    }
  }
  if (!name.empty() && !exists) throw std::invalid_argument("unknown isa '" + name + "'; this build has " + known);
  return out;
}

#if LOWBIT_X86

FloatMode::FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatMode::~FloatMode() { _mm_setcsr(uint32_t(saved_)); }

#elif LOWBIT_ARM64

FloatMode::FloatMode() {
  __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
  __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t{0}));
}
FloatMode::~FloatMode() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

#else

FloatMode::FloatMode() : saved_(0) {}
FloatMode::~FloatMode() = default;

#endif

}  // namespace lowbit
