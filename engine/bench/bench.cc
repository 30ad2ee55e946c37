// Times the 1-bit 3x3 layers on every ISA row of this CPU; also shows that the engine stands alone, without Python.
//   cmake -S . -B build/bench -DLOWBIT_PYTHON=OFF -DLOWBIT_BENCH=ON && cmake --build build/bench &&
//   build/bench/lowbit_bench
#include <algorithm>
#include <cstdio>
#include <random>
#include <vector>

#include "lowbit/engine.h"

namespace {

using namespace lowbit;

std::vector<int16_t> Signs(std::mt19937& random, size_t count) {
  std::vector<int16_t> out(count);
  for (int16_t& s : out) s = random() & 1 ? 1 : -1;
  return out;
}

Weights SignWeights(std::mt19937& random, int64_t filters, int64_t side, int64_t channels) {
  Weights w;
  w.shape = {filters, side, side, channels};
  w.integer = true;
  w.type = {Kind::kBipolar, 1, {}};
  w.codes = Signs(random, size_t(filters * side * side * channels));
  return w;
}

// Seconds of one layer, bits in and bits out: the median.
double Time(const std::string& isa, int64_t channels, int64_t side) {
  std::mt19937 random(1);
  Builder b;
  const Codes sign = {Kind::kBipolar, 1, {}};
  const Value x = b.InputFloat32("x", {side, side, channels});
  const Value q = b.Quantize("q", x, sign, 1);
  const Geometry same = {{1, 1}, {1, 1}, {1, 1, 1, 1}};
  const Value c = b.Conv2d("layer", q, SignWeights(random, channels, 3, channels), same, 1);
  const Value m = b.Mul("mul", c, std::vector<float>(size_t(channels), 0.01f));
  const Value r = b.Quantize("bits", b.Add("add", m, std::vector<float>(size_t(channels), 0.1f)), sign, 1);
  const Value last = b.Conv2d("last", r, SignWeights(random, 1, 1, channels), {}, 1);
  b.Output("y", last);
  const Engine engine(b, {1, isa});
  size_t step = 0;
  while (engine.plan()[step].name != "bits") ++step;
  std::vector<float> input(size_t(side * side * channels));
  for (float& v : input) v = random() & 1 ? 1.0f : -1.0f;
  std::vector<int32_t> output(size_t(side * side));
  std::vector<double> times;
  for (int i = 0; i < 200; ++i) {
    std::vector<double> seconds(engine.plan().size());
    engine.Run(input.data(), 1, output.data(), nullptr, &seconds);
    times.push_back(seconds[step]);
  }
  std::nth_element(times.begin(), times.begin() + 100, times.end());
  return times[100];
}

}  // namespace

int main() {
  std::printf("%-14s%-10s%10s%12s\n", "layer", "isa", "us", "GMAC/s");
  const int64_t layers[][2] = {{64, 56}, {128, 28}, {256, 14}, {512, 7}, {16, 32}, {32, 16}, {64, 8}};
  for (const auto& [channels, side] : layers) {
    for (const IsaInfo& row : Isas()) {
      if (!row.available) continue;
      const double seconds = Time(row.name, channels, side);
      const double macs = 9.0 * double(channels * channels * side * side);
      std::printf("%4lld ch @%-5lld%-10s%10.1f%12.0f\n", static_cast<long long>(channels), static_cast<long long>(side),
                  row.name.c_str(), seconds * 1e6, macs / seconds / 1e9);
    }
  }
}
