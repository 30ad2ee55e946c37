// The lowbit engine: build a network node by node, then run it. docs/OPS.md says what every op means.
//
//   lowbit::Builder b;
//   auto x = b.InputUint8("image", {28, 28, 1}, {73});
//   auto y = b.Conv2d("conv1", x, weights, {.stride = {1, 1}}, /*groups=*/1);
//   ...
//   b.Output("logits", y);
//   lowbit::Engine engine(b, {.threads = 2});
//   engine.Run(images, 8, logits);
//
// Every shape, range and constant is checked while building: std::invalid_argument names the node.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace lowbit {

enum class Kind : uint8_t { kBipolar, kSigned, kUnsigned, kTable };
enum class Dtype : uint8_t { kCodes, kInt32, kFloat32, kFloat16 };

struct Codes {
  Kind kind = Kind::kBipolar;
  int bits = 1;
  std::vector<int> table = {};
  bool operator==(const Codes&) const = default;
};

// (H, W, C), or (C) as 1 x 1 x C with `image` false.
struct Shape {
  int64_t height = 1, width = 1, channels = 1;
  bool image = false;
  bool operator==(const Shape&) const = default;
};

struct ValueType {
  Dtype dtype = Dtype::kFloat32;
  Shape shape;
  Codes codes;                  // dtype kCodes only
  std::vector<int> zero_point;  // one per channel, empty where 0; pixels only
};

// Weights of a conv2d (O, kH, kW, I) or linear (O, I): integer codes with their type, or float32 numbers.
struct Weights {
  std::vector<int64_t> shape;
  bool integer = false;
  Codes type;
  std::vector<int16_t> codes;
  std::vector<float> numbers;
};

// What a conv2d or linear of codes adds to the integers it reads: the input's code c stands for c + input, the weight's
// code for filter o for c + weight[o]. Empty: 0.
struct Offsets {
  std::vector<float> input;   // none or one number
  std::vector<float> weight;  // none, one number, or one for each filter
};

struct Geometry {
  std::array<int, 2> stride = {1, 1};
  std::array<int, 2> dilation = {1, 1};
  std::array<int, 4> padding = {0, 0, 0, 0};  // top, left, bottom, right
};

using Value = int;
struct Network;  // what a Builder has collected

class Builder {
 public:
  Builder();
  ~Builder();
  Builder(Builder&&) noexcept;
  Builder& operator=(Builder&&) noexcept;

  Value InputUint8(const std::string& name, const std::vector<int64_t>& shape, const std::vector<int>& zero_point);
  Value InputFloat32(const std::string& name, const std::vector<int64_t>& shape);
  Value Quantize(const std::string& name, Value x, const Codes& codes, float reciprocal);
  Value Conv2d(const std::string& name, Value x, Weights weights, const Geometry& geometry, int groups,
               Offsets offsets = {});
  Value Linear(const std::string& name, Value x, Weights weights, Offsets offsets = {});
  Value Mul(const std::string& name, Value x, std::vector<float> factor);
  Value Add(const std::string& name, Value x, std::vector<float> term);
  Value Add(const std::string& name, Value x, Value y);
  Value Prelu(const std::string& name, Value x, std::vector<float> slope);
  Value Relu(const std::string& name, Value x);
  Value Clip(const std::string& name, Value x, float low, float high);
  Value Cast(const std::string& name, Value x, Dtype dtype);
  Value MaxPool(const std::string& name, Value x, std::array<int, 2> kernel, const Geometry& geometry);
  Value AvgPool(const std::string& name, Value x, std::array<int, 2> kernel, const Geometry& geometry,
                bool count_include_pad);
  Value GlobalAvgPool(const std::string& name, Value x);
  Value PixelShuffle(const std::string& name, Value x, int factor);
  Value ResizeBicubic(const std::string& name, Value x, int factor);
  Value Concat(const std::string& name, const std::vector<Value>& inputs);
  Value Flatten(const std::string& name, Value x);
  Value Output(const std::string& name, Value x);

  const ValueType& type(Value x) const;

 private:
  friend class Engine;
  std::shared_ptr<Network> network_;
};

// One fused step of a plan.
struct StepInfo {
  std::string name;                 // the last node it computes
  std::string kernel;               // bit_conv, byte_gemm, int_gemm, code_sums, float_gemm, depthwise, pool, ...
  std::string isa;                  // the row whose kernel runs
  std::vector<std::string> nodes;   // every node it covers
  std::vector<std::string> values;  // the values it stores
  int64_t macs = 0;                 // per image
  int64_t weight_bytes = 0;         // packed, as the engine holds them
  int64_t bytes = 0;                // activations written, per image
};

struct Options {
  int threads = 1;
  std::string isa = {};  // empty: the best this CPU has
};

// Called with every value the plan stores, right after the step that does: its name, its type and all images of the
// batch, dense NHWC; codes as int16. A value stored in two forms comes twice.
using Trace = std::function<void(const std::string& name, const ValueType& type, const void* data)>;

// Safe to use from several threads at once: with threads = 1 runs go on side by side, each in its own workspace; with
// more, the engine's pool serves one run after the other.
class Engine {
 public:
  Engine(const Builder& builder, const Options& options);
  ~Engine();
  Engine(Engine&&) noexcept;

  const ValueType& input_type() const;
  const ValueType& output_type() const;  // codes leave as int16
  const std::string& isa() const;
  int threads() const;
  const std::vector<StepInfo>& plan() const;
  int64_t workspace_bytes(int64_t batch) const;

  // `input`: batch dense NHWC images, uint8 or finite float32. `output`: room for batch dense NHWC results. `trace` and
  // `seconds` (one entry a step, added to) may be null. Throws std::invalid_argument for batch < 1.
  void Run(const void* input, int64_t batch, void* output, const Trace* trace = nullptr,
           std::vector<double>* seconds = nullptr) const;

  // For tests only: moves every integer threshold, so that a comparison can be seen to fail. Returns how many there
  // were.
  int64_t DebugNudgeThresholds(int delta);

  // For tests only: shares every step among the threads, however small it is.
  void DebugAlwaysShare();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

struct IsaInfo {
  std::string name;
  bool available;
};
std::vector<IsaInfo> Isas();  // best first

// Multiply-accumulates a second: in the fastest slice of time, and over the whole time, which is far less where others
// use the core.
struct Speed {
  double best = 0, mean = 0;
};

// What one core does at most: the inner loops of an ISA row on registers alone, of 1-bit products and of integer ones.
struct Peak {
  Speed bits, integers;
};

// Measures for about `seconds`. Nothing for a row in portable C++: its instructions are the compiler's choice. Throws
// std::invalid_argument for an unknown row and for one that this CPU can't run; an empty name is the best row.
std::optional<Peak> MeasurePeak(const std::string& isa, double seconds);

// --- for tests only ---

// From now on every buffer and constant of an engine lies against a page that nobody may touch: in front of it, or
// behind it and its slack. Each buffer of a run then has memory of its own, filled with garbage before the run.
enum class Guard : uint8_t { kNone, kBehind, kBefore };
void DebugGuardPages(Guard side);

// Reads the byte `at` of a fresh buffer of `size` bytes: shows that an over-read is seen.
int DebugTouch(int64_t size, int64_t at);

// As if this CPU lacked every feature that row `isa` needs; an empty name ends that. Throws std::invalid_argument for
// an unknown row.
void DebugWithout(const std::string& isa);

}  // namespace lowbit
