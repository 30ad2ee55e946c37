// Builder: every rule of docs/OPS.md checked once more, on this side of the border.
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "codes.h"
#include "kernels/kernels.h"
#include "network.h"

namespace lowbit {
namespace {

constexpr int kMaxKernel = 11;
constexpr int kMaxStep = 8;
constexpr int64_t kMaxSide = 1 << 16;
constexpr int64_t kMaxElements = int64_t{1} << 31;  // of one value, per image

std::string Text(const Shape& s) {
  const std::string c = std::to_string(s.channels);
  return s.image ? std::to_string(s.height) + "x" + std::to_string(s.width) + "x" + c : c;
}

const char* Text(Dtype dtype) {
  constexpr const char* kNames[] = {"codes", "int32", "float32", "float16"};
  return kNames[int(dtype)];
}

[[noreturn]] void Fail(const std::string& node, const std::string& what) {
  throw std::invalid_argument(node + ": " + what);
}

bool IsReal(const ValueType& t) { return t.dtype == Dtype::kFloat32 || t.dtype == Dtype::kFloat16; }

class Rule {
 public:
  Rule(Network& network, const std::string& name, Op op, std::vector<Value> inputs) : network_(network) {
    node_.op = op;
    node_.name = name;
    node_.inputs = std::move(inputs);
    if (name.empty()) Fail("(a node)", "the name is empty");
    if (network.finished) Fail(name, "nothing may follow the output");
    if ((op == Op::kInput) != network.nodes.empty()) Fail(name, "a network has one input, its first node");
    for (const Node& other : network.nodes) {
      if (other.name == name) Fail(name, "the name is used twice");
    }
    for (Value x : node_.inputs) {
      if (x < 0 || size_t(x) >= network.nodes.size()) Fail(name, "an input is no earlier value");
      const bool zero_point_fits =
          op == Op::kConv || op == Op::kLinear || op == Op::kMul || op == Op::kFlatten || op == Op::kOutput;
      if (!type(x).zero_point.empty() && !zero_point_fits) {
        Fail(name, "pixels with a zero point go to conv2d, linear, mul or flatten only");
      }
    }
    if (!node_.inputs.empty()) node_.type.shape = type(node_.inputs[0]).shape;
  }

  Node& node() { return node_; }
  const ValueType& type(Value x) const { return network_.nodes[size_t(x)].type; }
  const ValueType& in() const { return type(node_.inputs[0]); }
  [[noreturn]] void fail(const std::string& what) const { Fail(node_.name, what); }

  void Real(Value x) const {
    if (!IsReal(type(x))) fail(std::string("takes float32 or float16, got ") + Text(type(x).dtype));
  }
  void Image() const {
    if (!in().shape.image) fail("takes an image (H, W, C), got (" + Text(in().shape) + ")");
  }
  void RealOrCodes() const {
    if (in().dtype == Dtype::kInt32) fail("takes codes, float32 or float16, got int32");
  }
  void Constant(std::vector<float> values) {
    const size_t channels = size_t(in().shape.channels);
    if (values.size() != 1 && values.size() != channels) {
      fail("the constant has " + std::to_string(values.size()) + " numbers for " + std::to_string(channels) +
           " channels");
    }
    for (float v : values) Finite(v);
    if (values.size() == 1) values.assign(channels, values[0]);
    node_.constant = std::move(values);
  }
  void Finite(float v) const {
    if (!std::isfinite(v)) fail("a constant is infinite or NaN");
  }

  // The output size of a sliding window; checks its attributes.
  void Slide(std::array<int, 2> kernel, const Geometry& g) {
    Image();
    int64_t out[2];
    const int64_t size[2] = {in().shape.height, in().shape.width};
    for (size_t i = 0; i < 2; ++i) {
      if (kernel[i] < 1 || kernel[i] > kMaxKernel) fail("kernels are 1.." + std::to_string(kMaxKernel) + " a side");
      if (g.stride[i] < 1 || g.stride[i] > kMaxStep) fail("strides are 1.." + std::to_string(kMaxStep));
      if (g.dilation[i] < 1 || g.dilation[i] > kMaxStep) fail("dilations are 1.." + std::to_string(kMaxStep));
      const int extent = (kernel[i] - 1) * g.dilation[i] + 1;
      const int before = g.padding[i], after = g.padding[i + 2];
      if (before < 0 || after < 0 || before >= extent || after >= extent)
        fail("the padding is not less than the kernel's extent");
      if (size[i] + before + after < extent) fail("the kernel's extent is larger than the padded input");
      out[i] = (size[i] + before + after - extent) / g.stride[i] + 1;
    }
    node_.kernel = kernel;
    node_.geometry = g;
    node_.type.shape.height = out[0];
    node_.type.shape.width = out[1];
  }

