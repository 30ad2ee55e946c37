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

// The threshold of one channel of `steps` (float steps, then kStoreBits) over accumulators low..high, or nothing where
// those steps are not monotone or leave the finite numbers.
std::optional<Threshold> FindThreshold(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low,
                                       int32_t high);

}  // namespace lowbit
