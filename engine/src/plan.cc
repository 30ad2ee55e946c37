#include "plan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <numeric>
#include <stdexcept>
#include <tuple>

#include "codes.h"
#include "thresholds.h"

namespace lowbit {
namespace {

constexpr int64_t kTileBytes = 16 << 10;  // accumulators between a producer and its epilogue: stay in L1
constexpr int64_t kTableRows = 1 << 20;   // rows of tables: stay in L2
constexpr int64_t kTableStrip = 14, kTableStripBytes = 40 << 10;
constexpr int64_t kLineRows = 1 << 20;     // rows of planes: stay in L2
constexpr int64_t kPatchBytes = 64 << 10;  // im2col of one tile: stay in L2
constexpr int64_t kFlatPixels = 960;       // of a tile of one channel: whole blocks enlarged by 2, 3 or 4

Rep Natural(const ValueType& t) {
  switch (t.dtype) {
    case Dtype::kCodes: return Rep::kS16;
    case Dtype::kInt32: return Rep::kI32;
    case Dtype::kFloat32: return Rep::kF32;
    case Dtype::kFloat16: return Rep::kF16;
  }
  return Rep::kF32;
}

// Which filter taps of one axis lie inside the image, for every output position; equal sets share a class. This is the
// real geometry: nothing is assumed about how the kernel, the padding and the image compare, and a class may have no
// tap at all.
struct Axis {
  std::vector<int32_t> class_of;         // output position -> class
  std::vector<std::vector<bool>> valid;  // class -> tap -> inside
};

Axis Classes(int64_t out, int64_t in, int kernel, int stride, int dilation, int before) {
  Axis axis;
  std::map<std::vector<bool>, int32_t> known;
  for (int64_t o = 0; o < out; ++o) {
    std::vector<bool> valid;
    for (int k = 0; k < kernel; ++k) {
      const int64_t at = o * stride - before + int64_t(k) * dilation;
      valid.push_back(at >= 0 && at < in);
    }
    const auto [it, fresh] = known.emplace(valid, int32_t(axis.valid.size()));
    if (fresh) axis.valid.push_back(valid);
    axis.class_of.push_back(it->second);
  }
  return axis;
}

class Planner {
 public:
  Planner(const Network& network, const Kernels& kernels) : nodes_(network.nodes), kernels_(kernels) {
    if (!network.finished) throw std::invalid_argument("the network has no output yet");
    consumers_.resize(nodes_.size());
    done_.resize(nodes_.size());
    flat_codes_.resize(nodes_.size());
    for (size_t n = 0; n < nodes_.size(); ++n) {
      for (Value x : nodes_[n].inputs) {
        auto& list = consumers_[size_t(x)];
        if (list.empty() || list.back() != Value(n)) list.push_back(Value(n));
      }
    }
  }

  Plan Make() {
    for (size_t n = 0; n < nodes_.size(); ++n) {
      if (!done_[n]) Produce(Value(n));
    }
    Place();
    return std::move(plan_);
  }

 private:
  const Node& node(Value v) const { return nodes_[size_t(v)]; }
  const ValueType& type(Value v) const { return nodes_[size_t(v)].type; }

  // Popcount takes sign codes on both sides, or codes 0 and 1 by signs, in groups that own whole words. Of 0 and 1 it
  // makes twice the accumulator, which nothing but a factor may read.
  bool IsBitConv(const Node& n) const {
    if (n.op != Op::kConv && n.op != Op::kLinear) return false;
    const ValueType& x = type(n.inputs[0]);
    if (x.dtype != Dtype::kCodes || !n.weights.integer || !IsSign(n.weights.type)) return false;
    if (IsBit(x.codes)) {
      const auto& readers = consumers_[size_t(&n - nodes_.data())];
      if (!x.zero_point.empty() || !n.offsets.weight.empty() || !n.offsets.input.empty()) return false;
      if (node(n.inputs[0]).op == Op::kInput || readers.size() != 1 || node(readers[0]).op != Op::kMul) return false;
    } else if (!IsSign(x.codes)) {
      return false;
    }
    return n.groups == 1 || (n.weights.shape[3] % 32 == 0 && n.weights.shape[0] / n.groups % 32 == 0);
  }

  // Popcount of at most 16 channels, two neighbouring pixels at once.
  bool TakesHalves(const Node& n) const {
    return kernels_.half_threshold && n.groups == 1 && type(n.inputs[0]).shape.channels <= 16 &&
           n.geometry.stride[1] == 1 && n.offsets.weight.empty();
  }

  // Integers by integers, or floats by floats, in one group, with the columns of a window side by side in memory: it
  // can be read where it lies. Few channels in wide pixels would be mostly zeros.
  bool ReadsSource(const Node& n, Rep rep, int64_t pixel) const {
    if ((n.op != Op::kConv && n.op != Op::kLinear) || n.groups != 1 || IsBitConv(n)) return false;
    if (TakesLines(n)) return false;
    const ValueType& x = type(n.inputs[0]);
    const bool integer = n.weights.integer && x.dtype == Dtype::kCodes;
    if (rep == Rep::kU8) return true;
    if (rep != (integer ? Rep::kS16 : Rep::kF32)) return false;
    const int64_t channels = x.shape.channels;
    if (n.kernel[1] == 1) return true;
    return n.geometry.dilation[1] == 1 && (integer ? pixel < 2 * channels : pixel == channels);
  }

  // Codes and weights that fit a byte each, for kernels that have a product for them.
  bool TakesBytes(const Node& n) const {
    if (!kernels_.byte_gemm || n.op == Op::kInput || n.inputs.empty()) return false;
    const Value v = n.inputs[0];
    const ValueType& x = type(v);
    if (x.dtype != Dtype::kCodes || !n.offsets.weight.empty() || !n.weights.integer) return false;
    if (HighestCode(x.codes) - LowestCode(x.codes) > 255) return false;
    if (LowestCode(n.weights.type) < -128 || HighestCode(n.weights.type) > 127) return false;
    if (node(v).op != Op::kInput && !x.zero_point.empty()) return false;  // pixels that were flattened
    const int64_t c = x.shape.channels;
    return ReadsSource(n, Rep::kS16, node(v).op == Op::kInput || flat_codes_[size_t(v)] ? c : RoundUp(c, kLanes));
  }

  // Weights of 1 or 2 bits that are whole steps apart, and small codes: by tables where that takes less time. Figures
  // are nanoseconds a pixel on a Zen 5 core at 4 GHz.
  bool UsesTables(const Node& n) const {
    if (!kernels_.table_conv || !TakesBytes(n)) return false;
    const Codes& w = n.weights.type;
    const ValueType& x = type(n.inputs[0]);
    if (w.bits > 2 || (w.kind != Kind::kBipolar && w.kind != Kind::kSigned)) return false;
    if (node(n.inputs[0]).op == Op::kInput || flat_codes_[size_t(n.inputs[0])] || !x.zero_point.empty()) return false;
    const Shape &in = x.shape, &out = n.type.shape;
    if (out.height * out.width == 1) return false;
    const int most = HighestCode(x.codes) - LowestCode(x.codes);
    const int64_t groups = TableGroups(in.channels), taps = int64_t(n.kernel[0]) * n.kernel[1];
    if (2 * most * kTableChannels > 255 || 3 * groups * kTableChannels * most > 65535) return false;
    // Rows of tables that a window reaches over should stay in the second cache.
    const int64_t columns = (out.width - 1) * n.geometry.stride[1] + (n.kernel[1] - 1) * n.geometry.dilation[1] + 1;
    const int64_t rows = int64_t(n.kernel[0] - 1) * n.geometry.dilation[0] + 1;
    if (rows * columns * groups * kTableBytes > kTableRows) return false;
    const int64_t filters = n.weights.shape[0], sets = RoundUp(filters, kTableFilters) / kTableFilters;
    const double lookups = double(groups * taps * sets * w.bits), together = 255 / (kTableChannels * most);
    const double build = double(in.height * in.width) / double(out.height * out.width) * double(groups);
    const double tables = lookups * (0.19 + 0.2 / together) + build * 0.6 + double(sets) * 6;
    const double bytes = double(RoundUp(in.channels, 4) * taps * RoundUp(filters, kLanes)) / 480;
    return tables < bytes;
  }

