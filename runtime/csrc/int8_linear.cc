#include "int8_linear.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "file_pages.h"
#include "scratch.h"

namespace mfcompile {

namespace {

constexpr size_t kTaskFloats = 1 << 15;   // activations of a task that looks for their range or quantizes them
constexpr size_t kTaskGroups = 1 << 16;   // groups, kept or not, times tiles, of a task of run_masks

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

template <class Task>
void run_tasks(const Parallel& parallel, size_t count, const Task& task) {
  if (count == 1) return task(0);
  parallel.run([](void* held, size_t index) { (*static_cast<const Task*>(held))(index); }, count,
               const_cast<void*>(static_cast<const void*>(&task)));
}

// Scratch memory is counted in floats; words of four activations and sums are as large.
uint32_t* words_of(const Scratch& scratch) { return reinterpret_cast<uint32_t*>(scratch.data()); }
int32_t* sums_of(const Scratch& scratch) { return reinterpret_cast<int32_t*>(scratch.data()); }

}  // namespace

const Int8Kernels* choose_int8_kernels(const char* cap) {
  const bool is_capped = cap && *cap;
  const std::string name = is_capped ? cap : "avx512";
  if (is_capped && !choose_kernels(cap)) return nullptr;
  if (name == "portable") return int8_portable_kernels();
  if (name == "avx512") {
    if (const Int8Kernels* kernels = int8_avx512_kernels()) return kernels;
    if (const Int8Kernels* kernels = int8_avxvnni_kernels()) return kernels;
  }
  if (const Int8Kernels* kernels = int8_avx2_kernels()) return kernels;
  return int8_portable_kernels();
}

Quantization choose_quantization(float low, float high) {
  float scale = (high - low) / 255.0f;
  if (!(scale > 0.0f)) scale = 1.0f;  // all zero, or too small to divide by
  const float zero = std::min(255.0f, std::max(0.0f, -low / scale));
  return {scale, static_cast<int32_t>(std::nearbyint(zero))};
}

// Activations as words of four uint8, `stride` words for a token.
struct SparseLinearInt8::Input {
  size_t tokens, stride;
  Quantization by;
  const uint32_t* words;
  std::vector<int32_t> offsets;  // (rows,) zero * sum of the row's weights
  std::vector<float> scales;     // (rows,) x_scale * scale of the row
};

SparseLinearInt8::SparseLinearInt8(const PackedInt8& weight, const float* scales, const Int8Kernels& kernels)
    : weight_(weight),
      kernels_(kernels),
      scales_(scales, scales + weight.rows),
      row_sums_(static_cast<size_t>(weight.rows), 0) {
  for_each_group(weight, [&](int64_t row, int64_t, uint32_t word) {
    ++kept_groups_;
    for (int byte = 0; byte < kGroup; ++byte) {
      row_sums_[static_cast<size_t>(row)] += static_cast<uint32_t>(static_cast<int8_t>(word >> 8 * byte));
    }
  });
}

template <class Layout>
const Layout& SparseLinearInt8::make_once(std::once_flag& once, std::unique_ptr<const Layout>& layout) const {
  std::call_once(once, [&] {
    // What was checked before may have changed since, where it lies in a file, and may change while it is read.
    const std::vector<uint8_t> gaps(weight_.gaps, weight_.gaps + weight_.gap_bytes);
    const std::vector<int8_t> values(weight_.values, weight_.values + weight_.entries * static_cast<size_t>(weight_.block));
    PackedInt8 copy = weight_;
    copy.gaps = gaps.data(), copy.values = values.data();
    const std::string fault = find_fault(copy);
    if (!fault.empty()) throw std::runtime_error("a packed weight changed after it was loaded: " + fault);
    layout = std::make_unique<const Layout>(copy);
    release_file_pages(weight_.gaps, weight_.gap_bytes);
    release_file_pages(weight_.values, weight_.entries * static_cast<size_t>(weight_.block));
  });
  return *layout;
}

size_t SparseLinearInt8::resident_bytes() const {
  return (cells_ ? cells_->bytes() : 0) + (masks_ ? masks_->bytes() : 0);
}

void SparseLinearInt8::run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  if (tokens == 0) return;
  const size_t columns = static_cast<size_t>(weight_.columns), rows = static_cast<size_t>(weight_.rows);
  const size_t count = tokens * columns, tasks = divide_up(count, kTaskFloats);
  struct Range {
    float low, high;
    bool is_finite;
  };
  std::vector<Range> ranges(tasks);
  run_tasks(parallel, tasks, [&](size_t task) {
    const size_t first = task * kTaskFloats;
    Range& range = ranges[task];
    range.is_finite = kernels_.find_range(x + first, std::min(kTaskFloats, count - first), &range.low, &range.high);
  });
  Range all{0.0f, 0.0f, true};
  for (const Range& range : ranges) {
    all = {std::min(all.low, range.low), std::max(all.high, range.high), all.is_finite && range.is_finite};
  }
  if (!all.is_finite || !std::isfinite(all.high - all.low)) {
    std::fill(y, y + tokens * rows, std::numeric_limits<float>::quiet_NaN());
    return;
  }

