// The engine for Python: thin. lowbit/runtime.py checks inputs and names what is wrong; here memory only changes hands.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "lowbit/engine.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace lowbit;

namespace {

using Bytes = nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Codes16 = nb::ndarray<nb::numpy, const int16_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<nb::numpy, const float, nb::c_contig, nb::device::cpu>;

Kind KindOf(const std::string& name) {
  if (name == "bipolar") return Kind::kBipolar;
  if (name == "signed") return Kind::kSigned;
  if (name == "unsigned") return Kind::kUnsigned;
  if (name == "table") return Kind::kTable;
  throw std::invalid_argument("unknown kind of codes '" + name + "'");
}

const char* DtypeName(Dtype dtype) {
  constexpr const char* kNames[] = {"codes", "int32", "float32", "float16"};
  return kNames[int(dtype)];
}

std::vector<float> List(const Floats& x) { return {x.data(), x.data() + x.size()}; }

using MaybeFloats = std::optional<Floats>;

Offsets OffsetsOf(const MaybeFloats& input, const MaybeFloats& weight) {
  return {input ? List(*input) : std::vector<float>{}, weight ? List(*weight) : std::vector<float>{}};
}

template <typename Array>
Weights Shaped(const Array& x) {
  Weights w;
  for (size_t i = 0; i < x.ndim(); ++i) w.shape.push_back(int64_t(x.shape(i)));
  return w;
}

Weights CodeWeights(const Codes16& x, const std::string& kind, int bits, const std::vector<int>& table) {
  Weights w = Shaped(x);
  w.integer = true;
  w.type = {KindOf(kind), bits, table};
  w.codes.assign(x.data(), x.data() + x.size());
  return w;
}

Weights FloatWeights(const Floats& x) {
  Weights w = Shaped(x);
  w.numbers.assign(x.data(), x.data() + x.size());
  return w;
}

nb::tuple ShapeTuple(const Shape& s) {
  return s.image ? nb::make_tuple(s.height, s.width, s.channels) : nb::make_tuple(s.channels);
}

int64_t Elements(const Shape& s) { return s.height * s.width * s.channels; }

int64_t OutputBytes(const ValueType& t, bool is_input) {
  const int64_t size = t.dtype == Dtype::kCodes ? (is_input ? 1 : 2) : t.dtype == Dtype::kFloat16 ? 2 : 4;
  return Elements(t.shape) * size;
}

nb::list PlanList(const Engine& engine) {
  nb::list out;
  for (const StepInfo& s : engine.plan()) {
    nb::dict d;
    d["name"] = s.name;
    d["kernel"] = s.kernel;
    d["isa"] = s.isa;
    d["nodes"] = s.nodes;
    d["values"] = s.values;
    d["macs"] = s.macs;
    d["weight_bytes"] = s.weight_bytes;
    d["bytes"] = s.bytes;
    out.append(d);
  }
  return out;
}

struct Traced {
  std::string name;
  ValueType type;
  std::vector<char> data;
};

// Returns [(name, dtype, shape, bytes)] of every stored value when `trace`.
nb::list Run(const Engine& engine, ConstBytes input, int64_t batch, Bytes output, bool trace) {
  if (batch < 1 || int64_t(input.size()) != batch * OutputBytes(engine.input_type(), true) ||
      int64_t(output.size()) != batch * OutputBytes(engine.output_type(), false)) {
    throw std::invalid_argument("the buffers do not fit the batch");
  }
  std::vector<Traced> traced;
  {
    const nb::gil_scoped_release release;
    const Trace collect = [&](const std::string& name, const ValueType& type, const void* data) {
      const char* from = static_cast<const char*>(data);
      traced.push_back({name, type, {from, from + batch * OutputBytes(type, false)}});
    };
    engine.Run(input.data(), batch, output.data(), trace ? &collect : nullptr);
  }
  nb::list out;
  for (const Traced& t : traced) {
    out.append(nb::make_tuple(t.name, DtypeName(t.type.dtype), ShapeTuple(t.type.shape),
                              nb::bytes(t.data.data(), t.data.size())));
  }
  return out;
}

std::vector<double> Profile(const Engine& engine, ConstBytes input, int64_t batch, Bytes output) {
  if (batch < 1 || int64_t(input.size()) != batch * OutputBytes(engine.input_type(), true) ||
      int64_t(output.size()) != batch * OutputBytes(engine.output_type(), false)) {
    throw std::invalid_argument("the buffers do not fit the batch");
  }
  std::vector<double> seconds(engine.plan().size());
  const nb::gil_scoped_release release;
  engine.Run(input.data(), batch, output.data(), nullptr, &seconds);
  return seconds;
}

nb::tuple TypeTuple(const ValueType& t) { return nb::make_tuple(DtypeName(t.dtype), ShapeTuple(t.shape)); }

}  // namespace