  // Floats to so few filters that most lanes of a block of 16 would idle: pixels take the lanes.
  bool TakesLines(const Node& n) const {
    if (n.op != Op::kConv || n.groups != 1 || n.type.dtype != Dtype::kFloat32) return false;
    if (!n.offsets.input.empty() || !n.offsets.weight.empty()) return false;
    const Shape& out = n.type.shape;
    if (n.geometry.stride != std::array<int, 2>{1, 1}) return false;
    if (2 * RoundUp(out.width, kLanes) * out.channels > out.width * kLanes) return false;
    const int64_t rows = int64_t(n.kernel[0] - 1) * n.geometry.dilation[0] + 1;
    return rows * type(n.inputs[0]).shape.channels * PlaneStep(n) * 4 <= kLineRows;
  }

  static int64_t PlaneStep(const Node& n) {
    return RoundUp(n.type.shape.width, kLanes) + RoundUp(int64_t(n.kernel[1] - 1) * n.geometry.dilation[1], kLanes) +
           2 * kLanes;
  }

  static int64_t TableGroups(int64_t channels) { return RoundUp(channels, kTableChannels) / kTableChannels; }

  Rep Reads(Value consumer, Value v) const {
    if (IsBitConv(node(consumer))) return TakesHalves(node(consumer)) ? Rep::kHalfBits : Rep::kBits;
    if (!TakesBytes(node(consumer))) return Natural(type(v));
    // The input is stored once.
    const auto& all = consumers_[size_t(v)];
    const bool together =
        node(v).op != Op::kInput || std::all_of(all.begin(), all.end(), [&](Value c) { return TakesBytes(node(c)); });
    return together ? Rep::kU8 : Natural(type(v));
  }

  // --- buffers ---

  int Source(Value v, Rep rep) {
    const int buffer = stored_.at({v, rep});
    plan_.buffers[size_t(buffer)].last = int(plan_.steps.size());
    return buffer;
  }

  int NewBuffer(Value v, Rep rep, bool dense = false, bool flat = false) {
    Buffer b{v, rep, type(v).shape, 0};
    const int64_t c = b.shape.channels;
    const bool bits = rep == Rep::kBits || rep == Rep::kHalfBits;
    if (bits) b.low = LowestCode(type(v).codes);
    b.pixel = dense || flat ? c : rep == Rep::kHalfBits ? 1 : bits ? RoundUp(c, 32) / 32 : RoundUp(c, kLanes);
    for (Value consumer : consumers_[size_t(v)]) {
      const Node& n = node(consumer);
      if (bits ? !IsBitConv(n) : !ReadsSource(n, rep, b.pixel)) continue;
      for (size_t i = 0; i < 4; ++i) b.ring[i] = std::max(b.ring[i], n.geometry.padding[i]);
    }
    if (flat) b.fill = RoundUp(b.shape.width, kLanes) - b.shape.width;
    if (rep == Rep::kU8) {
      const ValueType& t = type(v);
      b.zero.assign(size_t(c), uint8_t(-LowestCode(t.codes)));
      if (!t.zero_point.empty()) std::copy(t.zero_point.begin(), t.zero_point.end(), b.zero.begin());
    }
    b.first = b.last = int(plan_.steps.size());
    plan_.buffers.push_back(b);
    const int id = int(plan_.buffers.size() - 1);
    stored_[{v, rep}] = id;
    return id;
  }

  // --- epilogues ---

  static EpilogueStep& Push(PlanStep& s, Step step) {
    s.epilogue.emplace_back();
    s.epilogue.back().step = step;
    return s.epilogue.back();
  }

  static const float* Constant(PlanStep& s, const std::vector<float>& values) {
    Aligned<float> padded(size_t(RoundUp(int64_t(values.size()), kLanes)));
    std::copy(values.begin(), values.end(), padded.data());
    s.constants.push_back(std::move(padded));
    return s.constants.back().data();
  }

  static void PushConstant(PlanStep& s, Step step, const std::vector<float>& values) {
    Push(s, step).constant =
        s.flat ? Constant(s, std::vector<float>(size_t(kFlatPixels), values[0])) : Constant(s, values);
  }

  EpilogueStep& PushSlot(PlanStep& s, Step step, int buffer) {
    EpilogueStep& e = Push(s, step);
    e.slot = int(s.slots.size());
    e.slot_step = plan_.buffers[size_t(buffer)].pixel;
    s.slots.push_back(buffer);
    return e;
  }

  EpilogueStep& PushStore(PlanStep& s, Step step, Value v, Rep rep) {
    const int buffer = NewBuffer(v, rep, /*dense=*/false, s.flat);
    if (step == Step::kStoreF16 && !s.epilogue.empty() && s.epilogue.back().step == Step::kRoundHalf) {
      s.epilogue.pop_back();
      step = Step::kRoundStoreF16;
    }
    s.writes.push_back(buffer);
    s.info.bytes += plan_.buffers[size_t(buffer)].image_bytes();
    if (s.info.values.empty() || s.info.values.back() != node(v).name) s.info.values.push_back(node(v).name);
    return PushSlot(s, step, buffer);
  }

  // Stores v, which the epilogue holds, in every form that `readers` want.
  void Store(PlanStep& s, Value v, const std::vector<Value>& readers) {
    for (Rep rep : {Rep::kBits, Rep::kHalfBits, Rep::kS16, Rep::kI32, Rep::kF32, Rep::kF16, Rep::kU8}) {
      if (std::none_of(readers.begin(), readers.end(), [&](Value c) { return Reads(c, v) == rep; })) continue;
      constexpr Step kStore[] = {Step::kStoreBits, Step::kStoreHalfBits, Step::kStoreS16, Step::kStoreI32,
                                 Step::kStoreF32,  Step::kStoreF16,      Step::kStoreU8};
      EpilogueStep& e = PushStore(s, kStore[int(rep)], v, rep);
      if (rep == Rep::kU8) e.low = float(LowestCode(type(v).codes));
      if (rep == Rep::kBits || rep == Rep::kHalfBits) SetBit(e, type(v).codes, 1);
    }
  }

  // What a store of sign bits is for codes 0 and 1.
  static void SetBit(EpilogueStep& e, const Codes& codes, float scale) {
    if (!IsBit(codes)) return;
    e.step = e.step == Step::kStoreBits ? Step::kCodeBits : Step::kCodeHalfBits;
    e.scale = scale;
  }

