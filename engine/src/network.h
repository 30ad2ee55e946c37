// What a Builder has collected: checked nodes in order.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "lowbit/engine.h"

namespace lowbit {

enum class Op : uint8_t {
  kInput,
  kQuantize,
  kConv,
  kLinear,
  kMul,
  kAddConst,
  kAddValue,
  kPrelu,
  kRelu,
  kClip,
  kCast,
  kMaxPool,
  kAvgPool,
  kGlobalAvgPool,
  kPixelShuffle,
  kResizeBicubic,
  kConcat,
  kFlatten,
  kOutput,
};

struct Node {
  Op op;
  std::string name;
  std::vector<Value> inputs;
  ValueType type;
  Weights weights;              // as 4-D, for linear too
  Offsets offsets;              // of a product of codes: the weight's are one per channel
  std::vector<float> constant;  // factor, term or slope: one per channel
  Geometry geometry;
  std::array<int, 2> kernel = {1, 1};
  int groups = 1;
  int factor = 1;
  bool count_include_pad = true;
  float reciprocal = 1, low = 0, high = 0;
};

struct Network {
  std::vector<Node> nodes;
  bool finished = false;  // the output is there
};

// The network without the numbers of its weights and constants, most of its memory.
inline Network WithoutConstants(const Network& network) {
  Network out{{}, network.finished};
  for (const Node& n : network.nodes) {
    Weights shape_only{n.weights.shape, n.weights.integer, n.weights.type, {}, {}};
    out.nodes.push_back({n.op,
                         n.name,
                         n.inputs,
                         n.type,
                         std::move(shape_only),
                         {},
                         {},
                         n.geometry,
                         n.kernel,
                         n.groups,
                         n.factor,
                         n.count_include_pad,
                         n.reciprocal,
                         n.low,
                         n.high});
  }
  return out;
}

}  // namespace lowbit