  Input input{tokens, divide_up(columns, kGroup), choose_quantization(all.low, all.high), nullptr, {}, {}};
  const Scratch quantized(tokens * input.stride);
  input.words = words_of(quantized);
  const size_t task_tokens = std::max<size_t>(1, kTaskFloats / columns);
  run_tasks(parallel, divide_up(tokens, task_tokens), [&](size_t task) {
    for (size_t token = task * task_tokens; token < std::min(tokens, (task + 1) * task_tokens); ++token) {
      uint32_t* words = words_of(quantized) + token * input.stride;
      words[input.stride - 1] = 0;  // inputs behind the last
      kernels_.quantize(x + token * columns, columns, input.by, reinterpret_cast<uint8_t*>(words));
    }
  });
  input.offsets.resize(rows), input.scales.resize(rows);
  for (size_t row = 0; row < rows; ++row) {
    input.offsets[row] = static_cast<int32_t>(row_sums_[row] * static_cast<uint32_t>(input.by.zero));
    input.scales[row] = input.by.scale * scales_[row];
  }
  if (prefers_masks(tokens)) return run_masks(input, bias, y, parallel);
  run_cells(input, bias, y, parallel);
}

// Masks cost by the groups, kept or not, and the tokens; cells by the kept groups and vectors of tokens. Tenths of cycles as
// measured on Zen 4: for a group of 16 rows and a tile, 30 and 10 for each token; for a kept group, 20 and 15 for each vector.
bool SparseLinearInt8::prefers_masks(size_t tokens) const {
  if (!kernels_.mask_tokens) return false;
  const size_t strips = divide_up(static_cast<size_t>(weight_.rows), kStripRows);
  const size_t tiles = divide_up(tokens, static_cast<size_t>(kernels_.mask_tokens));
  const size_t mask_cost = strips * group_count(weight_) * (30 * tiles + 10 * tokens);
  const size_t vectors = divide_up(tokens, static_cast<size_t>(kernels_.lanes));
  const size_t own_cost = kept_groups_ * (static_cast<size_t>(kernels_.word_cost) * vectors + 20);
  return mask_cost < own_cost;
}

