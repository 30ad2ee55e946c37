#include "thresholds.h"

#include <algorithm>
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

// Why a bisection is exact. Every allowed step is monotone as a function on float32, because rounding to nearest is:
// int32 -> float32, times a constant (rising for a positive factor, falling for a negative one, constant zero for 0),
// plus a constant, prelu with slope >= 0, relu, clip, rounding to float16. A chain of them is monotone, so the bit !(v
// < 0) changes at most once over low..high, and comparing the bits at both ends says in which direction; bisecting the
// very expression finds the first accumulator with the new bit. -b/a would round differently. Values in between stay
// between those at the ends step by step, so ends that are finite prove that no infinity (which times 0 would give NaN)
// arises anywhere. A prelu with a negative slope is not monotone.
bool Monotone(const std::vector<EpilogueStep>& steps, size_t channel) {
  for (const EpilogueStep& s : steps) {
    switch (s.step) {
      case Step::kPrelu:
        if (s.constant[channel] < 0) return false;
        break;
      case Step::kMul:
      case Step::kAdd:
      case Step::kRelu:
      case Step::kClip:
      case Step::kRoundHalf:
      case Step::kStoreBits:
      case Step::kStoreHalfBits:
      case Step::kCodeBits:
      case Step::kCodeHalfBits:
      case Step::kQuantU8: break;
      default: return false;
    }
  }
  return true;
}

// The first of low..high where `as_high` holds, which it does not at low and does at high.
template <typename AsHigh>
int32_t FirstAsHigh(int64_t low, int64_t high, AsHigh as_high) {
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (as_high(int32_t(middle)) ? high : low) = middle;
  }
  return int32_t(high);
}

}  // namespace

std::optional<Threshold> FindThreshold(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low,
                                       int32_t high) {
  if (!Monotone(steps, channel)) return std::nullopt;
  bool finite = true;
  const EpilogueStep& last = steps.back();
  const bool is_sign = last.step == Step::kStoreBits || last.step == Step::kStoreHalfBits;
  const auto bit = [&](int32_t acc) {
    const float v = Evaluate(steps, channel, acc, finite);
    return is_sign ? !(v < 0) : v * last.scale > 0.5f;
  };
  const bool at_low = bit(low), at_high = bit(high);
  if (!finite) return std::nullopt;
  // Constant: a limit that every accumulator reaches.
  if (at_low == at_high) return Threshold{std::numeric_limits<int32_t>::min(), !at_low};
  return Threshold{FirstAsHigh(low, high, [&](int32_t acc) { return bit(acc) == at_high; }), at_low};
}

// The clamp and rint of the quantizer are monotone as well, so each "code is at least k" is a bit like the one above.
std::optional<Levels> FindLevels(const std::vector<EpilogueStep>& steps, size_t channel, int32_t low, int32_t high) {
  if (!Monotone(steps, channel)) return std::nullopt;
  const EpilogueStep& q = steps.back();
  bool finite = true;
  const auto code = [&](int32_t acc) {
    const float v = Evaluate(steps, channel, acc, finite) * q.scale;
    return int(std::nearbyint(std::min(q.high, std::max(q.low, v))));
  };
  const int at_low = code(low), at_high = code(high);
  if (!finite) return std::nullopt;
  const bool falls = at_high < at_low;
  Levels out{{}, falls ? -1 : 0};
  for (int k = int(q.low) + 1; k <= int(q.high); ++k) {
    if ((at_low >= k) == (at_high >= k)) {
      out.limits.push_back(at_low >= k ? std::numeric_limits<int32_t>::min() : std::numeric_limits<int32_t>::max());
      continue;
    }
    const int32_t first = FirstAsHigh(low, high, [&](int32_t acc) { return (code(acc) >= k) == (at_high >= k); });
    out.limits.push_back(falls ? ~(first - 1) : first);
  }
  return out;
}

}  // namespace lowbit