  void StoreQuantized(PlanStep& s, Value q) {
    const Node& n = node(q);
    const auto& readers = consumers_[size_t(q)];
    const auto wants = [&](Rep rep) {
      return std::any_of(readers.begin(), readers.end(), [&](Value c) { return Reads(c, q) == rep; });
    };
    if (wants(Rep::kBits)) SetBit(PushStore(s, Step::kStoreBits, q, Rep::kBits), n.type.codes, n.reciprocal);
    if (wants(Rep::kHalfBits)) {
      SetBit(PushStore(s, Step::kStoreHalfBits, q, Rep::kHalfBits), n.type.codes, n.reciprocal);
    }
    for (Rep rep : {Rep::kS16, Rep::kU8}) {
      if (!wants(rep)) continue;
      const bool bytes = rep == Rep::kU8;
      const Step quantize = bytes ? Step::kQuantU8 : Step::kQuantS16, sign = bytes ? Step::kSignU8 : Step::kSignS16;
      EpilogueStep& e = PushStore(s, IsSign(n.type.codes) ? sign : quantize, q, rep);
      e.low = float(LowestCode(n.type.codes));
      e.high = float(HighestCode(n.type.codes));
      e.scale = n.reciprocal;
    }
    Cover(s, q);
  }

  void Cover(PlanStep& s, Value v) {
    done_[size_t(v)] = true;
    s.info.nodes.push_back(node(v).name);
    s.info.name = node(v).name;
  }

  bool CanFollow(const PlanStep& s, Value next, Value v) const {
    const Node& n = node(next);
    switch (n.op) {
      case Op::kMul:
      case Op::kAddConst:
      case Op::kPrelu:
      case Op::kRelu:
      case Op::kClip:
      case Op::kCast: return true;
      case Op::kAddValue: {
        if (n.inputs[0] == n.inputs[1]) return false;
        const Value other = n.inputs[0] == v ? n.inputs[1] : n.inputs[0];
        const auto stored = stored_.find({other, Natural(type(other))});
        return stored != stored_.end() && (!s.flat || plan_.buffers[size_t(stored->second)].pixel == 1);
      }
      default: return false;
    }
  }

  void Follow(PlanStep& s, Value next, Value v) {
    const Node& n = node(next);
    switch (n.op) {
      case Op::kMul: PushConstant(s, Step::kMul, n.constant); break;
      case Op::kAddConst: PushConstant(s, Step::kAdd, n.constant); break;
      case Op::kPrelu: PushConstant(s, Step::kPrelu, n.constant); break;
      case Op::kRelu: Push(s, Step::kRelu); break;
      case Op::kClip: {
        EpilogueStep& e = Push(s, Step::kClip);
        e.low = n.low;
        e.high = n.high;
        break;
      }
      case Op::kCast:
        if (n.type.dtype == Dtype::kFloat16) Push(s, Step::kRoundHalf);
        break;
      default: {  // kAddValue
        const Value other = n.inputs[0] == v ? n.inputs[1] : n.inputs[0];
        const Rep rep = Natural(type(other));
        PushSlot(s, rep == Rep::kF16 ? Step::kAddF16 : Step::kAddF32, Source(other, rep));
        break;
      }
    }
    Cover(s, next);
  }

  // The epilogue holds v: quantise it, store it where somebody else needs it, and go on along one elementwise consumer.
  void Chain(PlanStep& s, Value v) {
    for (;;) {
      std::vector<Value> rest;
      std::vector<Value> quantizes;
      for (Value c : consumers_[size_t(v)]) {
        (node(c).op == Op::kQuantize && (!s.flat || MayLieFlat(c)) ? quantizes : rest).push_back(c);
      }
      const auto next =
          std::find_if(rest.begin(), rest.end(), [&](Value c) { return !done_[size_t(c)] && CanFollow(s, c, v); });
      const Value follow = next == rest.end() ? -1 : *next;
      if (next != rest.end()) rest.erase(next);
      Store(s, v, rest);
      for (Value q : quantizes) {
        flat_codes_[size_t(q)] = s.flat;
        StoreQuantized(s, q);
      }
      if (follow < 0) return;
      Follow(s, follow, v);
      v = follow;
    }
  }

  // --- producers ---

  void Produce(Value v) {
    const Node& n = node(v);
    PlanStep s;
    s.node = v;
    s.shape = n.type.shape;
    switch (n.op) {
      case Op::kInput: Input(s, v); break;
      case Op::kConv:
      case Op::kLinear: Convolution(s, v); break;
      case Op::kMaxPool:
      case Op::kAvgPool:
      case Op::kGlobalAvgPool: Plain(s, v, Producer::kPool, "pool"); break;
      case Op::kPixelShuffle: Plain(s, v, Producer::kShuffle, "pixel_shuffle"); break;
      case Op::kResizeBicubic:
        SetTaps(s, n.factor);
        Plain(s, v, Producer::kResize, "resize_bicubic");
        break;
      case Op::kConcat: Plain(s, v, Producer::kConcat, "concat"); break;
      case Op::kFlatten: Plain(s, v, Producer::kFlatten, "flatten"); break;
      case Op::kOutput:
        done_[size_t(v)] = true;
        plan_.output = Source(n.inputs[0], Natural(n.type));
        return;
      default: Elementwise(s, v); break;
    }
    const auto single = [](const Shape& shape) { return shape.height == 1 && shape.width == 1; };
    const bool by_pixel =
        s.producer == Producer::kBitConv || s.producer == Producer::kGemm || s.producer == Producer::kElementwise;
    s.batch_is_row = by_pixel && single(s.shape) && n.kernel == std::array<int, 2>{1, 1} &&
                     n.geometry.padding == std::array<int, 4>{0, 0, 0, 0};
    for (int b : s.sources)
      s.batch_is_row &= plan_.buffers[size_t(b)].image_bytes() ==
                        plan_.buffers[size_t(b)].pixel * RepSize(plan_.buffers[size_t(b)].rep);
    for (int b : s.slots)
      s.batch_is_row &= plan_.buffers[size_t(b)].image_bytes() ==
                        plan_.buffers[size_t(b)].pixel * RepSize(plan_.buffers[size_t(b)].rep);
    const double each = s.producer == Producer::kBitConv ? 0.0005 : s.integer ? 0.008 : 0.02;
    s.nanoseconds = each * double(s.info.macs) + 0.05 * double(s.info.bytes);
    for (int b : s.sources) s.nanoseconds += 0.05 * double(plan_.buffers[size_t(b)].image_bytes());
    plan_.scratch = std::max(plan_.scratch, Scratch(s));
    plan_.steps.push_back(std::move(s));
  }

  void Input(PlanStep& s, Value v) {
    s.producer = Producer::kInput;
    s.info.kernel = "input";
    const auto& readers = consumers_[size_t(v)];
    plan_.input = NewBuffer(v, readers.empty() ? Natural(type(v)) : Reads(readers[0], v), /*dense=*/true);
    s.writes.push_back(plan_.input);
    s.info.values.push_back(node(v).name);
    s.info.bytes = plan_.buffers[size_t(plan_.input)].image_bytes();
    Cover(s, v);
  }

  void Elementwise(PlanStep& s, Value v) {
    const Node& n = node(v);
    s.producer = Producer::kElementwise;
    s.info.kernel = "elementwise";
    s.info.isa = kernels_.isa;
    s.tile = Natural(type(n.inputs[0]));
    s.sources.push_back(Source(n.inputs[0], s.tile));
    s.flat = (n.op == Op::kQuantize ? MayLieFlat(v) : IsFlat(n.type)) &&
             std::all_of(n.inputs.begin(), n.inputs.end(), [&](Value x) {
               const auto stored = stored_.find({x, Natural(type(x))});
               return IsFlat(type(x)) && stored != stored_.end() && plan_.buffers[size_t(stored->second)].pixel == 1;
             });
    if (s.flat) s.tile_pixels = kFlatPixels;
    if (n.op == Op::kQuantize) {
      flat_codes_[size_t(v)] = s.flat;
      return StoreQuantized(s, v);
    }
    if (n.op == Op::kAddValue && n.inputs[0] == n.inputs[1]) {
      PushSlot(s, s.tile == Rep::kF16 ? Step::kAddF16 : Step::kAddF32, s.sources[0]);
      Cover(s, v);
    } else {
      Follow(s, v, n.inputs[0]);
    }
    Chain(s, v);
  }

