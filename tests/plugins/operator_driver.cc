// Runs the operators without onnxruntime on every instruction set that the processor has, and compares them with loops
// over the bytes of the layout. Compiled with sanitizers, or for another processor and run in an emulator.
#include <cmath>
#include <cstdlib>
#include <random>

#include "fake_ort.h"

// One translation unit takes a third of the time of nine; the kernels_*.cc are compiled by themselves.
#include "experts/experts.cc"
#include "experts/feed_forward.cc"
#include "experts/routing.cc"
#include "linear/linear.cc"
#include "native/isa.cc"
#include "native/kernels.cc"
#include "native/matrix.cc"
#include "native/op.cc"
#include "native/registry.cc"

namespace {

std::mt19937 source(7);
int failures = 0;

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(source); }

// A matrix with random codes, its bytes, and its numbers as read from the bytes one by one.
struct Weight {
  int64_t rows, columns;
  std::string scheme;
  int64_t group_size;
  std::vector<uint8_t> bytes;
  std::vector<double> numbers;
};

int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

Weight weight(int64_t rows, int64_t columns, const std::string& scheme, int64_t group_size) {
  Weight w{rows, columns, scheme, group_size, {}, std::vector<double>(size_t(rows * columns))};
  const int64_t padded = up_to(columns, 32), groups = scheme == "bf16" ? 0 : group_size ? columns / group_size : 1;
  const int64_t bits = scheme == "int4" ? 4 : scheme == "int8" ? 8 : 16;
  const int64_t scale_bytes = up_to(groups * 16 * 4, 64), panel = scale_bytes + padded * 2 * bits;
  w.bytes.assign(size_t(up_to(rows, 16) / 16 * panel), scheme == "int4" ? 0x88 : 0);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t k = 0; k < columns; ++k) {
      uint8_t* base = w.bytes.data() + n / 16 * panel;
      uint8_t* codes = base + scale_bytes;
      const int64_t lane = n % 16;
      double number = 0;
      if (scheme == "bf16") {
        const float x = uniform(-1, 1);
        uint32_t word;
        std::memcpy(&word, &x, 4);
        const uint16_t top = uint16_t(word >> 16);
        std::memcpy(codes + (k * 16 + lane) * 2, &top, 2);
        word &= 0xFFFF0000;
        float cut;
        std::memcpy(&cut, &word, 4);
        number = cut;
      } else {
        float* scale = reinterpret_cast<float*>(base) + (group_size ? k / group_size : 0) * 16 + lane;
        if (*scale == 0) *scale = uniform(0.01f, 0.1f);
        const int code = bits == 4 ? int(source() % 16) - 8 : int(source() % 256) - 128;
        if (bits == 8) {
          codes[(k / 4 * 16 + lane) * 4 + k % 4] = uint8_t(int8_t(code));
        } else {
          uint8_t& byte = codes[(k / 8 * 16 + lane) * 4 + k % 4];
          byte = k % 8 < 4 ? uint8_t((byte & 0xF0) | (code + 8)) : uint8_t((byte & 0x0F) | (code + 8) << 4);
        }
        number = double(code) * double(*scale);
      }
      w.numbers[size_t(n * columns + k)] = number;
    }
  return w;
}

std::vector<double> product(const Weight& w, const std::vector<double>& x) {
  std::vector<double> y(size_t(w.rows));
  for (int64_t n = 0; n < w.rows; ++n)
    for (int64_t k = 0; k < w.columns; ++k) y[size_t(n)] += w.numbers[size_t(n * w.columns + k)] * x[size_t(k)];
  return y;
}

void compare(const std::string& what, const OrtValue& got, const std::vector<double>& want, double bound) {
  double error = 0, square = 1e-30;
  const float* y = reinterpret_cast<const float*>(got.data.get());
  for (size_t i = 0; i < want.size(); ++i) error = std::max(error, std::fabs(y[i] - want[i])), square += want[i] * want[i];
  error /= std::sqrt(square / double(std::max<size_t>(1, want.size())));
  if (error <= bound) return;
  std::printf("%s: error %g, bound %g\n", what.c_str(), error, bound);
  ++failures;
}

std::vector<float> random_rows(size_t count) {
  std::vector<float> x(count);
  for (float& value : x) value = uniform(-2, 2);
  return x;
}

