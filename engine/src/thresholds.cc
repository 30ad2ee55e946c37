#include "thresholds.h"

#include <cmath>
#include <limits>

#include "half.h"

namespace lowbit {
namespace {

// One channel's float steps at one accumulator: the very expression the epilogue computes. `finite` turns false where a
// value overflows.
float Evaluate(const std::vector<EpilogueStep>& steps, size_t channel, int32_t acc, bool& finite) {
  float v = float(acc);
  for (const EpilogueStep& s : steps) {
    switch (s.step) {
      case Step::kMul: v = v * s.constant[channel]; break;
      case Step::kAdd: v = v + s.constant[channel]; break;
      case Step::kPrelu: v = v < 0 ? v * s.constant[channel] : v; break;
      case Step::kRelu: v = v > 0 ? v : 0.0f; break;
      case Step::kClip: v = v < s.low ? s.low : (v > s.high ? s.high : v); break;
      case Step::kRoundHalf: v = HalfToFloat(FloatToHalf(v)); break;
      default: break;
    }
    finite = finite && std::isfinite(v);
  }
  return v;
}

}  // namespace

// Why a bisection is exact. Every allowed step is monotone as a function on float32, because rounding to nearest is:
// int32 -> float32, times a constant (rising for a positive factor, falling for a negative one, constant zero for 0),
// plus a constant, prelu with slope >= 0, relu, clip, rounding to float16. A chain of them is monotone, so the bit !(v
// < 0) changes at most once over low..high, and comparing the bits at both ends says in which direction; bisecting the
// very expression finds the first accumulator with the new bit. -b/a would round differently. Values in between stay
// between those at the ends step by step, so ends that are finite prove that no infinity (which times 0 would give NaN)
// arises anywhere. A prelu with a negative slope is not monotone: nothing is returned.
std::optional<Threshold> FindThreshold(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low,
                                       int32_t high) {
  for (const EpilogueStep& s : steps) {
    switch (s.step) {
      case Step::kPrelu:
        if (s.constant[channel] < 0) return std::nullopt;
        break;
      case Step::kMul:
      case Step::kAdd:
      case Step::kRelu:
      case Step::kClip:
      case Step::kRoundHalf:
      case Step::kStoreBits:
      case Step::kStoreHalfBits: break;
      default: return std::nullopt;
    }
  }
  bool finite = true;
  const auto bit = [&](int64_t acc) { return !(Evaluate(steps, channel, int32_t(acc), finite) < 0); };
  const bool at_low = bit(low), at_high = bit(high);
  if (!finite) return std::nullopt;
  // Constant: a limit that every accumulator reaches.
  if (at_low == at_high) return Threshold{std::numeric_limits<int32_t>::min(), !at_low};
  int64_t before = low, after = high;
  while (after - before > 1) {
    const int64_t middle = before + (after - before) / 2;
    (bit(middle) == at_high ? after : before) = middle;
  }
  return Threshold{int32_t(after), at_low};
}

}  // namespace lowbit
