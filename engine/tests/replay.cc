// Builds and runs networks from a file, without Python, and writes down every value they store: for machines where the
// Python module does not run, as ARM under qemu. tests/test_arm.py writes the one file and reads the other.
//   lowbit_replay CASES RESULTS
//
// Both files are sequences of fields, each a byte that says what it is, then little-endian numbers:
//   s text: uint32 length, bytes       i one integer: int64            f one float32
//   I integers: uint32 count, int64    H integers: uint32 count, int16    F floats: uint32 count, float32
//   B bytes: uint32 count, bytes       - nothing (an optional argument left out)
//
// CASES holds calls: a name (s) and its arguments.
//   network                      begins a network
//   input_uint8, quantize, ...   adds a node: the methods of the Python module's Builder, with their arguments. Weights
//                                are codes(I shape, H values, s kind, i bits, I table) or floats(I shape, F values)
//   run                          s isa, i threads, i nudge (of every integer threshold), i batch, B input
// RESULTS has, for every run:    s isa, I (count of steps), s kernel of each; I (count of stored values), for each
//                                s name, s dtype, B values; B output
//
// Runs come upon the worst floating-point mode a caller can be in, and must leave it so.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "lowbit/engine.h"

namespace {

using namespace lowbit;

// --- fields ---

class Reader {
 public:
  explicit Reader(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("can't read " + path);
    data_.assign(std::istreambuf_iterator<char>(file), {});
  }
  bool done() const { return at_ == data_.size(); }

  std::string Text() {
    const std::vector<char> s = Many<char>('s');
    return {s.begin(), s.end()};
  }
  int64_t Integer() { return One<int64_t>('i'); }
  int Int() { return int(Integer()); }
  float Number() { return One<float>('f'); }
  std::vector<int64_t> Integers() { return Many<int64_t>('I'); }
  std::vector<int> Ints() {
    const std::vector<int64_t> x = Integers();
    return {x.begin(), x.end()};
  }
  template <size_t N>
  std::array<int, N> Ints() {
    const std::vector<int> x = Ints();
    if (x.size() != N) throw std::runtime_error("expected " + std::to_string(N) + " integers" + Place());
    std::array<int, N> out{};
    std::copy(x.begin(), x.end(), out.begin());
    return out;
  }
  std::vector<int16_t> Halves() { return Many<int16_t>('H'); }
  std::vector<float> Numbers() { return Many<float>('F'); }
  std::vector<float> MaybeNumbers() {
    if (done() || data_[at_] != '-') return Numbers();
    ++at_;
    return {};
  }
  std::vector<char> Bytes() { return Many<char>('B'); }

 private:
  std::string Place() const { return " before byte " + std::to_string(at_); }

  void Take(void* to, size_t bytes) {
    if (bytes > data_.size() - at_) throw std::runtime_error("the file ends within a field" + Place());
    if (bytes > 0) std::memcpy(to, data_.data() + at_, bytes);
    at_ += bytes;
  }

  template <typename T>
  T One(char tag) {
    Tag(tag);
    T value;
    Take(&value, sizeof value);
    return value;
  }

  template <typename T>
  std::vector<T> Many(char tag) {
    const uint32_t count = One<uint32_t>(tag);
    if (count > (data_.size() - at_) / sizeof(T)) throw std::runtime_error("the file ends within a field" + Place());
    std::vector<T> values(count);
    Take(values.data(), count * sizeof(T));
    return values;
  }

  void Tag(char tag) {
    char found = 0;
    Take(&found, 1);
    if (found != tag) {
      throw std::runtime_error(std::string("expected field '") + tag + "', found '" + found + "'" + Place());
    }
  }

  std::vector<char> data_;
  size_t at_ = 0;
};

class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path, std::ios::binary) { file_.exceptions(~std::ios::goodbit); }

  void Text(const std::string& s) { Put('s', s.data(), s.size(), 1); }
  void Count(size_t count) {
    const int64_t n = int64_t(count);
    Put('I', &n, 1, sizeof n);
  }
  void Bytes(const std::vector<char>& x) { Put('B', x.data(), x.size(), 1); }
  void Close() { file_.close(); }

 private:
  void Put(char tag, const void* data, size_t count, size_t size) {
    const uint32_t n = uint32_t(count);
    if (n != count) throw std::runtime_error("a field is larger than 4 GiB");
    file_.put(tag);
    file_.write(reinterpret_cast<const char*>(&n), sizeof n);
    file_.write(static_cast<const char*>(data), std::streamsize(count * size));
  }

  std::ofstream file_;
};

