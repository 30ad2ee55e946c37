// The number system, the C++ twin of src/lowbit/bits.py: kinds of codes and the integers they stand for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "lowbit/engine.h"

namespace lowbit {

inline const char* KindName(Kind kind) {
  constexpr const char* kNames[] = {"bipolar", "signed", "unsigned", "table"};
  return kNames[int(kind)];
}

// Throws std::invalid_argument where `codes` is no type of docs/OPS.md.
inline void CheckCodes(const Codes& codes) {
  const int lowest = codes.kind == Kind::kSigned ? 2 : 1;
  const int highest = codes.kind == Kind::kTable ? 4 : 8;
  if (codes.bits < lowest || codes.bits > highest) {
    throw std::invalid_argument(std::string(KindName(codes.kind)) + " codes have " + std::to_string(lowest) + " to " +
                                std::to_string(highest) + " bits, not " + std::to_string(codes.bits));
  }
  const auto& t = codes.table;
  if (codes.kind != Kind::kTable) {
    if (!t.empty()) throw std::invalid_argument("only table codes have a table");
    return;
  }
  if (t.size() != size_t(1) << codes.bits) throw std::invalid_argument("a table has 2^bits integers");
  for (size_t i = 0; i < t.size(); ++i) {
    if (t[i] < -127 || t[i] > 127 || (i > 0 && t[i] <= t[i - 1])) {
      throw std::invalid_argument("a table holds ascending integers in -127..127");
    }
  }
}

inline int LowestCode(const Codes& codes) {
  switch (codes.kind) {
    case Kind::kBipolar: return -((1 << codes.bits) - 1);
    case Kind::kSigned: return -(1 << (codes.bits - 1));
    case Kind::kUnsigned: return 0;
    case Kind::kTable: return codes.table.front();
  }
  return 0;
}

inline int HighestCode(const Codes& codes) {
  switch (codes.kind) {
    case Kind::kBipolar: return (1 << codes.bits) - 1;
    case Kind::kSigned: return (1 << (codes.bits - 1)) - 1;
    case Kind::kUnsigned: return (1 << codes.bits) - 1;
    case Kind::kTable: return codes.table.back();
  }
  return 0;
}

inline bool HasCode(const Codes& codes, int value) {
  if (codes.kind == Kind::kTable) return std::find(codes.table.begin(), codes.table.end(), value) != codes.table.end();
  if (value < LowestCode(codes) || value > HighestCode(codes)) return false;
  return codes.kind != Kind::kBipolar || (value & 1) != 0;
}

// Whether all of `values` are codes. Without a branch for each of them: files hold millions.
inline bool HasCodes(const Codes& codes, const std::vector<int16_t>& values) {
  if (codes.kind == Kind::kTable) {
    return std::all_of(values.begin(), values.end(), [&](int v) { return HasCode(codes, v); });
  }
  const int16_t low = int16_t(LowestCode(codes)), high = int16_t(HighestCode(codes));
  const int16_t odd = codes.kind == Kind::kBipolar;
  int16_t outside = 0;
  for (int16_t v : values) outside |= int16_t((v < low) | (v > high) | ((v & odd) ^ odd));
  return outside == 0;
}

// True where one code is one bit, +1 or -1: what the popcount kernels take.
inline bool IsSign(const Codes& codes) { return codes.kind == Kind::kBipolar && codes.bits == 1; }
inline bool IsBit(const Codes& codes) { return codes.kind == Kind::kUnsigned && codes.bits == 1; }  // 0 or 1

}  // namespace lowbit
