// Compares every int8 kernel of every instruction set of this machine with plain loops, and refuses damaged weights. Built with
// sanitizers by `make sanitize`; what kernels read is allocated to the byte, so that a read outside is seen.
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "int8_linear.h"
#include "scratch.h"

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
  int block;
  Encoding encoding;
  bool has_bias;
  bool is_finite;
};

struct Stored {
  std::vector<uint8_t> gaps;
  std::vector<int8_t> values;
  PackedInt8 view(const Case& of) const {
    return {of.encoding, gaps.data(), gaps.size(), values.data(), values.size() / static_cast<size_t>(of.block), of.block,
            of.rows, of.columns};
  }
};

// The encodings as exporters/quantization.py defines them, written again.
Stored pack(const std::vector<int8_t>& dense, const Case& of) {
  const size_t limit = of.encoding == Encoding::kGap8 ? 255 : 15, block = static_cast<size_t>(of.block);
  const size_t places = dense.size() / block;
  std::vector<size_t> stored;
  for (size_t place = 0; place < places; ++place) {
    bool is_kept = place == 0;  // always stored, so that there is an entry
    for (size_t i = 0; i < block; ++i) is_kept |= dense[place * block + i] != 0;
    is_kept |= !stored.empty() && place - stored.back() == limit;
    is_kept |= of.encoding == Encoding::kGap4 && place + 1 == places && stored.size() % 2 == 1;
    if (is_kept) stored.push_back(place);
  }
  if (of.encoding == Encoding::kGap4 && stored.size() % 2) stored.pop_back();  // the last place: what it held is lost
  Stored result;
  for (size_t index = 0; index < stored.size(); ++index) {
    const size_t gap = index ? stored[index] - stored[index - 1] : stored[0];
    if (of.encoding == Encoding::kGap8) {
      result.gaps.push_back(static_cast<uint8_t>(gap));
    } else if (index % 2) {
      result.gaps.back() = static_cast<uint8_t>(result.gaps.back() | gap);
    } else {
      result.gaps.push_back(static_cast<uint8_t>(gap << 4));
    }
    for (size_t i = 0; i < block; ++i) result.values.push_back(dense[stored[index] * block + i]);
  }
  result.gaps.shrink_to_fit();
  result.values.shrink_to_fit();
  return result;
}

std::vector<int8_t> decode(const PackedInt8& weight) {
  std::vector<int8_t> dense(static_cast<size_t>(weight.rows * weight.columns), 0);
  for_each_group(weight, [&](int64_t row, int64_t group, uint32_t word) {
    for (int64_t byte = 0; byte < kGroup && group * kGroup + byte < weight.columns; ++byte) {
      dense[static_cast<size_t>(row * weight.columns + group * kGroup + byte)] = static_cast<int8_t>(word >> 8 * byte);
    }
  });
  return dense;
}

void run_case(const Case& of, const Int8Kernels& kernels, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<double> uniform;
  const size_t rows = static_cast<size_t>(of.rows), columns = static_cast<size_t>(of.columns);
  std::vector<int8_t> dense(rows * columns, 0);
  for (int8_t& value : dense) {
    if (uniform(random) < of.density) value = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  }
  const Stored stored = pack(dense, of);
  const PackedInt8 weight = stored.view(of);
  expect(find_fault(weight).empty(), "a sound weight is accepted");
  dense = decode(weight);

  std::vector<float> x(of.tokens * columns), scales(rows), bias(rows), y(of.tokens * rows, 7.0f);
  for (float& value : x) value = normal(random);
  for (float& value : scales) value = static_cast<float>(uniform(random)) + 0.01f;
  for (float& value : bias) value = normal(random);
  const bool is_finite = of.is_finite || x.empty();
  if (!is_finite) x[random() % x.size()] = random() % 2 ? std::numeric_limits<float>::quiet_NaN() : INFINITY;
  const SparseLinearInt8 linear(weight, scales.data(), kernels);
  linear.run(x.data(), of.tokens, of.has_bias ? bias.data() : nullptr, y.data(), ThreadParallel());

  float low = 0, high = 0;
  for (const float value : x) low = std::min(low, value), high = std::max(high, value);
  const Quantization by = choose_quantization(low, high);
  size_t wrong = 0;
  for (size_t token = 0; token < of.tokens; ++token) {
    for (size_t row = 0; row < rows; ++row) {
      int64_t sum = 0;
      for (size_t column = 0; is_finite && column < columns; ++column) {
        const float rounded = std::nearbyint(x[token * columns + column] / by.scale) + static_cast<float>(by.zero);
        sum += static_cast<int64_t>(std::min(255.0f, std::max(0.0f, rounded)) - static_cast<float>(by.zero)) *
               dense[row * columns + column];
      }
      volatile float factor = by.scale * scales[row];  // each operation is rounded
      volatile float product = static_cast<float>(sum) * factor;
      const float wanted = product + (of.has_bias ? bias[row] : 0.0f), found = y[token * rows + row];
      wrong += is_finite ? found != wanted : !std::isnan(found);
    }
  }
  expect(wrong == 0, std::string(kernels.name) + ": " + std::to_string(wrong) + " outputs of (" + std::to_string(of.rows) +
                         ", " + std::to_string(of.columns) + ") with " + std::to_string(of.tokens) + " tokens, density " +
                         std::to_string(of.density) + ", blocks of " + std::to_string(of.block));
}

void test_damage() {
  const Case of{3, 300, 1, 0.5, 4, Encoding::kGap8, false, true};
  std::vector<int8_t> dense(900, 0);
  dense[0] = dense[299] = dense[899] = 1;
  const Stored sound = pack(dense, of);
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
  Case other = of;
  other.columns = 301;
  expect(!find_fault(sound.view(other)).empty(), "no whole blocks");
  other.columns = int64_t{1} << 40;
  expect(!find_fault(sound.view(other)).empty(), "a side that is too long");
  other.columns = -300;
  expect(!find_fault(sound.view(other)).empty(), "a negative side");
}

}  // namespace
}  // namespace mfcompile

int main() {
  using namespace mfcompile;
  test_damage();
  std::mt19937 random(7);
  const Int8Kernels* const found[] = {int8_portable_kernels(), int8_avx2_kernels(), int8_avxvnni_kernels(),
                                      int8_avx512_kernels()};
  const int64_t shapes[][2] = {{1, 1}, {1, 300}, {5, 7}, {16, 16}, {17, 129}, {48, 64}, {70, 520}, {530, 33}, {600, 70}};
  const size_t token_counts[] = {0, 1, 2, 3, 5, 8, 9, 16, 17, 24, 25, 33, 130};
  size_t cases = 0;
  for (const Int8Kernels* kernels : found) {
    if (!kernels) continue;
    for (const auto& shape : shapes) {
      for (const size_t tokens : token_counts) {
        for (const double density : {0.0, 0.03, 0.2, 1.0}) {
          const int block = cases % 2 && shape[1] % 4 == 0 ? 4 : 1;
          const bool is_gap4 = cases % 5 == 4 && shape[0] * shape[1] / block > 1;
          run_case({shape[0], shape[1], tokens, density, block, is_gap4 ? Encoding::kGap4 : Encoding::kGap8, cases % 3 != 0,
                    cases % 7 != 6},
                   *kernels, random);
          ++cases;
        }
      }
    }
    std::printf("int8 %s: compared\n", kernels->name);
  }
  Scratch::release_all();
  std::printf("%zu int8 cases, %d failures\n", cases, g_failures);
  return g_failures ? 1 : 0;
}
