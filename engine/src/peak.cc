// What a core can do at most: the inner loops of the kernels on registers alone, without a load or a store.
//
// Written in assembly, so that no compiler can take the work out of the loop or add to it. A round is a few products
// that don't depend on each other, more than the units' latency times their number, so that throughput decides.
#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "arch.h"
#include "lowbit/engine.h"

namespace lowbit {
namespace {

struct Loop {
  void (*run)(int64_t rounds);
  int64_t macs;  // of one round
};

struct Row {
  const char* isa;
  Loop bits, integers;
};

#if LOWBIT_X86

// xor, vpopcntd, vpaddd: 16 filters x 32 bits. 12 sums, 3 words of activations, 4 of weights, 12 counts.
#define LOWBIT_PRODUCT(sum, a, w, t)          \
  "vpxord %%zmm" #a ", %%zmm" #w ", %%zmm" #t \
  "\n\t"                                      \
  "vpopcntd %%zmm" #t ", %%zmm" #t            \
  "\n\t"                                      \
  "vpaddd %%zmm" #t ", %%zmm" #sum ", %%zmm" #sum "\n\t"

__attribute__((target("avx512f,avx512vpopcntdq"))) void Avx512Bits(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 12, 15, 19) LOWBIT_PRODUCT(1, 12, 16, 20) LOWBIT_PRODUCT(2, 12, 17, 21)
      LOWBIT_PRODUCT(3, 12, 18, 22) LOWBIT_PRODUCT(4, 13, 15, 23) LOWBIT_PRODUCT(5, 13, 16, 24)
      LOWBIT_PRODUCT(6, 13, 17, 25) LOWBIT_PRODUCT(7, 13, 18, 26) LOWBIT_PRODUCT(8, 14, 15, 27)
      LOWBIT_PRODUCT(9, 14, 16, 28) LOWBIT_PRODUCT(10, 14, 17, 29) LOWBIT_PRODUCT(11, 14, 18, 30)
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(rounds)
      :
      : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
        "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24",
        "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30");
}
#undef LOWBIT_PRODUCT

// vpdpbusd: 16 filters x 4 bytes.
#define LOWBIT_PRODUCT(sum, a, w) "vpdpbusd %%zmm" #w ", %%zmm" #a ", %%zmm" #sum "\n\t"

__attribute__((target("avx512f,avx512vnni"))) void Avx512Integers(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 16, 20) LOWBIT_PRODUCT(1, 16, 21) LOWBIT_PRODUCT(2, 16, 22) LOWBIT_PRODUCT(3, 16, 23)
      LOWBIT_PRODUCT(4, 17, 20) LOWBIT_PRODUCT(5, 17, 21) LOWBIT_PRODUCT(6, 17, 22) LOWBIT_PRODUCT(7, 17, 23)
      LOWBIT_PRODUCT(8, 18, 20) LOWBIT_PRODUCT(9, 18, 21) LOWBIT_PRODUCT(10, 18, 22) LOWBIT_PRODUCT(11, 18, 23)
      LOWBIT_PRODUCT(12, 19, 20) LOWBIT_PRODUCT(13, 19, 21) LOWBIT_PRODUCT(14, 19, 22) LOWBIT_PRODUCT(15, 19, 23)
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(rounds)
      :
      : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12",
        "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23");
}
#undef LOWBIT_PRODUCT

// vpshufb, vpaddb: 32 filters x 4 bits, from a table of what four bits of a pixel count.
#define LOWBIT_PRODUCT(sum, table, w, t)           \
  "vpshufb %%ymm" #w ", %%ymm" #table ", %%ymm" #t \
  "\n\t"                                           \
  "vpaddb %%ymm" #t ", %%ymm" #sum ", %%ymm" #sum "\n\t"

__attribute__((target("avx2"))) void Avx2Bits(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 8, 10, 12) LOWBIT_PRODUCT(1, 8, 11, 13) LOWBIT_PRODUCT(2, 9, 10, 14)
      LOWBIT_PRODUCT(3, 9, 11, 15) LOWBIT_PRODUCT(4, 8, 10, 12) LOWBIT_PRODUCT(5, 8, 11, 13)
      LOWBIT_PRODUCT(6, 9, 10, 14) LOWBIT_PRODUCT(7, 9, 11, 15)
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(rounds)
      :
      : "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
        "ymm13", "ymm14", "ymm15");
}
#undef LOWBIT_PRODUCT

// vpmaddwd, vpaddd: 8 filters x 2 numbers of 16 bits.
#define LOWBIT_PRODUCT(sum, a, w, t)            \
  "vpmaddwd %%ymm" #a ", %%ymm" #w ", %%ymm" #t \
  "\n\t"                                        \
  "vpaddd %%ymm" #t ", %%ymm" #sum ", %%ymm" #sum "\n\t"