  // Weights, already 4-D, for `channels` inputs in node().groups groups; gives dtype and channels of the result.
  void Product(Weights w, int64_t channels, Offsets offsets) {
    const auto& s = w.shape;
    int64_t count = 1;
    for (int64_t side : s) {
      if (side < 1 || side > kMaxElements / count) fail("a side of the weight is out of range");
      count *= side;
    }
    const int groups = node_.groups;
    if (groups < 1 || channels % groups || s[0] % groups) fail("groups must divide the input and output channels");
    if (s[3] * groups != channels)
      fail("the weight does not fit the input's " + std::to_string(channels) + " channels");
    if (int64_t(w.integer ? w.codes.size() : w.numbers.size()) != count)
      fail("the weight's size does not fit its shape");
    if (w.integer) {
      CheckType(w.type);
      if (!HasCodes(w.type, w.codes)) fail("a weight is outside its kind of codes");
    } else {
      for (float v : w.numbers) Finite(v);
    }
    node_.type.shape.channels = s[0];
    node_.type.dtype = w.integer && in().dtype == Dtype::kCodes ? Dtype::kInt32 : Dtype::kFloat32;
    const bool with_offset = !offsets.input.empty() || !offsets.weight.empty();
    if (node_.type.dtype == Dtype::kInt32) {
      CheckAccumulator(w);
      if (with_offset) Offset(w, std::move(offsets));
    } else if (with_offset) {
      fail("offsets are for codes with code weights");
    }
    node_.weights = std::move(w);
  }

  void CheckType(const Codes& codes) const {
    try {
      CheckCodes(codes);
    } catch (const std::invalid_argument& e) {
      fail(e.what());
    }
  }

  Value Done() {
    Shape& s = node_.type.shape;
    const int64_t limit = kMaxElements;
    if (s.height < 1 || s.width < 1 || s.channels < 1 || s.height > limit / s.width ||
        s.height * s.width > limit / s.channels) {
      fail("a value of " + Text(s) + " is too large");
    }
    network_.nodes.push_back(std::move(node_));
    return Value(network_.nodes.size() - 1);
  }

 private:
  // The largest |code| of the input.
  int64_t LargestCode() const {
    const ValueType& x = in();
    int lowest = LowestCode(x.codes), highest = HighestCode(x.codes);
    if (!x.zero_point.empty()) {
      lowest -= *std::max_element(x.zero_point.begin(), x.zero_point.end());
      highest -= *std::min_element(x.zero_point.begin(), x.zero_point.end());
    }
    return std::max(-lowest, highest);
  }

  void Offset(const Weights& w, Offsets offsets) {
    const size_t filters = size_t(w.shape[0]);
    if (offsets.input.size() > 1) fail("input_offset is one number, got " + std::to_string(offsets.input.size()));
    if (offsets.weight.size() > 1 && offsets.weight.size() != filters) {
      fail("weight_offset has " + std::to_string(offsets.weight.size()) + " numbers for " + std::to_string(filters) +
           " channels");
    }
    for (float v : offsets.input) Finite(v);
    for (float v : offsets.weight) Finite(v);
    if (!offsets.weight.empty()) {
      const int64_t reach = int64_t(w.codes.size() / filters) * LargestCode();
      if (reach > std::numeric_limits<int32_t>::max()) {
        fail("the sum of the input could reach " + std::to_string(reach) + ", beyond 32 bits");
      }
    }
    if (offsets.weight.size() == 1) offsets.weight.assign(filters, offsets.weight[0]);
    node_.offsets = std::move(offsets);
    node_.type.dtype = Dtype::kFloat32;
  }

  void CheckAccumulator(const Weights& w) const {
    const int64_t largest = LargestCode();
    const size_t per_filter = w.codes.size() / size_t(w.shape[0]);
    for (size_t o = 0; o < size_t(w.shape[0]); ++o) {
      int64_t total = 0;
      for (size_t k = 0; k < per_filter; ++k) total += std::abs(int(w.codes[o * per_filter + k]));
      if (total * largest > std::numeric_limits<int32_t>::max()) {
        fail("the accumulator could reach " + std::to_string(total * largest) + ", beyond 32 bits");
      }
    }
  }