  void Plain(PlanStep& s, Value v, Producer producer, const char* kernel) {
    const Node& n = node(v);
    s.producer = producer;
    s.info.kernel = kernel;
    s.info.isa = kernels_.isa;
    for (Value x : n.inputs) s.sources.push_back(Source(x, Natural(type(x))));
    s.tile = producer == Producer::kPool ? Rep::kF32 : Natural(n.type);
    const bool enlarges = producer == Producer::kShuffle || producer == Producer::kResize;
    s.flat = enlarges && IsFlat(n.type);
    s.tile_step = s.flat ? 1 : RoundUp(n.type.shape.channels, kLanes);
    s.tile_pixels = s.flat ? kFlatPixels : producer == Producer::kFlatten ? 1 : TilePixels(s);
    if (producer == Producer::kResize || s.flat) s.tile_pixels -= s.tile_pixels % n.factor;  // begin at whole pixels
    Cover(s, v);
    Chain(s, v);
  }

  // Numbers of one channel: a block of 16 channels for each of them would be 15 parts air.
  static bool IsFlat(const ValueType& t) {
    return t.shape.image && t.shape.channels == 1 && t.shape.width > 1 &&
           (t.dtype == Dtype::kFloat32 || t.dtype == Dtype::kFloat16);
  }

  // Codes of one channel that are read as numbers, by convolutions alone.
  bool MayLieFlat(Value q) const {
    const auto& readers = consumers_[size_t(q)];
    return IsFlat(type(node(q).inputs[0])) && std::all_of(readers.begin(), readers.end(), [&](Value c) {
             return node(c).op == Op::kConv && node(c).groups == 1 && node(c).weights.integer && !IsBitConv(node(c)) &&
                    node(c).offsets.weight.empty();
           });
  }

  // Keys' cubic with a = -0.5 at the taps around every phase's position (docs/OPS.md).
  static void SetTaps(PlanStep& s, int factor) {
    for (int phase = 0; phase < factor; ++phase) {
      const double at = (phase + 0.5) / factor - 0.5;
      const int from = int(std::floor(at)) - 1;
      s.from[size_t(phase)] = from;
      for (int k = 0; k < 4; ++k) {
        const double t = std::abs(at - (from + k));
        const double near = (1.5 * t - 2.5) * t * t + 1, far = ((-0.5 * t + 2.5) * t - 4) * t + 2;
        s.taps_of[size_t(phase * 4 + k)] = float(t <= 1 ? near : far);
      }
    }
  }

  int TilePixels(const PlanStep& s) const {
    const int64_t most = std::clamp<int64_t>(kTileBytes / (s.tile_step * 4), 4, 64);
    return int(std::min(most, std::max<int64_t>(s.shape.width, 16)));
  }

  void Convolution(PlanStep& s, Value v) {
    const Node& n = node(v);
    const ValueType& x = type(n.inputs[0]);
    const Weights& w = n.weights;
    const bool bits = IsBitConv(n);
    const Rep source = Reads(v, n.inputs[0]);
    const int sums = n.offsets.weight.empty() ? -1 : SumCodes(v, source);
    s.integer = w.integer && x.dtype == Dtype::kCodes;
    s.tile = s.integer ? Rep::kI32 : Rep::kF32;
    s.info.isa = kernels_.isa;
    s.info.macs = n.type.shape.height * n.type.shape.width * int64_t(w.integer ? w.codes.size() : w.numbers.size());
    s.sources.push_back(Source(n.inputs[0], source));
    Cover(s, v);
    if (bits) {
      PackBits(s, n);
    } else if (n.groups > 1 && n.groups == x.shape.channels && w.shape[0] == n.groups) {
      PackDepthwise(s, n);
    } else if (UsesTables(n)) {
      PackTables(s, n);
    } else if (TakesLines(n)) {
      PackLines(s, n);
    } else {
      PackGemm(s, n);
    }
    PushOffsets(s, n, sums);
    if (bits && IsBit(x.codes)) PushConstant(s, Step::kMul, std::vector<float>(size_t(w.shape[0]), 0.5f));
    Chain(s, v);
    if (bits && IsBit(x.codes)) FoldHalf(s);
    if (s.integer) UseThresholds(s, n, x);
    if (s.producer == Producer::kTableConv) UseLevels(s, n, x);
    if (bits && kernels_.nibbles && !s.halves) UseNibbles(s, n.groups);
  }

  // x 0.5 x c is x (0.5 c), if 0.5 c is exact: a product with a power of 2 is.
  static void FoldHalf(PlanStep& s) {
    if (s.epilogue.size() < 2 || s.epilogue[1].step != Step::kMul) return;
    Aligned<float>& factors = s.constants[1];
    for (size_t i = 0; i < factors.size(); ++i) {
      if (factors[i] * 0.5f * 2 != factors[i]) return;
    }
    for (size_t i = 0; i < factors.size(); ++i) factors[i] *= 0.5f;
    s.epilogue.erase(s.epilogue.begin());
  }

  // A step of its own: under every output position, the sum of the input's codes, as float32. One number where all
  // filters see the same channels, else one for each filter. Returns the buffer.
  int SumCodes(Value v, Rep source) {
    const Node& n = node(v);
    PlanStep s;
    s.producer = Producer::kCodeSums;
    s.node = v;
    s.info.kernel = "code_sums";
    s.info.name = n.name;
    s.info.isa = kernels_.isa;
    s.sources.push_back(Source(n.inputs[0], source));
    Buffer b{-1, Rep::kF32, n.type.shape, 1};
    if (n.groups == 1) {
      b.shape.channels = 1;
    } else {
      b.pixel = RoundUp(b.shape.channels, kLanes);
    }
    b.first = b.last = int(plan_.steps.size());
    plan_.buffers.push_back(b);
    const int id = int(plan_.buffers.size() - 1);
    s.shape = b.shape;
    s.writes.push_back(id);
    s.info.bytes = b.image_bytes();
    const Buffer& from = plan_.buffers[size_t(s.sources[0])];
    s.depth = int64_t(n.kernel[0] - 1) * n.geometry.dilation[0] + 1;
    s.nanoseconds = 0.2 * double(from.image_bytes() + b.image_bytes());
    plan_.scratch = std::max(plan_.scratch, Scratch(s));
    plan_.steps.push_back(std::move(s));
    return id;
  }

  // What offsets add to the accumulator (docs/OPS.md): the sum of the input's codes times weight_offset, then a number
  // that depends on the filter and its valid taps only.
  void PushOffsets(PlanStep& s, const Node& n, int sums) {
    if (sums >= 0) {
      const float* const constant = Constant(s, n.offsets.weight);
      PushSlot(s, n.groups == 1 ? Step::kAddSum : Step::kAddSums, sums).constant = constant;
      plan_.buffers[size_t(sums)].last = int(plan_.steps.size());
    }
    if (n.offsets.input.empty()) return;
    const Weights& w = n.weights;
    const float input_offset = n.offsets.input[0];
    const size_t filters = size_t(w.shape[0]), channels = size_t(w.shape[3]), taps = size_t(w.shape[1] * w.shape[2]);
    const size_t padded = size_t(RoundUp(w.shape[0], kLanes));
    const auto [rows, cols] = SetClasses(s, n, int64_t(padded));
    s.border = Aligned<float>(rows.valid.size() * cols.valid.size() * padded);
    float* border = s.border.data();
    for (const auto& row : rows.valid) {
      for (const auto& col : cols.valid) {
        for (size_t o = 0; o < filters; ++o) {
          int32_t sum = 0, count = 0;
          for (size_t t = 0; t < taps; ++t) {
            if (!row[t / col.size()] || !col[t % col.size()]) continue;
            count += int32_t(channels);
            const auto first = w.codes.begin() + ptrdiff_t((o * taps + t) * channels);
            sum = std::accumulate(first, first + ptrdiff_t(channels), sum);
          }
          border[o] = float(sum) * input_offset;
          if (sums >= 0) border[o] = border[o] + float(count) * (n.offsets.weight[o] * input_offset);
        }
        border += padded;
      }
    }
    if (s.border.size() > padded) {
      Push(s, Step::kAddBorder);
    } else {  // one class
      PushConstant(s, Step::kAdd, {s.border.data(), s.border.data() + filters});
      s.border = {};
    }
  }