void try_linear(const std::string& isa, const Weight& w, int64_t rows, const std::string& mode, size_t threads) {
  const std::vector<float> x = random_rows(size_t(rows * w.columns)), bias = random_rows(size_t(w.rows));
  const OrtValue tensors[] = {fake::value(1, {rows, w.columns}, x.data()),
                              fake::value(2, {int64_t(w.bytes.size())}, w.bytes.data()), fake::value(1, {w.rows}, bias.data())};
  OrtKernelInfo info{{{"N", w.rows}, {"K", w.columns}, {"group_size", w.group_size}}, {},
                     {{"scheme", w.scheme}, {"scale_dtype", "float32"}, {"mode", mode}}};
  OrtKernelContext context{{&tensors[0], &tensors[1], &tensors[2]}, {}, threads};
  std::string what = "Linear " + isa + " " + w.scheme + " " + mode + " " + std::to_string(w.rows) + "×" +
                     std::to_string(w.columns) + " rows " + std::to_string(rows);
  const std::string complaint = fake::run("Linear", info, context);
  if (!complaint.empty()) std::printf("%s: %s\n", what.c_str(), complaint.c_str()), ++failures;
  std::vector<double> want;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> y = product(w, std::vector<double>(x.begin() + r * w.columns, x.begin() + (r + 1) * w.columns));
    for (size_t n = 0; n < y.size(); ++n) want.push_back(y[n] + bias[n]);
  }
  if (complaint.empty()) compare(what, context.output, want, mode == "exact" ? 1e-5 : 0.1);
}

// Greedy softmax routing of 2 in 5; gate and up are the same matrix, which the layout's turns of 16 rows do not change.
void try_experts(const std::string& isa, int64_t tokens, const std::string& mode, size_t threads) {
  constexpr int64_t E = 5, H = 40, I = 32, F = 2 * I;
  std::vector<Weight> up, down;
  std::vector<uint8_t> up_bytes, down_bytes;
  for (int64_t e = 0; e < E; ++e) {
    up.push_back(weight(F, H, "int4", 8)), down.push_back(weight(H, I, "int4", 32));
    up_bytes.insert(up_bytes.end(), up.back().bytes.begin(), up.back().bytes.end());
    down_bytes.insert(down_bytes.end(), down.back().bytes.begin(), down.back().bytes.end());
  }
  const std::vector<float> x = random_rows(size_t(tokens * H)), logits = random_rows(size_t(tokens * E));
  const OrtValue tensors[] = {fake::value(1, {tokens, H}, x.data()), fake::value(1, {tokens, E}, logits.data()),
                              fake::value(2, {int64_t(up_bytes.size())}, up_bytes.data()),
                              fake::value(2, {int64_t(down_bytes.size())}, down_bytes.data())};
  OrtKernelInfo info{{{"hidden_size", H}, {"inner_size", I}, {"experts", E}, {"top_k", 2}, {"group_size", 8},
                      {"down_group_size", 32}}, {}, {{"scheme", "int4"}, {"scale_dtype", "float32"}, {"mode", mode}}};
  OrtKernelContext context{{&tensors[0], &tensors[1], &tensors[2], &tensors[3]}, {}, threads};
  const std::string what = "Experts " + isa + " " + mode + " tokens " + std::to_string(tokens);
  const std::string complaint = fake::run("Experts", info, context);
  if (!complaint.empty()) std::printf("%s: %s\n", what.c_str(), complaint.c_str()), ++failures;
  std::vector<double> want(size_t(tokens * H));
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> row(x.begin() + t * H, x.begin() + (t + 1) * H), scores(E);
    double sum = 0;
    for (int64_t e = 0; e < E; ++e) sum += scores[size_t(e)] = std::exp(double(logits[size_t(t * E + e)]));
    for (int64_t e = 0; e < E; ++e) {
      int64_t larger = 0;
      for (double other : scores) larger += other > scores[size_t(e)];
      if (larger >= 2) continue;
      const std::vector<double> g = product(up[size_t(e)], row);
      std::vector<double> hidden(I);
      for (size_t i = 0; i < size_t(I); ++i) {
        const double gate = g[i / 16 * 32 + i % 16], other = g[i / 16 * 32 + 16 + i % 16];
        hidden[i] = gate / (1 + std::exp(-gate)) * other;
      }
      const std::vector<double> y = product(down[size_t(e)], hidden);
      for (int64_t h = 0; h < H; ++h) want[size_t(t * H + h)] += y[size_t(h)] * scores[size_t(e)] / sum;
    }
  }
  if (complaint.empty()) compare(what, context.output, want, mode == "exact" ? 1e-5 : 0.3);
}

}  // namespace

int main() {
  const Weight weights[] = {weight(7, 40, "int4", 8), weight(37, 320, "int4", 64), weight(33, 64, "int8", 32),
                            weight(16, 301, "int8", 0), weight(20, 44, "bf16", 0)};
  for (vl2::Isa isa : vl2::available_isas()) {
    const std::string name = vl2::name_of(isa);
    setenv("VL2_CPU_ISA", name.c_str(), 1);
    for (const std::string mode : {"exact", "fast"}) {
      for (const Weight& w : weights)
        for (int64_t rows : {0, 1, 2, 15, 40, 100}) try_linear(name, w, rows, mode, 1 + size_t(rows) % 3);
      for (int64_t tokens : {0, 1, 3, 120}) try_experts(name, tokens, mode, 1 + size_t(tokens) % 3);
    }
    std::printf("%s done\n", name.c_str());
  }
  return failures == 0 ? 0 : 1;
}