  Network& network_;
  Node node_;
};

Shape InputShape(const std::string& name, const std::vector<int64_t>& shape) {
  if (shape.size() != 1 && shape.size() != 3) Fail(name, "the input's shape must be (H, W, C) or (C,)");
  for (int64_t side : shape) {
    if (side < 1 || side > kMaxSide) Fail(name, "a side of the input is 1.." + std::to_string(kMaxSide));
  }
  return shape.size() == 1 ? Shape{1, 1, shape[0], false} : Shape{shape[0], shape[1], shape[2], true};
}

}  // namespace

Builder::Builder() : network_(std::make_shared<Network>()) {}
Builder::~Builder() = default;
Builder::Builder(Builder&&) noexcept = default;
Builder& Builder::operator=(Builder&&) noexcept = default;

const ValueType& Builder::type(Value x) const { return network_->nodes.at(size_t(x)).type; }

Value Builder::InputUint8(const std::string& name, const std::vector<int64_t>& shape,
                          const std::vector<int>& zero_point) {
  Rule r(*network_, name, Op::kInput, {});
  ValueType& t = r.node().type;
  t = {Dtype::kCodes, InputShape(name, shape), {Kind::kUnsigned, 8, {}}, {}};
  if (int64_t(zero_point.size()) != t.shape.channels) r.fail("one zero point per channel is needed");
  bool any = false;
  for (int z : zero_point) {
    if (z < 0 || z > 255) r.fail("a zero point is 0..255");
    any |= z != 0;
  }
  if (any) t.zero_point = zero_point;
  return r.Done();
}

Value Builder::InputFloat32(const std::string& name, const std::vector<int64_t>& shape) {
  Rule r(*network_, name, Op::kInput, {});
  r.node().type = {Dtype::kFloat32, InputShape(name, shape), {}, {}};
  return r.Done();
}

Value Builder::Quantize(const std::string& name, Value x, const Codes& codes, float reciprocal) {
  Rule r(*network_, name, Op::kQuantize, {x});
  r.Real(x);
  r.CheckType(codes);
  if (codes.kind == Kind::kTable) r.fail("table codes are for weights only");
  if (codes.kind == Kind::kBipolar && codes.bits != 1) r.fail("bipolar activations have 1 bit");
  if (codes.kind != Kind::kBipolar && !(std::isfinite(reciprocal) && reciprocal > 0))
    r.fail("the reciprocal must be positive");
  r.node().type.dtype = Dtype::kCodes;
  r.node().type.codes = codes;
  r.node().reciprocal = reciprocal;
  return r.Done();
}

Value Builder::Conv2d(const std::string& name, Value x, Weights weights, const Geometry& geometry, int groups,
                      Offsets offsets) {
  Rule r(*network_, name, Op::kConv, {x});
  r.RealOrCodes();
  if (weights.shape.size() != 4) r.fail("the weight must be (O, kH, kW, I)");
  r.node().groups = groups;
  for (size_t i = 1; i < 3; ++i) {
    if (weights.shape[i] < 1 || weights.shape[i] > kMaxKernel)
      r.fail("kernels are 1.." + std::to_string(kMaxKernel) + " a side");
  }
  r.Slide({int(weights.shape[1]), int(weights.shape[2])}, geometry);
  r.Product(std::move(weights), r.in().shape.channels, std::move(offsets));
  return r.Done();
}

Value Builder::Linear(const std::string& name, Value x, Weights weights, Offsets offsets) {
  Rule r(*network_, name, Op::kLinear, {x});
  r.RealOrCodes();
  if (r.in().shape.image) r.fail("takes a vector (C,), got (" + Text(r.in().shape) + "); flatten images first");
  if (weights.shape.size() != 2) r.fail("the weight must be (O, I)");
  weights.shape = {weights.shape[0], 1, 1, weights.shape[1]};
  r.Product(std::move(weights), r.in().shape.channels, std::move(offsets));
  return r.Done();
}

Value Builder::Mul(const std::string& name, Value x, std::vector<float> factor) {
  Rule r(*network_, name, Op::kMul, {x});
  r.Constant(std::move(factor));
  return r.Done();
}

Value Builder::Add(const std::string& name, Value x, std::vector<float> term) {
  Rule r(*network_, name, Op::kAddConst, {x});
  r.Real(x);
  r.Constant(std::move(term));
  return r.Done();
}

Value Builder::Add(const std::string& name, Value x, Value y) {
  Rule r(*network_, name, Op::kAddValue, {x, y});
  r.Real(x);
  r.Real(y);
  if (r.type(x).shape != r.type(y).shape)
    r.fail("adds values of one shape, got " + Text(r.type(x).shape) + " and " + Text(r.type(y).shape));
  return r.Done();
}

Value Builder::Prelu(const std::string& name, Value x, std::vector<float> slope) {
  Rule r(*network_, name, Op::kPrelu, {x});
  r.Real(x);
  r.Constant(std::move(slope));
  return r.Done();
}

Value Builder::Relu(const std::string& name, Value x) {
  Rule r(*network_, name, Op::kRelu, {x});
  r.Real(x);
  return r.Done();
}

Value Builder::Clip(const std::string& name, Value x, float low, float high) {
  Rule r(*network_, name, Op::kClip, {x});
  r.Real(x);
  r.Finite(low);
  r.Finite(high);
  if (low > high) r.fail("low is above high");
  r.node().low = low;
  r.node().high = high;
  return r.Done();
}

Value Builder::Cast(const std::string& name, Value x, Dtype dtype) {
  Rule r(*network_, name, Op::kCast, {x});
  r.Real(x);
  if (dtype != Dtype::kFloat32 && dtype != Dtype::kFloat16) r.fail("casts to float16 or float32");
  r.node().type.dtype = dtype;
  return r.Done();
}

Value Builder::MaxPool(const std::string& name, Value x, std::array<int, 2> kernel, const Geometry& geometry) {
  Rule r(*network_, name, Op::kMaxPool, {x});
  r.RealOrCodes();
  const Shape shape = r.in().shape;
  r.node().type = r.in();
  r.node().type.shape = shape;
  if (geometry.dilation != std::array<int, 2>{1, 1}) r.fail("pools have no dilation");
  r.Slide(kernel, geometry);
  return r.Done();
}

Value Builder::AvgPool(const std::string& name, Value x, std::array<int, 2> kernel, const Geometry& geometry,
                       bool count_include_pad) {
  Rule r(*network_, name, Op::kAvgPool, {x});
  r.RealOrCodes();
  if (geometry.dilation != std::array<int, 2>{1, 1}) r.fail("pools have no dilation");
  r.Slide(kernel, geometry);
  r.node().count_include_pad = count_include_pad;
  return r.Done();
}

Value Builder::GlobalAvgPool(const std::string& name, Value x) {
  Rule r(*network_, name, Op::kGlobalAvgPool, {x});
  r.RealOrCodes();
  r.Image();
  r.node().type.shape = {1, 1, r.in().shape.channels, true};
  return r.Done();
}

Value Builder::PixelShuffle(const std::string& name, Value x, int factor) {
  Rule r(*network_, name, Op::kPixelShuffle, {x});
  r.Image();
  r.node().type = r.in();
  Shape& s = r.node().type.shape;
  if (factor < 1 || factor > kMaxStep || s.channels % (factor * factor))
    r.fail("the factor squared must divide the channels");
  s.height *= factor;
  s.width *= factor;
  s.channels /= factor * factor;
  r.node().factor = factor;
  return r.Done();
}

Value Builder::ResizeBicubic(const std::string& name, Value x, int factor) {
  Rule r(*network_, name, Op::kResizeBicubic, {x});
  r.Image();
  if (r.in().dtype != Dtype::kFloat32) r.fail(std::string("takes float32, got ") + Text(r.in().dtype));
  if (factor < 2 || factor > kMaxResize) r.fail("enlarges by 2.." + std::to_string(kMaxResize));
  r.node().type = r.in();
  r.node().type.shape.height *= factor;
  r.node().type.shape.width *= factor;
  r.node().factor = factor;
  return r.Done();
}

Value Builder::Concat(const std::string& name, const std::vector<Value>& inputs) {
  if (inputs.size() < 2) Fail(name, "joins two values or more");
  Rule r(*network_, name, Op::kConcat, inputs);
  r.node().type = r.in();
  int64_t channels = 0;
  for (Value x : inputs) {
    const ValueType& t = r.type(x);
    Shape same = t.shape;
    same.channels = r.in().shape.channels;
    if (t.dtype != r.in().dtype || t.codes != r.in().codes || same != r.in().shape)
      r.fail("joins values of one type and size");
    channels += t.shape.channels;
  }
  r.node().type.shape.channels = channels;
  return r.Done();
}

Value Builder::Flatten(const std::string& name, Value x) {
  Rule r(*network_, name, Op::kFlatten, {x});
  r.Image();
  r.node().type = r.in();
  const Shape& s = r.in().shape;
  r.node().type.shape = {1, 1, s.height * s.width * s.channels, false};
  const std::vector<int>& z = r.in().zero_point;
  for (int64_t i = 1; !z.empty() && i < s.height * s.width; ++i) {
    r.node().type.zero_point.insert(r.node().type.zero_point.end(), z.begin(), z.end());
  }
  return r.Done();
}

Value Builder::Output(const std::string& name, Value x) {
  Rule r(*network_, name, Op::kOutput, {x});
  r.node().type = r.in();
  const Value out = r.Done();
  network_->finished = true;
  std::vector<bool> used(network_->nodes.size());
  for (const Node& node : network_->nodes) {
    for (Value i : node.inputs) used[size_t(i)] = true;
  }
  for (size_t i = 0; i + 1 < used.size(); ++i) {
    if (!used[i]) Fail(network_->nodes[i].name, "its value is used by no node");
  }
  return out;
}

}  // namespace lowbit
