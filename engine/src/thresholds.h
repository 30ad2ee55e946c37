// Integer thresholds in place of float steps.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/kernels.h"

namespace lowbit {

struct Threshold {
  int32_t limit;  // bit = (acc >= limit) xor flip
  bool flip;
};

// The threshold of one channel of `steps` (float steps, then a store of bits) over accumulators low..high, or nothing
// where those steps are not monotone or leave the finite numbers.
std::optional<Threshold> FindThreshold(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low,
                                       int32_t high);

// How often a code goes up: its number of limits that (acc xor flip) is at least, from the lowest code on.
struct Levels {
  std::vector<int32_t> limits;  // INT32_MIN: always reached, INT32_MAX: never
  int32_t flip;                 // 0, or -1 where codes fall as accumulators rise
};

// The same for `steps` that end with kQuantU8.
std::optional<Levels> FindLevels(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low, int32_t high);

}  // namespace lowbit