__attribute__((target("avx2"))) void Avx2Integers(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 6, 8, 10) LOWBIT_PRODUCT(1, 6, 9, 11) LOWBIT_PRODUCT(2, 7, 8, 12) LOWBIT_PRODUCT(3, 7, 9, 13)
      LOWBIT_PRODUCT(4, 6, 8, 14) LOWBIT_PRODUCT(5, 7, 9, 15)
      "dec %0\n\t"
      "jnz 1b\n\t"
      "vzeroupper"
      : "+r"(rounds)
      :
      : "cc", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12",
        "ymm13", "ymm14", "ymm15");
}
#undef LOWBIT_PRODUCT

constexpr Row kRows[] = {
    {"avx512", {Avx512Bits, 12 * 16 * 32}, {Avx512Integers, 16 * 16 * 4}},
    {"avx2", {Avx2Bits, 8 * 32 * 4}, {Avx2Integers, 6 * 8 * 2}},
};

#elif defined(__aarch64__)

// eor, cnt, add in bytes: 4 filters x 32 bits.
#define LOWBIT_PRODUCT(sum, a, w, t)   \
  "eor v" #t ".16b, v" #a ".16b, v" #w \
  ".16b\n\t"                           \
  "cnt v" #t ".16b, v" #t              \
  ".16b\n\t"                           \
  "add v" #sum ".16b, v" #sum ".16b, v" #t ".16b\n\t"

void NeonBits(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 8, 10, 16) LOWBIT_PRODUCT(1, 8, 11, 17) LOWBIT_PRODUCT(2, 8, 12, 18)
      LOWBIT_PRODUCT(3, 8, 13, 19) LOWBIT_PRODUCT(4, 9, 10, 20) LOWBIT_PRODUCT(5, 9, 11, 21)
      LOWBIT_PRODUCT(6, 9, 12, 22) LOWBIT_PRODUCT(7, 9, 13, 23)
      "subs %0, %0, #1\n\t"
      "b.ne 1b"
      : "+r"(rounds)
      :
      : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v16", "v17",
        "v18", "v19", "v20", "v21", "v22", "v23");
}
#undef LOWBIT_PRODUCT

// smlal: 4 filters x 1 number of 16 bits.
#define LOWBIT_PRODUCT(sum, a, w) "smlal v" #sum ".4s, v" #a ".4h, v" #w ".4h\n\t"

void NeonIntegers(int64_t rounds) {
  __asm__ volatile(
      "1:\n\t"  //
      LOWBIT_PRODUCT(0, 16, 18) LOWBIT_PRODUCT(1, 16, 19) LOWBIT_PRODUCT(2, 16, 20) LOWBIT_PRODUCT(3, 16, 21)
      LOWBIT_PRODUCT(4, 17, 18) LOWBIT_PRODUCT(5, 17, 19) LOWBIT_PRODUCT(6, 17, 20) LOWBIT_PRODUCT(7, 17, 21)
      "subs %0, %0, #1\n\t"
      "b.ne 1b"
      : "+r"(rounds)
      :
      : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v16", "v17", "v18", "v19", "v20", "v21");
}
#undef LOWBIT_PRODUCT

constexpr Row kRows[] = {{"neon", {NeonBits, 8 * 4 * 32}, {NeonIntegers, 8 * 4}}};

#else

constexpr Row kRows[] = {{"", {nullptr, 0}, {nullptr, 0}}};

#endif

double Seconds(const Loop& loop, int64_t rounds) {
  const auto start = std::chrono::steady_clock::now();
  loop.run(rounds);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Slices far shorter than a scheduler's, so that one of them is undisturbed even on a shared core.
Speed Measure(const Loop& loop, double seconds) {
  constexpr double kSlice = 1e-4;
  int64_t rounds = 1024;
  while (Seconds(loop, rounds) < kSlice) rounds *= 2;
  const double work = double(loop.macs * rounds);
  double spent = 0, done = 0, best = 0;
  do {
    const double took = Seconds(loop, rounds);
    best = std::max(best, work / took);
    spent += took;
    done += work;
  } while (spent < seconds);
  return {best, done / spent};
}

}  // namespace

std::optional<Peak> MeasurePeak(const std::string& isa, double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds must be above 0 and at most 60");
  const uint32_t features = CpuFeatures();
  const std::string name = SelectKernels(isa, features).isa;  // refuses what this CPU can't run
  for (const Row& row : kRows) {
    if (row.isa == name) return Peak{Measure(row.bits, seconds / 2), Measure(row.integers, seconds / 2)};
  }
  return std::nullopt;
}

}  // namespace lowbit