  // Sets where an output position's border class lies in tables of `step` numbers for each.
  std::pair<Axis, Axis> SetClasses(PlanStep& s, const Node& n, int64_t step) const {
    const Shape& in = type(n.inputs[0]).shape;
    const Shape& out = n.type.shape;
    const Geometry& g = n.geometry;
    Axis rows = Classes(out.height, in.height, n.kernel[0], g.stride[0], g.dilation[0], g.padding[0]);
    Axis cols = Classes(out.width, in.width, n.kernel[1], g.stride[1], g.dilation[1], g.padding[1]);
    s.row_class = rows.class_of;
    s.col_offset.clear();
    for (int32_t c : cols.class_of) s.col_offset.push_back(int32_t(c * step));
    s.row_class_step = int64_t(cols.valid.size()) * step;
    return {std::move(rows), std::move(cols)};
  }

  static float Number(const Weights& w, int64_t i) {
    return w.integer ? float(w.codes[size_t(i)]) : w.numbers[size_t(i)];
  }

  void PackDepthwise(PlanStep& s, const Node& n) {
    s.producer = Producer::kDepthwise;
    s.info.kernel = s.integer ? "depthwise_int" : "depthwise_float";
    const int64_t channels = n.type.shape.channels, padded = RoundUp(channels, kLanes),
                  taps = int64_t(n.kernel[0]) * n.kernel[1];
    s.tile_step = padded;
    s.tile_pixels = TilePixels(s);
    if (s.integer) {
      s.depth_weights = Aligned<int32_t>(size_t(taps * padded));
    } else {
      s.float_weights = Aligned<float>(size_t(taps * padded));
    }
    s.info.weight_bytes = taps * padded * 4;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t t = 0; t < taps; ++t) {
        if (s.integer) {
          s.depth_weights[size_t(t * padded + c)] = n.weights.codes[size_t(c * taps + t)];
        } else {
          s.float_weights[size_t(t * padded + c)] = Number(n.weights, c * taps + t);
        }
      }
    }
  }