void SparseLinearInt8::run_cells(const Input& input, const float* bias, float* y, const Parallel& parallel) const {
  const Int8CellLayout& layout = make_once(cells_once_, cells_);
  const size_t rows = static_cast<size_t>(weight_.rows), groups = input.stride, tokens = input.tokens;
  const size_t lanes = static_cast<size_t>(kernels_.lanes);
  const size_t vectors = divide_up(tokens, lanes), tiles = divide_up(vectors, static_cast<size_t>(kernels_.tile_vectors));
  const auto first_vector = [&](size_t tile) { return tile * (vectors / tiles) + std::min(tile, vectors % tiles); };
  const Scratch packed(vectors * lanes * groups);
  run_tasks(parallel, tiles, [&](size_t tile) {
    const size_t first = first_vector(tile), last = first_vector(tile + 1), token = first * lanes;
    kernels_.pack_tile(input.words + token * groups, groups, groups, std::min(tokens, last * lanes) - token,
                       static_cast<int>(last - first), words_of(packed) + token * groups);
  });
  run_tasks(parallel, tiles * layout.chunks, [&](size_t task) {
    const size_t tile = task / layout.chunks, chunk = task % layout.chunks;
    const size_t first = first_vector(tile), last = first_vector(tile + 1), token = first * lanes;
    const size_t width = (last - first) * lanes, row = chunk * layout.chunk_rows;
    const Scratch sums(layout.chunk_rows * width);
    for (size_t block = 0; block < layout.blocks; ++block) {
      kernels_.multiply_cell(static_cast<int>(last - first), block == 0, layout.cell(chunk, block),
                             words_of(packed) + token * groups + block * Int8CellLayout::kBlockGroups * width, sums_of(sums));
    }
    kernels_.store_tile(sums_of(sums), static_cast<int>(last - first), std::min(tokens, last * lanes) - token,
                        std::min(layout.chunk_rows, rows - row), input.offsets.data() + row, input.scales.data() + row,
                        bias ? bias + row : nullptr, y + token * rows + row, rows);
  });
}

void SparseLinearInt8::run_masks(const Input& input, const float* bias, float* y, const Parallel& parallel) const {
  const Int8MaskLayout& layout = make_once(masks_once_, masks_);
  const size_t rows = static_cast<size_t>(weight_.rows), groups = input.stride, tokens = input.tokens;
  const size_t tiles = divide_up(tokens, static_cast<size_t>(kernels_.mask_tokens)), tall = divide_up(tokens, tiles);
  int stride = 0;
  Int8MaskStrip* const strip_kernel = kernels_.mask_strip(static_cast<int>(tall), &stride);
  const size_t width = static_cast<size_t>(stride), lanes = static_cast<size_t>(kernels_.lanes);
  const bool is_packed = tall > 1;
  const Scratch packed(is_packed ? tiles * width * groups : 0);
  if (is_packed) {
    run_tasks(parallel, tiles, [&](size_t tile) {
      const uint32_t* from = input.words + tile * tall * groups;
      uint32_t* to = words_of(packed) + tile * width * groups;
      const size_t filled = std::min(tall, tokens - tile * tall);
      if (width % lanes == 0) return kernels_.pack_tile(from, groups, groups, filled, static_cast<int>(width / lanes), to);
      for (size_t group = 0; group < groups; ++group) {
        for (size_t t = 0; t < width; ++t) to[group * width + t] = t < filled ? from[t * groups + group] : 0;
      }
    });
  }
  const size_t strips_of_task = std::max<size_t>(1, kTaskGroups / (groups * kStripRows));
  const size_t strip_tasks = divide_up(layout.strips, strips_of_task);
  run_tasks(parallel, tiles * strip_tasks, [&](size_t task) {
    const size_t tile = task / strip_tasks, token = tile * tall, filled = std::min(tall, tokens - token);
    const uint32_t* x = is_packed ? words_of(packed) + tile * width * groups : input.words;
    const size_t end = std::min(layout.strips, (task % strip_tasks + 1) * strips_of_task);
    for (size_t strip = task % strip_tasks * strips_of_task; strip < end; ++strip) {
      alignas(64) int32_t sums[32 * kStripRows];
      const size_t row = strip * kStripRows, count = std::min<size_t>(kStripRows, rows - row);
      strip_kernel(layout.masks.data() + strip * groups, layout.words.data() + layout.first_word[strip], groups, x, sums);
      kernels_.store_strip(sums, filled, count, input.offsets.data() + row, input.scales.data() + row,
                           bias ? bias + row : nullptr, y + token * rows + row, rows);
    }
  });
}

}  // namespace mfcompile