// --- the mode of floating-point arithmetic ---

#if defined(__x86_64__)
using Mode = uint32_t;
Mode GetMode() { return _mm_getcsr() & ~0x3fu; }  // without the sticky flags
void SetMode(Mode mode) { _mm_setcsr(mode); }
constexpr Mode kWorst = 0xffc0;  // towards 0, flush to zero, denormals are zero
#elif defined(__aarch64__)
using Mode = uint64_t;
Mode GetMode() {
  Mode mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void SetMode(Mode mode) { __asm__ volatile("msr fpcr, %0" ::"r"(mode)); }
constexpr Mode kWorst = 0x7c00000;  // towards 0, flush to zero, default NaN, alternative halves
#endif

class WorstMode {
 public:
  WorstMode() : saved_(GetMode()) { SetMode(kWorst); }
  ~WorstMode() { SetMode(saved_); }
  WorstMode(const WorstMode&) = delete;
  WorstMode& operator=(const WorstMode&) = delete;
  void Check(const char* what) const {
    if (GetMode() != kWorst) throw std::logic_error(std::string(what) + " changed the caller's floating-point mode");
  }

 private:
  Mode saved_;
};

// --- calls ---

Kind KindOf(const std::string& name) {
  constexpr const char* kNames[] = {"bipolar", "signed", "unsigned", "table"};
  for (int k = 0; k < 4; ++k) {
    if (name == kNames[k]) return Kind(k);
  }
  throw std::runtime_error("unknown kind of codes '" + name + "'");
}

const char* DtypeName(Dtype dtype) {
  constexpr const char* kNames[] = {"codes", "int32", "float32", "float16"};
  return kNames[int(dtype)];
}

Weights ReadWeights(Reader& r) {
  const std::string form = r.Text();
  Weights w;
  w.shape = r.Integers();
  if (form == "codes") {
    w.integer = true;
    w.codes = r.Halves();
    w.type.kind = KindOf(r.Text());
    w.type.bits = r.Int();
    w.type.table = r.Ints();
  } else if (form == "floats") {
    w.numbers = r.Numbers();
  } else {
    throw std::runtime_error("unknown form of weights '" + form + "'");
  }
  return w;
}

// The arguments of a node, in order: C++ leaves the order of evaluation within a call open.
void AddNode(Builder& b, const std::string& op, Reader& r) {
  const std::string name = r.Text();
  if (op == "input_uint8") {
    const std::vector<int64_t> shape = r.Integers();
    b.InputUint8(name, shape, r.Ints());
    return;
  }
  if (op == "input_float32") {
    b.InputFloat32(name, r.Integers());
    return;
  }
  if (op == "concat") {
    b.Concat(name, r.Ints());
    return;
  }
  const Value x = r.Int();
  if (op == "quantize") {
    Codes codes;
    codes.kind = KindOf(r.Text());
    codes.bits = r.Int();
    b.Quantize(name, x, codes, r.Number());
  } else if (op == "conv2d") {
    Weights w = ReadWeights(r);
    Geometry g;
    g.stride = r.Ints<2>();
    g.dilation = r.Ints<2>();
    g.padding = r.Ints<4>();
    const int groups = r.Int();
    Offsets offsets;
    offsets.input = r.MaybeNumbers();
    offsets.weight = r.MaybeNumbers();
    b.Conv2d(name, x, std::move(w), g, groups, std::move(offsets));
  } else if (op == "linear") {
    Weights w = ReadWeights(r);
    Offsets offsets;
    offsets.input = r.MaybeNumbers();
    offsets.weight = r.MaybeNumbers();
    b.Linear(name, x, std::move(w), std::move(offsets));
  } else if (op == "mul") {
    b.Mul(name, x, r.Numbers());
  } else if (op == "add") {
    b.Add(name, x, r.Numbers());
  } else if (op == "add_values") {
    b.Add(name, x, r.Int());
  } else if (op == "prelu") {
    b.Prelu(name, x, r.Numbers());
  } else if (op == "relu") {
    b.Relu(name, x);
  } else if (op == "clip") {
    const float low = r.Number();
    b.Clip(name, x, low, r.Number());
  } else if (op == "cast") {
    b.Cast(name, x, r.Text() == "float16" ? Dtype::kFloat16 : Dtype::kFloat32);
  } else if (op == "max_pool" || op == "avg_pool") {
    const std::array<int, 2> kernel = r.Ints<2>();
    Geometry g;
    g.stride = r.Ints<2>();
    g.padding = r.Ints<4>();
    if (op == "max_pool") {
      b.MaxPool(name, x, kernel, g);
    } else {
      b.AvgPool(name, x, kernel, g, r.Int() != 0);
    }
  } else if (op == "global_avg_pool") {
    b.GlobalAvgPool(name, x);
  } else if (op == "pixel_shuffle") {
    b.PixelShuffle(name, x, r.Int());
  } else if (op == "resize_bicubic") {
    b.ResizeBicubic(name, x, r.Int());
  } else if (op == "flatten") {
    b.Flatten(name, x);
  } else if (op == "output") {
    b.Output(name, x);
  } else {
    throw std::runtime_error("unknown call '" + op + "'");
  }
}

size_t Bytes(const ValueType& t, int64_t batch, bool is_input) {
  const int64_t size = t.dtype == Dtype::kCodes ? (is_input ? 1 : 2) : t.dtype == Dtype::kFloat16 ? 2 : 4;
  return size_t(batch * t.shape.height * t.shape.width * t.shape.channels * size);
}

void Run(const Builder& b, Reader& r, Writer& results) {
  Options options;
  options.isa = r.Text();
  options.threads = r.Int();
  const int64_t nudge = r.Integer(), batch = r.Integer();
  const std::vector<char> input = r.Bytes();

  struct Stored {
    std::string name;
    Dtype dtype;
    std::vector<char> data;
  };
  std::vector<Stored> stored;
  const Trace trace = [&](const std::string& name, const ValueType& type, const void* data) {
    const char* from = static_cast<const char*>(data);
    stored.push_back({name, type.dtype, {from, from + Bytes(type, batch, false)}});
  };
  std::vector<char> output;
  std::optional<Engine> engine;
  {
    const WorstMode mode;
    engine.emplace(b, options);
    mode.Check("loading");
    if (nudge != 0 && engine->DebugNudgeThresholds(int(nudge)) == 0) throw std::runtime_error("no threshold to nudge");
    if (options.threads > 1) engine->DebugAlwaysShare();
    if (input.size() != Bytes(engine->input_type(), batch, true))
      throw std::runtime_error("the input has another size");
    output.resize(Bytes(engine->output_type(), batch, false));
    engine->Run(input.data(), batch, output.data(), &trace);
    mode.Check("running");
  }
  results.Text(engine->isa());
  results.Count(engine->plan().size());
  for (const StepInfo& step : engine->plan()) results.Text(step.kernel);
  results.Count(stored.size());
  for (const Stored& s : stored) {
    results.Text(s.name);
    results.Text(DtypeName(s.dtype));
    results.Bytes(s.data);
  }
  results.Bytes(output);
}

void Replay(const std::string& cases, const std::string& to) {
  Reader r(cases);
  Writer results(to);
  Builder b;
  for (int network = -1; !r.done();) {
    const std::string call = r.Text();
    try {
      if (call == "network") {
        b = Builder();
        ++network;
      } else if (call == "run") {
        Run(b, r, results);
      } else {
        AddNode(b, call, r);
      }
    } catch (const std::exception& error) {
      throw std::runtime_error("network " + std::to_string(network) + ", " + call + ": " + error.what());
    }
  }
  results.Close();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: lowbit_replay CASES RESULTS\n");
    return 2;
  }
  try {
    Replay(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
