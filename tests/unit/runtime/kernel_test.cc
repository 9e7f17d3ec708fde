// Compares every kernel of every instruction set of this machine with plain loops, refuses damaged weights, and feeds it bytes
// at random. Built with sanitizers by `make sanitize`; weights and activations are allocated to the byte, so that a read
// outside is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "packed_model.h"
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
  explicit ThreadParallel(size_t threads) : threads_(threads) {}
  void run(void (*task)(void*, size_t), size_t count, void* argument) const override {
    std::vector<std::thread> threads;
    for (size_t first = 0; first < threads_; ++first) {
      threads.emplace_back([=] {
        for (size_t index = first; index < count; index += threads_) task(argument, index);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  size_t threads_;
};

struct Case {
  int64_t rows, columns;
  size_t tokens;
  double density;
  int block_rows;
  Encoding encoding;
  ValueType value_type;
  bool has_bias;
  bool is_finite;
};

// How many outputs are not those of a dense product with `dense` (rows, columns).
size_t count_wrong(const std::vector<float>& dense, size_t rows, size_t columns, const std::vector<float>& x, const float* bias,
                   const std::vector<float>& y) {
  size_t wrong = 0;
  for (size_t token = 0; token * columns < x.size(); ++token) {
    for (size_t row = 0; row < rows; ++row) {
      double sum = bias ? bias[row] : 0.0, size = std::abs(sum);
      for (size_t column = 0; column < columns; ++column) {
        const double term = static_cast<double>(x[token * columns + column]) * dense[row * columns + column];
        sum += term, size += std::abs(term);
      }
      const float found = y[token * rows + row];
      const bool is_same = std::isfinite(sum) ? std::abs(found - sum) <= 1e-6 * (size + 1)
                           : std::isnan(sum)  ? std::isnan(found)
                                              : found == static_cast<float>(sum);
      wrong += !is_same;
    }
  }
  return wrong;
}

std::string name_of(const Case& of) {
  return "(" + std::to_string(of.rows) + ", " + std::to_string(of.columns) + ") with " + std::to_string(of.tokens) +
         " tokens, density " + std::to_string(of.density) + ", blocks of " + std::to_string(of.block_rows) + ", encoding " +
         std::to_string(static_cast<int>(of.encoding)) + ", type " + std::to_string(static_cast<int>(of.value_type));
}

uint16_t random_half(std::mt19937& random) {  // finite, not zero, of moderate size
  return static_cast<uint16_t>((random() & 1) << 15 | (10 + random() % 8) << 10 | (random() & 1023));
}

std::vector<uint16_t> random_weight(const Case& of, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  std::vector<uint16_t> dense(static_cast<size_t>(of.rows * of.columns), 0);
  for (int64_t row = 0; row < of.rows; row += of.block_rows) {
    for (int64_t column = 0; column < of.columns; ++column) {
      if (uniform(random) >= of.density) continue;
      for (int64_t r = row; r < std::min(of.rows, row + of.block_rows); ++r)
        dense[static_cast<size_t>(r * of.columns + column)] = random_half(random);
    }
  }
  return dense;
}

void run_case(const Case& of, const Kernels& kernels, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const Stored stored = pack(random_weight(of, random), of.encoding, of.value_type);
  const PackedWeight weight = stored.view(of.encoding, of.value_type, of.rows, of.columns);
  const std::vector<float> dense = decode_plainly(weight);
  expect(!dense.empty() && find_fault(weight).empty(), "a sound weight is accepted: " + name_of(of));
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
  const float* bias_or_null = of.has_bias ? bias.data() : nullptr;
  linear.run(x.data(), of.tokens, bias_or_null, y.data(), ThreadParallel(2));
  const size_t wrong = count_wrong(dense, rows, columns, x, bias_or_null, y);
  expect(wrong == 0, std::string(kernels.name) + ": " + std::to_string(wrong) + " outputs of " + name_of(of));
  std::vector<float> again(y.size(), 3.0f);
  linear.run(x.data(), of.tokens, bias_or_null, again.data(), ThreadParallel(5));
  expect(y.empty() || std::memcmp(y.data(), again.data(), y.size() * sizeof(float)) == 0,
         std::string(kernels.name) + ": other bits with other threads: " + name_of(of));
}

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> found;
  for (const Kernels* kernels : {portable_kernels(), avx2_kernels(), avx512_kernels()}) {
    if (kernels) found.push_back(kernels);
  }
  return found;
}

void test_shapes(std::mt19937& random) {
  const int64_t shapes[][2] = {{1, 1}, {1, 300}, {5, 7}, {16, 16}, {17, 129}, {48, 64}, {70, 200}, {530, 33}, {600, 70}};
  const size_t token_counts[] = {0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 33, 130};
  const Encoding encodings[] = {Encoding::kGap8, Encoding::kGap4, Encoding::kMask};
  size_t cases = 0;
  for (const Kernels* kernels : all_kernels()) {
    for (const auto& shape : shapes) {
      for (const size_t tokens : token_counts) {
        for (const double density : {0.0, 0.03, 0.4, 1.0}) {
          const int block_rows = cases % 3 == 0 ? 1 : cases % 3 == 1 ? 4 : 16;
          const Encoding encoding = shape[0] * shape[1] == 1 ? Encoding::kGap8 : encodings[cases / 3 % 3];
          const ValueType type = cases / 9 % 2 ? ValueType::kHalf : ValueType::kFloat;
          run_case({shape[0], shape[1], tokens, density, block_rows, encoding, type, cases % 2 == 0, cases % 7 != 6}, *kernels,
                   random);
          ++cases;
        }
      }
    }
  }
  std::printf("%zu shapes compared\n", cases);
}

void test_random_cases(std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  const std::vector<const Kernels*> kernels = all_kernels();
  for (int index = 0; index < 400; ++index) {
    const auto side = [&] { return 1 + static_cast<int64_t>(random() % (random() % 4 ? 90 : 400)); };
    const int block_rows[] = {1, 2, 4, 16};
    const auto encoding = static_cast<Encoding>(random() % 3);
    const auto type = random() % 2 ? ValueType::kHalf : ValueType::kFloat;
    const double density = random() % 3 ? uniform(random) : uniform(random) * uniform(random) * 0.1;
    run_case({side() + 1, side(), random() % 40, density, block_rows[random() % 4], encoding, type, random() % 2 == 0,
              random() % 8 != 0},
             *kernels[random() % kernels.size()], random);
  }
}

// Sound weights with some bytes changed, cut off or added, and bytes that never were a weight: refused exactly where the plain
// decoder refuses them, and otherwise decoded to the same weight.
void test_random_bytes(std::mt19937& random) {
  size_t refused = 0, accepted = 0;
  for (int index = 0; index < 6000; ++index) {
    const auto encoding = static_cast<Encoding>(random() % 3);
    const auto type = random() % 2 ? ValueType::kHalf : ValueType::kFloat;
    Case of{1 + static_cast<int64_t>(random() % 20),
            1 + static_cast<int64_t>(random() % 70),
            1,
            0.3,
            1,
            encoding,
            type,
            false,
            true};
    Stored stored = pack(random_weight(of, random), encoding, type);
    switch (random() % 5) {
      case 0:
        for (size_t byte = 0; byte < stored.index_bytes; ++byte) stored.index[byte] = static_cast<uint8_t>(random());
        break;
      case 1:
        if (stored.index_bytes) stored.index[random() % stored.index_bytes] = static_cast<uint8_t>(random());
        break;
      case 2:
        stored.index_bytes -= std::min<size_t>(stored.index_bytes, random() % 3);
        break;
      case 3:
        stored.entries -= std::min<size_t>(stored.entries, random() % 3);
        break;
      default:
        of.rows += static_cast<int64_t>(random() % 3) - 1, of.columns += static_cast<int64_t>(random() % 3) - 1;
    }
    // Moved to where a read behind the end is seen.
    const auto index_copy = std::make_unique<uint8_t[]>(stored.index_bytes);
    std::copy_n(stored.index.get(), stored.index_bytes, index_copy.get());
    const auto values_copy = std::make_unique<char[]>(stored.entries * bytes_of(type));
    std::copy_n(stored.values.get(), stored.entries * bytes_of(type), values_copy.get());
    const PackedWeight weight{encoding,          type,           index_copy.get(), stored.index_bytes,
                              values_copy.get(), stored.entries, of.rows,          of.columns};
    const std::vector<float> dense = of.rows > 0 && of.columns > 0 ? decode_plainly(weight) : std::vector<float>{};
    expect(dense.empty() == !find_fault(weight).empty(), "bytes " + std::to_string(index) + ": " + find_fault(weight));
    ++(dense.empty() ? refused : accepted);
    if (dense.empty()) continue;
    const SparseLinear linear(weight, *choose_kernels(nullptr));
    std::vector<float> x(static_cast<size_t>(of.columns)), y(static_cast<size_t>(of.rows));
    for (float& value : x) value = static_cast<float>(random() % 7) - 3;
    linear.run(x.data(), 1, nullptr, y.data(), ThreadParallel(1));
    expect(count_wrong(dense, y.size(), x.size(), x, nullptr, y) == 0, "outputs of bytes " + std::to_string(index));
  }
  std::printf("bytes at random: %zu refused, %zu accepted\n", refused, accepted);
  expect(refused > 1000 && accepted > 1000, "both kinds of bytes are met");
}

void test_damage() {
  const Case of{3, 300, 1, 0.5, 1, Encoding::kGap8, ValueType::kFloat, false, true};
  std::vector<uint16_t> dense(900, 0);
  dense[0] = dense[299] = dense[899] = 0x3c00;
  const auto fault_of = [&](const std::vector<uint8_t>& index, size_t values, Encoding encoding, int64_t columns) {
    const Stored stored = store(index, std::vector<uint16_t>(values, 0), ValueType::kFloat);
    return find_fault(stored.view(encoding, ValueType::kFloat, of.rows, columns));
  };
  expect(fault_of({0, 255, 44, 255, 255, 90}, 6, Encoding::kGap8, 300).empty(), "the sound weight");
  expect(fault_of({0, 255, 44, 255, 255, 255}, 6, Encoding::kGap8, 300).find("behind the last") != std::string::npos,
         "an entry behind the end");
  expect(fault_of({0, 255, 0, 255}, 4, Encoding::kGap8, 300).find("one place") != std::string::npos,
         "two entries at one place");
  expect(fault_of({0, 255}, 3, Encoding::kGap8, 300).find("as many of each") != std::string::npos, "fewer gaps than values");
  expect(fault_of({}, 0, Encoding::kGap8, 300).find("no value") != std::string::npos, "no entries");
  expect(fault_of({0}, 1, Encoding::kGap8, int64_t{1} << 40).find("both sides") != std::string::npos,
         "a side that is too long");
  expect(fault_of({0}, 1, Encoding::kGap8, -300).find("both sides") != std::string::npos, "a negative side");
  expect(fault_of({0}, 1, Encoding::kGap8, 1 << 30).find("places") != std::string::npos, "too many places");
  expect(fault_of({0}, 1, Encoding::kGap4, 300).find("two values for each byte") != std::string::npos, "half a byte of gap4");
  expect(fault_of({7, 0}, 4, Encoding::kMask, 4).empty(), "the sound mask");
  expect(fault_of({7}, 4, Encoding::kMask, 4).find("bytes") != std::string::npos, "a short mask");
  expect(fault_of({7, 0, 0}, 4, Encoding::kMask, 4).find("bytes") != std::string::npos, "a long mask");
  expect(fault_of({7, 16}, 5, Encoding::kMask, 4).find("bits behind") != std::string::npos, "a bit behind the last place");
  expect(fault_of({7, 0}, 3, Encoding::kMask, 4).find("more places") != std::string::npos, "fewer values than bits");
  expect(fault_of({7, 0}, 5, Encoding::kMask, 4).find("keeps 3 places") != std::string::npos, "more values than bits");
  const Stored ending = store({7, 0}, {1, 1, 1, 1}, ValueType::kFloat);
  expect(find_fault(ending.view(Encoding::kMask, ValueType::kFloat, 3, 4)).find("no zero") != std::string::npos,
         "no zero at the end");
}

void test_half() {
  expect(half_to_float(0x3c00) == 1.0f && half_to_float(0xc000) == -2.0f && half_to_float(0x0001) == 0x1p-24f, "halves");
  expect(half_to_float(0x7bff) == 65504.0f && half_to_float(0x0400) == 0x1p-14f && std::isinf(half_to_float(0xfc00)), "halves");
  expect(std::isnan(half_to_float(0x7e00)) && std::signbit(half_to_float(0x8000)), "halves");
}

double plain_activation(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? 0 : x;
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
    case Activation::kQuickGelu:
      return x / (1 + std::exp(-1.702 * x));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

void test_activations(std::mt19937& random) {
  const Activation activations[] = {Activation::kNone,     Activation::kRelu,      Activation::kGelu,
                                    Activation::kGeluTanh, Activation::kQuickGelu, Activation::kSilu};
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Kernels* kernels : all_kernels()) {
    for (const Activation activation : activations) {
      std::vector<float> x = {0,     -0.0f, 1e-30f, -1e-30f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN(),
                              1e30f, -1e30f};
      for (int step = -4000; step <= 4000; ++step) x.push_back(static_cast<float>(step) * 0.0253f);
      std::vector<float> y = x;
      kernels->activate(activation, y.data(), y.size());
      for (size_t index = 0; index < x.size(); ++index) {
        const double wanted = plain_activation(activation, x[index]);
        const bool is_same = std::isfinite(wanted)
                                 ? std::abs(y[index] - wanted) <=
                                       2e-7 * std::min(30.0, std::abs(static_cast<double>(x[index]))) + 1e-6 * std::abs(wanted)
                             : std::isnan(wanted) ? std::isnan(y[index])
                                                  : y[index] == static_cast<float>(wanted);
        expect(is_same, std::string(kernels->name) + ": activation " + std::to_string(static_cast<int>(activation)) + " of " +
                            std::to_string(x[index]) + " is " + std::to_string(y[index]));
      }
      // In a layer: what the layer without it gives, activated.
      for (const int block_rows : {1, 4, 16}) {
        const Case of{70, 90, 0, 0.4, block_rows, Encoding::kGap8, ValueType::kFloat, true, true};
        const Stored stored = pack(random_weight(of, random), of.encoding, of.value_type);
        const PackedWeight weight = stored.view(of.encoding, of.value_type, of.rows, of.columns);
        const SparseLinear plain(weight, *kernels), fused(weight, *kernels, activation);
        for (const size_t tokens : {1, 3, 20, 40}) {
          std::vector<float> in(tokens * 90), wanted(tokens * 70), found(tokens * 70), bias(70, 0.25f);
          for (float& value : in) value = static_cast<float>(random() % 100) / 50 - 1;
          plain.run(in.data(), tokens, bias.data(), wanted.data(), ThreadParallel(1));
          kernels->activate(activation, wanted.data(), wanted.size());
          fused.run(in.data(), tokens, bias.data(), found.data(), ThreadParallel(2));
          for (size_t index = 0; index < found.size(); ++index) {
            expect(std::abs(found[index] - wanted[index]) <= 1e-6f * std::abs(wanted[index]), "a layer with an activation");
          }
        }
      }
    }
  }
}

// Several threads make weights and run one of them together, each with its own number of tokens; all find what one alone found.
void test_threads(std::mt19937& random) {
  for (const int block_rows : {1, 4, 16}) {
    const Case of{300, 150, 0, 0.3, block_rows, Encoding::kGap8, ValueType::kFloat, false, true};
    const Stored stored = pack(random_weight(of, random), of.encoding, of.value_type);
    const PackedWeight weight = stored.view(of.encoding, of.value_type, of.rows, of.columns);
    std::vector<float> x(40 * 150);
    for (float& value : x) value = static_cast<float>(random() % 1000) - 500;
    x[7] = std::numeric_limits<float>::infinity();
    const SparseLinear shared(weight, *choose_kernels(nullptr));
    std::vector<std::thread> threads;
    std::vector<int> is_same(4, 0);
    for (size_t index = 0; index < is_same.size(); ++index) {
      threads.emplace_back([&, index] {
        bool all = true;
        for (const size_t tokens : {1 + index, 9 + index, 30 + index}) {
          std::vector<float> y(tokens * 300), own(tokens * 300);
          shared.run(x.data(), tokens, nullptr, y.data(), ThreadParallel(2));
          const SparseLinear linear(weight, *choose_kernels(nullptr));
          linear.run(x.data(), tokens, nullptr, own.data(), ThreadParallel(1));
          all = all && std::memcmp(y.data(), own.data(), y.size() * sizeof(float)) == 0;
        }
        is_same[index] = all;
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const int same : is_same) expect(same == 1, "threads that share a weight");
  }
}

}  // namespace
}  // namespace mfcompile

int main(int argc, char** argv) {
  using namespace mfcompile;
  std::mt19937 random(7);
  test_threads(random);
  if (argc < 2 || std::string(argv[1]) != "threads") {  // the rest is one thread's work, and slow under ThreadSanitizer
    test_damage();
    test_half();
    test_activations(random);
    test_shapes(random);
    test_random_cases(random);
    test_random_bytes(random);
  }
  Scratch::release_all();
  std::printf("%d failures\n", g_failures);
  return g_failures ? 1 : 0;
}
