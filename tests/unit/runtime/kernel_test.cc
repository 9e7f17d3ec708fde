// Compares every kernel of every instruction set of this machine with plain loops, and refuses damaged weights.
// Built with sanitizers by `make sanitize`; weights and activations are allocated to the byte, so that a read outside is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "scratch.h"
#include "sparse_linear.h"

namespace mfcompile {
namespace {

int g_failures = 0;

void expect(bool is_true, const std::string& what) {
  if (is_true) return;
  ++g_failures;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

class ThreadParallel final : public Parallel {
 public:
  void run(void (*task)(void*, size_t), size_t count, void* argument) const override {
    std::vector<std::thread> threads;
    for (size_t first = 0; first < 2; ++first) {
      threads.emplace_back([=] {
        for (size_t index = first; index < count; index += 2) task(argument, index);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
};

struct Case {
  int64_t rows, columns;
  size_t tokens;
  double density;
  int block_rows;
  Encoding encoding;
  bool has_bias;
  bool is_finite;
};

struct Stored {
  std::vector<uint8_t> gaps;
  std::vector<float> values;
  PackedWeight view(const Case& of) const {
    return {of.encoding, ValueType::kFloat, gaps.data(), gaps.size(), values.data(), values.size(), of.rows, of.columns};
  }
};

// The encodings as exporters/packing.py defines them, written again.
Stored pack(const std::vector<float>& dense, Encoding encoding) {
  const size_t limit = encoding == Encoding::kGap8 ? 255 : 15;
  Stored stored;
  std::vector<uint8_t> gaps;
  size_t last = 0;
  for (size_t place = 0; place < dense.size(); ++place) {
    if (dense[place] == 0.0f) continue;
    for (; place - last > limit; last += limit) gaps.push_back(static_cast<uint8_t>(limit)), stored.values.push_back(0.0f);
    gaps.push_back(static_cast<uint8_t>(place - last)), stored.values.push_back(dense[place]);
    last = place;
  }
  if (gaps.empty()) gaps.push_back(0), stored.values.push_back(0.0f);
  if (encoding == Encoding::kGap4 && gaps.size() % 2 && last + 1 < dense.size())
    gaps.push_back(1), stored.values.push_back(0.0f);
  if (encoding == Encoding::kGap8) {
    stored.gaps = gaps;
  } else {
    if (gaps.size() % 2) gaps.pop_back(), stored.values.pop_back();
    for (size_t index = 0; index < gaps.size(); index += 2)
      stored.gaps.push_back(static_cast<uint8_t>(gaps[index] << 4 | gaps[index + 1]));
  }
  stored.gaps.shrink_to_fit();
  stored.values.shrink_to_fit();
  return stored;
}

std::vector<float> decode(const PackedWeight& weight) {
  std::vector<float> dense(static_cast<size_t>(weight.rows * weight.columns), 0.0f);
  for_each_entry(weight, [&](int64_t row, int64_t column, float value) {
    dense[static_cast<size_t>(row * weight.columns + column)] = value;
  });
  return dense;
}

void run_case(const Case& of, const Kernels& kernels, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  std::vector<float> dense(static_cast<size_t>(of.rows * of.columns), 0.0f);
  for (int64_t row = 0; row < of.rows; row += of.block_rows) {
    for (int64_t column = 0; column < of.columns; ++column) {
      if (uniform(random) >= of.density) continue;
      for (int64_t r = row; r < std::min(of.rows, row + of.block_rows); ++r)
        dense[static_cast<size_t>(r * of.columns + column)] = normal(random);
    }
  }
  const Stored stored = pack(dense, of.encoding);
  const PackedWeight weight = stored.view(of);
  expect(find_fault(weight).empty(), "a sound weight is accepted");
  dense = decode(weight);

  const size_t rows = static_cast<size_t>(of.rows), columns = static_cast<size_t>(of.columns);
  std::vector<float> x(of.tokens * columns), bias(rows), y(of.tokens * rows, 7.0f);
  for (float& value : x) value = normal(random);
  for (float& value : bias) value = normal(random);
  if (!of.is_finite && !x.empty()) {
    x[random() % x.size()] = std::numeric_limits<float>::infinity();
    x[random() % x.size()] = -std::numeric_limits<float>::infinity();
    x[random() % x.size()] = std::numeric_limits<float>::quiet_NaN();
  }
  const SparseLinear linear(weight, kernels);
  linear.run(x.data(), of.tokens, of.has_bias ? bias.data() : nullptr, y.data(), ThreadParallel());
  size_t wrong = 0;
  for (size_t token = 0; token < of.tokens; ++token) {
    for (size_t row = 0; row < rows; ++row) {
      double sum = of.has_bias ? bias[row] : 0.0, size = std::abs(sum);
      for (size_t column = 0; column < columns; ++column) {
        const double term = static_cast<double>(x[token * columns + column]) * dense[row * columns + column];
        sum += term, size += std::abs(term);
      }
      const float found = y[token * rows + row];
      const bool is_same = std::isfinite(sum) ? std::abs(found - sum) <= 1e-6 * (size + 1)
                           : std::isnan(sum)  ? std::isnan(found)
                                              : found == sum;
      wrong += !is_same;
    }
  }
  expect(wrong == 0, std::string(kernels.name) + ": " + std::to_string(wrong) + " outputs of (" + std::to_string(of.rows) +
                         ", " + std::to_string(of.columns) + ") with " + std::to_string(of.tokens) + " tokens, density " +
                         std::to_string(of.density) + ", blocks of " + std::to_string(of.block_rows));
}

void test_damage() {
  const Case of{3, 300, 1, 0.5, 1, Encoding::kGap8, false, true};
  std::vector<float> dense(900, 0.0f);
  dense[0] = dense[299] = dense[899] = 1.0f;
  const Stored sound = pack(dense, Encoding::kGap8);
  expect(find_fault(sound.view(of)).empty(), "the sound weight");
  Stored damaged = sound;
  damaged.gaps.back() = 255;
  expect(!find_fault(damaged.view(of)).empty(), "an entry behind the end");
  damaged = sound;
  damaged.gaps[1] = 0;
  expect(!find_fault(damaged.view(of)).empty(), "two entries at one place");
  damaged = sound;
  damaged.gaps.pop_back();
  expect(!find_fault(damaged.view(of)).empty(), "fewer gaps than values");
  damaged = sound;
  damaged.values.clear(), damaged.gaps.clear();
  expect(!find_fault(damaged.view(of)).empty(), "no entries");
  Case wide = of;
  wide.columns = int64_t{1} << 40;
  expect(!find_fault(sound.view(wide)).empty(), "a side that is too long");
  wide.columns = -300;
  expect(!find_fault(sound.view(wide)).empty(), "a negative side");
  Case four = of;
  four.encoding = Encoding::kGap4;
  expect(!find_fault(sound.view(four)).empty(), "gap4 with as many bytes as values");
}

void test_half() {
  expect(half_to_float(0x3c00) == 1.0f && half_to_float(0xc000) == -2.0f && half_to_float(0x0001) == 0x1p-24f, "halves");
  expect(half_to_float(0x7bff) == 65504.0f && half_to_float(0x0400) == 0x1p-14f && std::isinf(half_to_float(0xfc00)), "halves");
  expect(std::isnan(half_to_float(0x7e00)) && std::signbit(half_to_float(0x8000)), "halves");
}

}  // namespace
}  // namespace mfcompile

int main() {
  using namespace mfcompile;
  test_damage();
  test_half();
  std::mt19937 random(7);
  const Kernels* const found[] = {portable_kernels(), avx2_kernels(), avx512_kernels()};
  const int64_t shapes[][2] = {{1, 1}, {1, 300}, {5, 7}, {16, 16}, {17, 129}, {48, 64}, {70, 200}, {530, 33}, {600, 70}};
  const size_t token_counts[] = {0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 130};
  size_t cases = 0;
  for (const Kernels* kernels : found) {
    if (!kernels) continue;
    for (const auto& shape : shapes) {
      for (const size_t tokens : token_counts) {
        for (const double density : {0.0, 0.03, 0.4, 1.0}) {
          const int block_rows = cases % 3 == 0 ? 1 : cases % 3 == 1 ? 4 : 16;
          const Case of{shape[0],       shape[1],      tokens,
                        density,        block_rows,    cases % 5 == 4 && shape[1] > 1 ? Encoding::kGap4 : Encoding::kGap8,
                        cases % 2 == 0, cases % 7 != 6};
          run_case(of, *kernels, random);
          ++cases;
        }
      }
    }
    std::printf("%s: compared\n", kernels->name);
  }
  Scratch::release_all();
  std::printf("%zu cases, %d failures\n", cases, g_failures);
  return g_failures ? 1 : 0;
}