NB_MODULE(_engine, m) {
  m.doc() = "lowbit's native engine; lowbit.runtime is its interface.";
  m.def(
      "release_memory",
      [] {
#ifdef __GLIBC__
        malloc_trim(0);
#endif
      },
      "Gives what the allocator holds unused back to the system.");
  m.def(
      "isas",
      [] {
        nb::list rows;
        for (const IsaInfo& row : Isas()) rows.append(nb::make_tuple(row.name, row.available));
        return rows;
      },
      "Every ISA row, best first: (name, available on this CPU).");
  m.def(
      "peak",
      [](const std::string& isa, double seconds) -> nb::object {
        std::optional<Peak> peak;
        {
          const nb::gil_scoped_release release;
          peak = MeasurePeak(isa, seconds);
        }
        if (!peak) return nb::none();
        return nb::make_tuple(nb::make_tuple(peak->bits.best, peak->bits.mean),
                              nb::make_tuple(peak->integers.best, peak->integers.mean));
      },
      "isa"_a, "seconds"_a,
      "Multiply-accumulates a second of the row's inner loops, ((best, mean) of bits, of integers); None for "
      "scalar.");

  m.def(
      "_debug_guard_pages",
      [](const std::string& side) {
        if (side != "" && side != "behind" && side != "before") throw std::invalid_argument("behind, before or ''");
        DebugGuardPages(side.empty() ? Guard::kNone : side == "behind" ? Guard::kBehind : Guard::kBefore);
      },
      "side"_a);
  m.def("_debug_touch", &DebugTouch, "size"_a, "at"_a);
  m.def("_debug_without", &DebugWithout, "isa"_a);

  nb::class_<Weights>(m, "Weights")
      .def_static("codes", &CodeWeights, "values"_a, "kind"_a, "bits"_a, "table"_a)
      .def_static("floats", &FloatWeights, "values"_a);

  using I2 = std::array<int, 2>;
  using I4 = std::array<int, 4>;
  nb::class_<Builder>(m, "Builder")
      .def(nb::init<>())
      .def("input_uint8", &Builder::InputUint8, "name"_a, "shape"_a, "zero_point"_a)
      .def("input_float32", &Builder::InputFloat32, "name"_a, "shape"_a)
      .def(
          "quantize",
          [](Builder& b, const std::string& name, Value x, const std::string& kind, int bits, float reciprocal) {
            return b.Quantize(name, x, {KindOf(kind), bits, {}}, reciprocal);
          },
          "name"_a, "x"_a, "kind"_a, "bits"_a, "reciprocal"_a)
      .def(
          "conv2d",
          [](Builder& b, const std::string& name, Value x, const Weights& w, I2 stride, I2 dilation, I4 padding,
             int groups, const MaybeFloats& input_offset, const MaybeFloats& weight_offset) {
            return b.Conv2d(name, x, w, {stride, dilation, padding}, groups, OffsetsOf(input_offset, weight_offset));
          },
          "name"_a, "x"_a, "weights"_a, "stride"_a, "dilation"_a, "padding"_a, "groups"_a,
          "input_offset"_a = nb::none(), "weight_offset"_a = nb::none())
      .def(
          "linear",
          [](Builder& b, const std::string& name, Value x, const Weights& w, const MaybeFloats& input_offset,
             const MaybeFloats& weight_offset) { return b.Linear(name, x, w, OffsetsOf(input_offset, weight_offset)); },
          "name"_a, "x"_a, "weights"_a, "input_offset"_a = nb::none(), "weight_offset"_a = nb::none())
      .def(
          "mul", [](Builder& b, const std::string& name, Value x, const Floats& c) { return b.Mul(name, x, List(c)); },
          "name"_a, "x"_a, "factor"_a)
      .def(
          "add", [](Builder& b, const std::string& name, Value x, const Floats& c) { return b.Add(name, x, List(c)); },
          "name"_a, "x"_a, "term"_a)
      .def(
          "add_values", [](Builder& b, const std::string& name, Value x, Value y) { return b.Add(name, x, y); },
          "name"_a, "x"_a, "y"_a)
      .def(
          "prelu",
          [](Builder& b, const std::string& name, Value x, const Floats& c) { return b.Prelu(name, x, List(c)); },
          "name"_a, "x"_a, "slope"_a)
      .def("relu", &Builder::Relu, "name"_a, "x"_a)
      .def("clip", &Builder::Clip, "name"_a, "x"_a, "low"_a, "high"_a)
      .def(
          "cast",
          [](Builder& b, const std::string& name, Value x, const std::string& dtype) {
            if (dtype != "float16" && dtype != "float32")
              throw std::invalid_argument(name + ": casts to float16 or float32");
            return b.Cast(name, x, dtype == "float16" ? Dtype::kFloat16 : Dtype::kFloat32);
          },
          "name"_a, "x"_a, "dtype"_a)
      .def(
          "max_pool",
          [](Builder& b, const std::string& name, Value x, I2 kernel, I2 stride, I4 padding) {
            return b.MaxPool(name, x, kernel, {stride, {1, 1}, padding});
          },
          "name"_a, "x"_a, "kernel"_a, "stride"_a, "padding"_a)
      .def(
          "avg_pool",
          [](Builder& b, const std::string& name, Value x, I2 kernel, I2 stride, I4 padding, bool count_include_pad) {
            return b.AvgPool(name, x, kernel, {stride, {1, 1}, padding}, count_include_pad);
          },
          "name"_a, "x"_a, "kernel"_a, "stride"_a, "padding"_a, "count_include_pad"_a)
      .def("global_avg_pool", &Builder::GlobalAvgPool, "name"_a, "x"_a)
      .def("pixel_shuffle", &Builder::PixelShuffle, "name"_a, "x"_a, "factor"_a)
      .def("resize_bicubic", &Builder::ResizeBicubic, "name"_a, "x"_a, "factor"_a)
      .def("concat", &Builder::Concat, "name"_a, "inputs"_a)
      .def("flatten", &Builder::Flatten, "name"_a, "x"_a)
      .def("output", &Builder::Output, "name"_a, "x"_a);

  nb::class_<Engine>(m, "Engine")
      .def(
          "__init__",
          [](Engine* self, const Builder& builder, int threads, const std::string& isa) {
            new (self) Engine(builder, Options{threads, isa});
          },
          "builder"_a, "threads"_a, "isa"_a)
      .def_prop_ro("input", [](const Engine& e) { return TypeTuple(e.input_type()); })
      .def_prop_ro("output", [](const Engine& e) { return TypeTuple(e.output_type()); })
      .def_prop_ro("isa", &Engine::isa)
      .def_prop_ro("threads", &Engine::threads)
      .def_prop_ro("plan", &PlanList)
      .def("workspace_bytes", &Engine::workspace_bytes, "batch"_a)
      .def("run", &Run, "input"_a, "batch"_a, "output"_a, "trace"_a)
      .def("profile", &Profile, "input"_a, "batch"_a, "output"_a)
      .def("_debug_nudge_thresholds", &Engine::DebugNudgeThresholds, "delta"_a)
      .def("_debug_always_share", &Engine::DebugAlwaysShare);
}