  void PackGemm(PlanStep& s, const Node& n) {
    s.producer = Producer::kGemm;
    s.bytes = plan_.buffers[size_t(s.sources[0])].rep == Rep::kU8;
    s.info.kernel = s.bytes ? "byte_gemm" : s.integer ? "int_gemm" : "float_gemm";
    const Weights& w = n.weights;
    const int64_t filters = w.shape[0] / n.groups, k = w.shape[1] * w.shape[2] * w.shape[3];
    const Buffer& source = plan_.buffers[size_t(s.sources[0])];
    const int64_t channels = w.shape[3];
    s.from_source = ReadsSource(n, source.rep, source.pixel);
    s.fused = n.groups == 1 || filters % kLanes == 0;
    s.blocks = RoundUp(filters, kLanes) / kLanes;
    s.rows = s.from_source ? w.shape[1] : 1;
    const int64_t row = s.from_source ? (w.shape[2] - 1) * source.pixel + channels : k;
    const int64_t together = s.bytes ? 4 : s.integer ? 2 : 1;  // numbers of a lane
    s.depth = RoundUp(row, together) / together;
    const int64_t row_step = s.depth * kLanes * together;
    s.w_block = s.rows * row_step;
    const int64_t size = n.groups * s.blocks * s.w_block;
    if (s.bytes) {
      s.byte_weights = Aligned<int8_t>(size_t(size));
      s.byte_start = Aligned<int32_t>(size_t(s.blocks * kLanes));
    } else if (s.integer) {
      s.int_weights = Aligned<int16_t>(size_t(size));
    } else {
      s.float_weights = Aligned<float>(size_t(size));
    }
    s.info.weight_bytes = size * (s.bytes ? 1 : s.integer ? 2 : 4);
    for (int64_t o = 0; o < w.shape[0]; ++o) {
      const int64_t group = o / filters, f = o % filters;
      const int64_t base = (group * s.blocks + f / kLanes) * s.w_block;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t tap = i / channels;
        const int64_t r = s.from_source ? tap / w.shape[2] : 0;
        const int64_t at = s.from_source ? tap % w.shape[2] * source.pixel + i % channels : i;
        const int64_t place = base + r * row_step + (at / together * kLanes + f % kLanes) * together + at % together;
        if (s.bytes) {
          const int code = w.codes[size_t(o * k + i)];
          s.byte_weights[size_t(place)] = int8_t(code);
          // As the sums that begin there, it may pass the ends of int32 on its way.
          const uint32_t part = uint32_t(code) * source.zero[size_t(i % channels)];
          s.byte_start[size_t(f)] = int32_t(uint32_t(s.byte_start[size_t(f)]) - part);
        } else if (s.integer) {
          s.int_weights[size_t(place)] = w.codes[size_t(o * k + i)];
        } else {
          s.float_weights[size_t(place)] = Number(w, o * k + i);
        }
      }
    }
    s.tile_step = n.groups * filters + kLanes;  // grouped results are moved together; the last one may reach over
    s.tile_step = RoundUp(s.tile_step, kLanes);
    s.tile_pixels = TilePixels(s);
    if (!s.from_source) {
      const int64_t most = kPatchBytes / (PatchStep(s) * (s.integer ? 2 : 4));
      s.tile_pixels = int(std::clamp<int64_t>(most, 4, s.tile_pixels));
    }
  }

  // Weights as [set of kLineFilters filters][row][column][channel][filter of the set].
  void PackLines(PlanStep& s, const Node& n) {
    s.producer = Producer::kLineConv;
    s.info.kernel = "line_conv";
    const Weights& w = n.weights;
    const int64_t filters = w.shape[0], k = w.shape[1] * w.shape[2] * w.shape[3];
    s.flat = IsFlat(n.type);
    s.tile_step = s.flat ? 1 : RoundUp(filters, kLanes);
    s.tile_pixels = s.flat ? kFlatPixels : 64;
    s.blocks = RoundUp(filters, kLineFilters) / kLineFilters;
    s.depth = (w.shape[1] - 1) * n.geometry.dilation[0] + 1;
    s.plane_step = PlaneStep(n);
    s.w_block = k * kLineFilters;
    s.float_weights = Aligned<float>(size_t(s.blocks * s.w_block));
    s.info.weight_bytes = s.blocks * s.w_block * 4;
    for (int64_t o = 0; o < filters; ++o) {
      const int64_t set = o / kLineFilters, of = std::min<int64_t>(kLineFilters, filters - set * kLineFilters);
      for (int64_t i = 0; i < k; ++i)
        s.float_weights[size_t(set * s.w_block + i * of + o % kLineFilters)] = Number(w, o * k + i);
    }
  }

  // A weight is m i + e of its index i: bipolar codes are 2 i - (2^K - 1), two's complement ones i - 2^(K-1). So the
  // sum of weight x byte is m * (sum over bits k of i, 2^k * sum of the bytes picked) + e * (sum of the bytes). Less
  // what the zeros among them stand for, as in PackGemm. Packed as [set of 64 filters][row][group of
  // channels][tap][bit][64].
  void PackTables(PlanStep& s, const Node& n) {
    s.producer = Producer::kTableConv;
    s.info.kernel = "table_conv";
    const Weights& w = n.weights;
    const Geometry& g = n.geometry;
    const Buffer& source = plan_.buffers[size_t(s.sources[0])];
    const bool bipolar = w.type.kind == Kind::kBipolar;
    const ValueType& x = type(n.inputs[0]);
    const int64_t channels = w.shape[3], kh = w.shape[1], kw = w.shape[2], filters = w.shape[0];
    s.planes = w.type.bits;
    s.shift = bipolar ? 1 : 0;
    s.each = LowestCode(w.type);
    s.table_groups = int(TableGroups(channels));
    s.table_taps = kw == 3 ? 3 : 1;
    s.rows = kh * kw / s.table_taps;
    s.depth = (kh - 1) * g.dilation[0] + 1;
    // Strips of columns and some groups of channels at a time, so that the tables that a row needs stay in L1. Those at
    // the edges of strips are made twice.
    const int64_t pieces = std::max<int64_t>(1, s.shape.width / kTableStrip);
    s.strip = (s.shape.width + pieces - 1) / pieces;
    s.table_columns = int((s.strip - 1) * g.stride[1] + (kw - 1) * g.dilation[1] + 1);
    s.blocks = RoundUp(filters, kTableFilters) / kTableFilters;
    const int most = HighestCode(x.codes) - LowestCode(x.codes);
    s.together = 255 / (kTableChannels * most);
    s.rows_at_once = std::min<int64_t>(s.rows, 65535 / (s.table_taps * s.table_groups * kTableChannels * most));
    s.groups_at_once = s.table_groups;
    if (s.rows_at_once == s.rows) {
      const int64_t fit = std::max<int64_t>(8, kTableStripBytes / (kh * s.table_columns * kTableBytes));
      const int64_t parts = (s.table_groups + fit - 1) / fit;
      s.groups_at_once = int(RoundUp((s.table_groups + parts - 1) / parts, 2));  // lookups go in pairs
    }
    const int64_t lookup = s.planes * kTableBytes;
    s.w_block = kh * kw * s.table_groups * lookup;
    s.table_weights = Aligned<uint8_t>(size_t(s.blocks * s.w_block));
    s.byte_start = Aligned<int32_t>(size_t(s.blocks * kTableFilters));
    s.info.weight_bytes = s.blocks * s.w_block;
    for (int64_t o = 0; o < filters; ++o) {
      // As Wide::Block hands out the bytes: the first 32 filters are the even ones.
      const int64_t f = o % kTableFilters, place = f < 32 ? 2 * f : 2 * (f - 32) + 1;
      uint8_t* const at = s.table_weights.data() + o / kTableFilters * s.w_block + place;
      for (int64_t i = 0; i < kh * kw * channels; ++i) {
        const int64_t channel = i % channels, tap = i / channels % s.table_taps, row = i / channels / s.table_taps;
        const int code = w.codes[size_t(o * kh * kw * channels + i)];
        const int index = (code - s.each) >> s.shift;
        const int64_t number = (row * s.table_groups + channel / kTableChannels) * s.table_taps + tap;
        for (int k = 0; k < s.planes; ++k)
          at[number * lookup + k * kTableBytes] |= uint8_t((index >> k & 1) << (channel % kTableChannels));
        s.byte_start[size_t(o)] -= code * source.zero[size_t(channel)];
      }
    }
    s.together = Together(s, most);
    s.tile_step = std::min<int64_t>(s.blocks, s.planes == 1 ? 2 : 1) * kTableFilters;
    s.tile_pixels = 16;
    const int64_t partial = s.tile_step / kTableFilters * s.planes * s.tile_pixels * 2 * kTableBytes;
    s.partial_step = s.groups_at_once < s.table_groups ? partial : 0;
    s.partial_bytes = std::max(partial, RoundUp(s.blocks, 2) * s.partial_step);
  }

  // How many lookups one after another fit a byte: for any codes at least s.together; of whole groups more, where no
  // filter of these weights picks too many channels.
  static int Together(const PlanStep& s, int most) {
    const int64_t lookup = s.planes * kTableBytes, groups = s.table_groups;
    const auto fits = [&](int64_t run) {
      for (int64_t set = 0; set < s.blocks; ++set) {
        for (int64_t r = 0; r < s.rows; ++r) {
          for (int64_t at = 0; at < lookup; ++at) {
            const uint8_t* const w = s.table_weights.data() + set * s.w_block + r * (s.w_block / s.rows) + at;
            const auto picked = [&](int64_t group) {
              int n = 0;
              for (int64_t t = 0; t < s.table_taps; ++t) n += std::popcount(w[(group * s.table_taps + t) * lookup]);
              return n;
            };
            int sum = 0;
            for (int64_t g = 0; g < groups; ++g) {
              sum += picked(g);
              if (g >= run) sum -= picked(g - run);
              if (sum * most > 255) return false;
            }
          }
        }
      }
      return true;
    };
    int64_t run = 0;
    while (run < groups && fits(run + 1)) ++run;
    return std::max(int(run) * s.table_taps, s.together);
  }

  static int64_t PatchStep(const PlanStep& s) { return s.depth * (s.integer ? 2 : 1); }

  int64_t Scratch(const PlanStep& s) const {
    if (s.producer == Producer::kCodeSums) {
      const int64_t row = type(node(s.node).inputs[0]).shape.width, pixels = (s.depth + 1) * row + s.shape.width;
      return s.depth * int64_t{sizeof(int64_t)} + pixels * node(s.node).groups * 4 + kSlack;
    }
    int64_t bytes = RoundUp(s.tile_pixels * s.tile_step * 4, 64) + kSlack;
    if (s.producer == Producer::kResize) {  // a row with its ring, and four rows of one channel that lie wide
      const int64_t row = type(node(s.node).inputs[0]).shape.width + 2 * kResizeRing;
      return bytes + RoundUp(row * (s.flat ? 5 : s.tile_step) * 4, 64) + 5 * kSlack;
    }
    if (s.producer == Producer::kLineConv) {
      const int64_t planes = s.depth * type(node(s.node).inputs[0]).shape.channels * s.plane_step;
      return bytes + planes * 4 + s.depth * 8 + kSlack;
    }
    if (s.producer == Producer::kTableConv) {
      const int64_t tables = s.depth * s.table_columns * s.table_groups * kTableBytes;
      return bytes + s.partial_bytes + tables + (s.depth + s.rows + node(s.node).kernel[0]) * 8 +
             s.depth * s.table_columns * 4;
    }
    if (s.producer == Producer::kGemm) {
      bytes += RoundUp(s.tile_pixels * PatchStep(s) * (s.integer ? 2 : 4), 64) + kSlack;
      if (node(s.node).groups > 1) bytes += RoundUp(s.tile_pixels * s.blocks * kLanes * 4, 64) + kSlack;
    }
    return bytes;
  }

  // Tap word k of filter o.
  static uint32_t& BitWord(PlanStep& s, int64_t o, int64_t k, int groups) {
    const int64_t group_blocks = s.blocks / groups, block = o / kLanes % group_blocks;
    const int64_t first = o / kLanes - block % 4, together = std::min<int64_t>(4, group_blocks - (block - block % 4));
    return s.bit_weights[size_t(first * s.w_block + (k * together + block % 4) * kLanes + o % kLanes)];
  }

  // The weights of two or four blocks together as BitConv::nibbles has them.
  static void UseNibbles(PlanStep& s, int groups) {
    const int64_t group_blocks = s.blocks / groups;
    if (group_blocks < 2 || 32 * s.depth > UINT16_MAX) return;
    Aligned<uint32_t> packed(s.bit_weights.size() * 2);
    for (int64_t first = 0; first < s.blocks;) {
      const int64_t together = std::min<int64_t>(4, group_blocks - first % group_blocks);
      uint32_t* const to = packed.data() + first * s.w_block * 2;
      if (together % 2) {
        std::copy_n(s.bit_weights.data() + first * s.w_block, together * s.w_block, to);
      } else {
        uint8_t* const bytes = reinterpret_cast<uint8_t*>(to);
        for (int64_t f = 0; f < together * kLanes; ++f) {
          const int64_t place = f / 32 * 32 + f % 16 * 2 + f / 16 % 2;
          for (int64_t k = 0; k < s.depth; ++k) {
            const uint32_t word = BitWord(s, first * kLanes + f, k, groups);
            for (int n = 0; n < 8; ++n) bytes[(k * 8 + n) * together * kLanes + place] = uint8_t(word >> (4 * n) & 15);
          }
        }
      }
      first += together;
    }
    s.bit_weights = std::move(packed);
    s.nibbles = true;
    s.info.weight_bytes *= 2;
  }

  static void InvertFilter(PlanStep& s, int64_t o, int groups) {
    for (int64_t k = 0; k < s.depth; ++k) BitWord(s, o, k, groups) ^= ~0u;
  }

  // Weights as [up to 64 filters of a group][tap word][block][16 filters]; every tap's channels fill whole words, as
  // the activations do. A set bit is +1. With all taps inside, acc = (number of taps) * channels - 2 * popcount(a xor
  // w). A tap outside reads 0 bits, which adds popcount(w) to the count and must add nothing to acc: base = (valid
  // taps) * channels + 2 * (sum of popcount(w) over the invalid taps). Codes 0 and 1 are (1 + sign) / 2, and the
  // product of such a one with w is (w + sign * w) / 2: twice the accumulator is what a tap outside adds, of every tap.
  void PackBits(PlanStep& s, const Node& n) {
    s.producer = Producer::kBitConv;
    s.info.kernel = "bit_conv";
    const Weights& w = n.weights;
    const int64_t filters = w.shape[0], channels = w.shape[3], taps = w.shape[1] * w.shape[2];
    const int64_t words = RoundUp(channels, 32) / 32;
    s.halves = plan_.buffers[size_t(s.sources[0])].rep == Rep::kHalfBits;
    s.blocks = RoundUp(filters, kLanes) / kLanes;
    s.depth = taps * words;
    s.w_block = s.depth * kLanes;
    s.bit_weights = Aligned<uint32_t>(size_t(s.blocks * s.w_block));
    s.info.weight_bytes = s.blocks * s.w_block * 4;
    const bool is_sign = IsSign(type(n.inputs[0]).codes);
    std::vector<int32_t> ones(size_t(filters * taps));
    for (int64_t o = 0; o < filters; ++o) {
      for (int64_t t = 0; t < taps; ++t) {
        const int16_t* const codes = w.codes.data() + (o * taps + t) * channels;
        for (int64_t i = 0; i < words; ++i) {
          uint32_t word = 0;
          const int64_t last = std::min<int64_t>(32, channels - 32 * i);
          for (int64_t c = 0; c < last; ++c) word |= uint32_t(codes[32 * i + c] > 0) << c;
          BitWord(s, o, t * words + i, n.groups) = s.halves ? word | word << 16 : word;
          ones[size_t(o * taps + t)] += __builtin_popcount(word);
        }
      }
    }
    const Geometry& g = n.geometry;
    const Buffer& source = plan_.buffers[size_t(s.sources[0])];
    for (int64_t y = 0; y < w.shape[1]; ++y) {
      for (int64_t x = 0; x < w.shape[2]; ++x) {
        for (int64_t i = 0; i < words; ++i)
          s.taps.push_back(y * g.dilation[0] * source.row() + x * g.dilation[1] * source.pixel + i);
      }
    }
    s.rows_of_3 = s.taps.size() == 9;
    for (size_t k = 0; k < 9 && s.rows_of_3; ++k) s.rows_of_3 = s.taps[k] == s.taps[k / 3 * 3] + ptrdiff_t(k % 3);
    const auto [rows, cols] = SetClasses(s, n, s.blocks * kLanes);
    s.table = Aligned<int32_t>(rows.valid.size() * size_t(s.row_class_step));
    int32_t* base = s.table.data();
    for (const auto& row : rows.valid) {
      for (const auto& col : cols.valid) {
        for (int64_t o = 0; o < filters; ++o) {
          int64_t sum = 0;
          for (size_t t = 0; t < size_t(taps); ++t) {
            const bool inside = is_sign && row[t / col.size()] && col[t % col.size()];
            sum += inside ? channels : 2 * ones[size_t(o * taps) + t];
          }
          base[o] = int32_t(sum);
        }
        base += s.blocks * kLanes;
      }
    }
  }

  // Replaces {float steps, one store of sign bits} behind an integer convolution by one compare, where every channel
  // allows it.
  void UseThresholds(PlanStep& s, const Node& n, const ValueType& x) {
    if (s.epilogue.empty() || s.writes.size() != 1 || s.slots.size() != 1) return;
    const Step store = s.epilogue.back().step;
    const bool half_bits = store == Step::kStoreHalfBits || store == Step::kCodeHalfBits;
    if (!half_bits && store != Step::kStoreBits && store != Step::kCodeBits) return;
    const size_t channels = size_t(n.type.shape.channels);
    const int64_t lowest =
        LowestCode(x.codes) - (x.zero_point.empty() ? 0 : *std::max_element(x.zero_point.begin(), x.zero_point.end()));
    const int64_t highest =
        HighestCode(x.codes) - (x.zero_point.empty() ? 0 : *std::min_element(x.zero_point.begin(), x.zero_point.end()));
    const bool twice = s.producer == Producer::kBitConv && IsBit(x.codes);
    const int64_t largest = std::max(-lowest, highest) * (twice ? 2 : 1);
    const size_t per_filter = n.weights.codes.size() / channels;
    std::vector<Threshold> found;
    for (size_t c = 0; c < channels; ++c) {
      int64_t reach = 0;
      for (size_t k = 0; k < per_filter; ++k) reach += largest * std::abs(int(n.weights.codes[c * per_filter + k]));
      const auto threshold = FindThreshold(s.epilogue, c, int32_t(-reach), int32_t(reach));
      if (!threshold) return;
      found.push_back(*threshold);
    }
    const size_t blocks = size_t(RoundUp(int64_t(channels), kLanes) / kLanes), padded = blocks * kLanes;
    s.threshold = true;
    s.flip = Aligned<uint16_t>(blocks);
    for (size_t c = 0; c < channels; ++c) s.flip[c / kLanes] |= uint16_t(found[c].flip << (c % kLanes));
    s.info.kernel += "+threshold";
    s.constants.clear();
    if (s.producer == Producer::kBitConv) {
      // acc = base - 2 p >= limit  <=>  p <= most = floor((base - limit) / 2)  <=>  p - most - 1 < 0. Lanes behind the
      // last filter get no bit: p < 0. Where the direction is turned, the filter's weights are inverted: all 32 depth
      // bits that differed agree now and the other way round, p' = 32 depth - p, so that not (p <= most)  <=>  p' <=
      // 32 depth - most - 1.
      const int64_t all = (s.halves ? 16 : 32) * s.depth;
      for (size_t at = 0; at < s.table.size(); ++at) {
        const size_t c = at % padded;
        if (c >= channels) {
          s.table[at] = 0;
          continue;
        }
        const int64_t most = std::clamp<int64_t>((int64_t(s.table[at]) - found[c].limit) >> 1, -1, all);
        s.table[at] = -int32_t(found[c].flip ? all - most : most + 1);
        if (s.halves) s.table[at] = Twice(s.table[at]);
      }
      for (size_t c = 0; c < channels; ++c) {
        if (found[c].flip) InvertFilter(s, int64_t(c), n.groups);
      }
      s.epilogue.clear();
      return;
    }
    s.limit = Aligned<int32_t>(padded);
    for (size_t c = 0; c < channels; ++c) s.limit[c] = found[c].limit;
    EpilogueStep step = s.epilogue.back();
    step.step = half_bits ? Step::kThresholdHalfBits : Step::kThreshold;
    step.limit = s.limit.data();
    step.flip = s.flip.data();
    s.epilogue = {step};
  }

  // Convolutions by tables whose sums fit 16 bits and become small codes: limits in place of the float steps.
  void UseLevels(PlanStep& s, const Node& n, const ValueType& x) {
    if (s.epilogue.back().step != Step::kQuantU8 || s.slots.size() != 1 || s.rows_at_once < s.rows) return;
    const EpilogueStep quantize = s.epilogue.back();
    const int levels = int(quantize.high - quantize.low);
    const int64_t channels = n.type.shape.channels, per_filter = int64_t(n.weights.codes.size()) / channels;
    if (levels > 7) return;                                              // the float steps are as fast
    const int64_t largest = HighestCode(x.codes) - LowestCode(x.codes);  // of a byte, and of a code
    std::vector<Levels> found;
    for (int64_t c = 0; c < channels; ++c) {
      int64_t reach = 0;
      for (int64_t k = 0; k < per_filter; ++k)
        reach += largest * std::abs(int(n.weights.codes[size_t(c * per_filter + k)]));
      if (reach >= INT16_MAX) return;
      const auto levels_of = FindLevels(s.epilogue, size_t(c), int32_t(-reach), int32_t(reach));
      if (!levels_of) return;
      found.push_back(*levels_of);
    }
    s.levels = levels;
    s.info.kernel += "+levels";
    s.level_limits = Aligned<int16_t>(size_t(s.blocks * levels * kTableFilters));
    s.level_flip = Aligned<int16_t>(size_t(s.blocks * kTableFilters));
    Aligned<uint8_t> ordered(s.table_weights.size());
    for (int64_t o = 0; o < s.blocks * kTableFilters; ++o) {
      // Byte j of a vector of sums is filter j now, and the words of the even ones come first.
      const int64_t set = o / kTableFilters, f = o % kTableFilters, from = f < 32 ? 2 * f : 2 * (f - 32) + 1;
      for (int64_t at = 0; at < s.w_block; at += kTableBytes)
        ordered[size_t(set * s.w_block + at + f)] = s.table_weights[size_t(set * s.w_block + at + from)];
      if (o >= channels) continue;
      const int64_t word = f % 2 * 32 + f / 2;
      const Levels& of = found[size_t(o)];
      s.level_flip[size_t(set * kTableFilters + word)] = int16_t(of.flip);
      for (int k = 0; k < levels; ++k) {
        const int64_t limit = of.limits[size_t(k)], start = s.byte_start[size_t(o)];
        const bool open = limit == INT32_MIN || limit == INT32_MAX;
        s.level_limits[size_t((set * levels + k) * kTableFilters + word)] =
            int16_t(std::clamp<int64_t>(open ? limit : limit - (of.flip ? -start : start), INT16_MIN, INT16_MAX));
      }
    }
    s.table_weights = std::move(ordered);
    s.constants.clear();
    s.epilogue = {quantize};
  }

  // --- workspace: the lowest place that no buffer alive at the same time holds ---

  // Where step i may write `to`: over a buffer of the same form that its epilogue reads for the last time, a number
  // before it writes one there. What is written is in the first cache then. -1: nowhere.
  int Over(int i, int to) const {
    const PlanStep& s = plan_.steps[size_t(i)];
    const Buffer& b = plan_.buffers[size_t(to)];
    const auto& slots = s.slots;
    const auto write = std::find(slots.begin(), slots.end(), to);
    for (auto at = slots.begin(); at != write; ++at) {
      const Buffer& x = plan_.buffers[size_t(*at)];
      const bool same = x.rep == b.rep && x.pixel == b.pixel && x.ring == b.ring && x.fill == b.fill &&
                        x.shape.height == b.shape.height && x.shape.width == b.shape.width &&
                        x.shape.channels == b.shape.channels;
      const bool producer_reads = std::find(s.sources.begin(), s.sources.end(), *at) != s.sources.end();
      if (same && x.first < i && x.last == i && !producer_reads && std::find(write, slots.end(), *at) == slots.end())
        return *at;
    }
    return -1;
  }

  void Place() {
    std::vector<size_t> order;
    std::vector<size_t> place(plan_.buffers.size());  // the buffer in whose place one lies
    std::iota(place.begin(), place.end(), size_t{0});
    plan_.buffers[size_t(plan_.output)].last = int(plan_.steps.size());
    std::vector<int> last;
    for (const Buffer& b : plan_.buffers) last.push_back(b.last);
    std::vector<bool> covered(plan_.buffers.size());
    for (size_t i = 0; i < plan_.steps.size(); ++i) {
      for (int to : plan_.steps[i].writes) {
        const int over = Over(int(i), to);
        if (over < 0 || covered[size_t(over)]) continue;
        covered[size_t(over)] = true;
        place[size_t(to)] = place[size_t(over)];
        last[place[size_t(to)]] = plan_.buffers[size_t(to)].last;
      }
    }
    for (size_t id = 0; id < place.size(); ++id) {
      if (place[id] == id) order.push_back(id);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return plan_.buffers[a].room() > plan_.buffers[b].room(); });
    std::vector<size_t> placed;
    for (size_t id : order) {
      Buffer& b = plan_.buffers[id];
      std::vector<std::pair<int64_t, int64_t>> taken;
      for (size_t other : placed) {
        const Buffer& o = plan_.buffers[other];
        if (o.first <= last[id] && b.first <= last[other]) taken.emplace_back(o.offset, o.offset + o.room());
      }
      std::sort(taken.begin(), taken.end());
      b.offset = 0;
      for (const auto& [from, to] : taken) {
        if (b.offset + b.room() <= from) break;
        b.offset = std::max(b.offset, to);
      }
      placed.push_back(id);
      plan_.workspace = std::max(plan_.workspace, b.offset + b.room());
    }
    for (size_t id = 0; id < place.size(); ++id) plan_.buffers[id].offset = plan_.buffers[place[id]].offset;
  }

  const std::vector<Node>& nodes_;
  const Kernels& kernels_;
  std::vector<std::vector<Value>> consumers_;
  std::vector<bool> done_, flat_codes_;  // flat_codes_: of one channel, stored without a gap between pixels
  std::map<std::pair<Value, Rep>, int> stored_;
  Plan plan_;
};

}  // namespace

Plan MakePlan(const Network& network, const Kernels& kernels) { return Planner(network, kernels).Make(); }

}  // namespace lowbit
