#include "sparse_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "file_pages.h"
#include "scratch.h"

namespace mfcompile {

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr size_t kTaskWeights = 1 << 16;  // weights, kept or not, of one task of the kernels for few tokens

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

template <class Task>
void run_tasks(const Parallel& parallel, size_t count, const Task& task) {
  if (count == 1) return task(0);
  parallel.run([](void* held, size_t index) { (*static_cast<const Task*>(held))(index); }, count,
               const_cast<void*>(static_cast<const void*>(&task)));
}

// NaN where a token holds a NaN or an infinity (0 * x), otherwise 0.
void find_suspects(const float* x, size_t tokens, size_t columns, float* suspects) {
  for (size_t token = 0; token < tokens; ++token, x += columns) {
    float sums[16] = {};
    size_t column = 0;
    for (; column + 16 <= columns; column += 16) {
      for (size_t lane = 0; lane < 16; ++lane) sums[lane] += x[column + lane] * 0.0f;
    }
    for (; column < columns; ++column) sums[0] += x[column] * 0.0f;
    suspects[token] = 0.0f;
    for (const float sum : sums) suspects[token] += sum;
  }
}

// y (tokens, stride) = y16 (tokens, 16) + bias, for the rows that exist.
void store_strip(const float* y16, size_t tokens, size_t rows, const float* bias, float* y, size_t stride) {
  for (size_t token = 0; token < tokens; ++token) {
    for (size_t row = 0; row < rows; ++row) y[token * stride + row] = y16[token * kStripRows + row] + (bias ? bias[row] : 0.0f);
  }
}

}  // namespace

const Kernels* choose_kernels(const char* cap) {
  const bool is_capped = cap && *cap;
  if (is_capped && std::strcmp(cap, "portable") == 0) return portable_kernels();
  if (is_capped && std::strcmp(cap, "avx2") == 0) return avx2_kernels();
  if (is_capped && std::strcmp(cap, "avx512") == 0) return avx512_kernels();
  if (is_capped) return nullptr;
  if (const Kernels* kernels = avx512_kernels()) return kernels;
  if (const Kernels* kernels = avx2_kernels()) return kernels;
  return portable_kernels();
}

SparseLinear::SparseLinear(const PackedWeight& weight, const Kernels& kernels)
    : weight_(weight), kernels_(kernels), structure_(find_structure(weight)) {}

// What was checked before may have changed since, where it lies in a file.
void SparseLinear::check_again() const {
  const std::string fault = find_fault(weight_);
  if (!fault.empty()) throw std::runtime_error("a packed weight changed after it was loaded: " + fault);
}

// Makes a layout on first need; afterwards the packed weight is needed for another layout at most.
template <class Layout, class... Arguments>
const Layout& SparseLinear::make_once(LayoutOnce<Layout>& held, Arguments... arguments) const {
  std::call_once(held.once, [&] {
    check_again();
    held.layout = std::make_unique<const Layout>(weight_, arguments...);
    release_file_pages(weight_.gaps, weight_.gap_bytes);
    release_file_pages(weight_.values, weight_.entries * (weight_.value_type == ValueType::kFloat ? 4 : 2));
  });
  return *held.layout;
}

const CellLayout& SparseLinear::cells() const { return make_once(cells_, structure_.unit_rows, kernels_.block_columns); }

const MaskLayout& SparseLinear::masks() const { return make_once(masks_); }

const BlockLayout& SparseLinear::blocks() const { return make_once(blocks_); }

size_t SparseLinear::resident_bytes() const { return cells_.bytes() + masks_.bytes() + blocks_.bytes(); }

void SparseLinear::run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  if (tokens == 0) return;
  if (structure_.unit_rows == kStripRows) return run_blocks(x, tokens, bias, y, parallel);
  switch (choose_way(tokens)) {
    case Way::kMasks:
      return run_masks(x, tokens, bias, y, parallel);
    case Way::kCellsByToken:
      return run_cells_by_token(x, tokens, bias, y, parallel);
    case Way::kCells:
      return run_cells(x, tokens, bias, y, parallel);
  }
}

// Masks cost by the weights, kept or not, and by the token; cells by the kept weights, for a whole vector of tokens or for one.
// Tenths of cycles as measured on Zen 4: for a column of 16 rows, 30 and 10 for each token; for a kept weight and a vector of
// tokens, 20, or 12 in units of 4 rows.
SparseLinear::Way SparseLinear::choose_way(size_t tokens) const {
  if (tokens > kFewTokens) return Way::kCells;
  const size_t lanes = static_cast<size_t>(kernels_.lanes), vectors = divide_up(tokens, lanes);
  const size_t columns_of_16 = static_cast<size_t>(weight_.rows) * static_cast<size_t>(weight_.columns) / kStripRows;
  const size_t mask_cost = columns_of_16 * (30 + 10 * tokens * kStripRows / lanes);
  const bool is_of_rows = structure_.unit_rows == 1;
  const size_t token_cost = structure_.kept_count * static_cast<size_t>(is_of_rows ? kernels_.token_cost : 14) * tokens;
  const size_t vector_cost = structure_.kept_count * (is_of_rows ? 20 : 12) * vectors;
  if (kernels_.mask_strip && mask_cost < std::min(token_cost, vector_cost)) return Way::kMasks;
  return is_of_rows && token_cost < vector_cost ? Way::kCellsByToken : Way::kCells;
}

void SparseLinear::run_cells(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  const CellLayout& layout = cells();
  const size_t rows = static_cast<size_t>(weight_.rows), columns = static_cast<size_t>(weight_.columns);
  const size_t lanes = static_cast<size_t>(kernels_.lanes);
  const size_t most = static_cast<size_t>(structure_.unit_rows == 1 ? kernels_.tile_vectors : kernels_.tile_vectors_of_4);
  const size_t vectors = divide_up(tokens, lanes), tiles = divide_up(vectors, most);
  // Tiles differ by one vector at most: 13 vectors are cut into 5, 4 and 4.
  const auto first_vector = [&](size_t tile) { return tile * (vectors / tiles) + std::min(tile, vectors % tiles); };
  const Scratch packed(vectors * lanes * columns), suspects(vectors * lanes);

  run_tasks(parallel, tiles, [&](size_t tile) {
    const size_t first = first_vector(tile), last = first_vector(tile + 1);
    const size_t token = first * lanes;
    kernels_.pack_tile(x + token * columns, columns, std::min(tokens, last * lanes) - token, static_cast<int>(last - first),
                       packed.data() + token * columns, suspects.data() + token);
  });
  run_tasks(parallel, tiles * layout.chunks, [&](size_t task) {
    const size_t tile = task / layout.chunks, chunk = task % layout.chunks;
    const size_t first = first_vector(tile), last = first_vector(tile + 1), token = first * lanes;
    const int tile_vectors = static_cast<int>(last - first);
    const size_t width = (last - first) * lanes, row = chunk * layout.chunk_rows;
    const Scratch y_tile(layout.chunk_rows * width);
    std::memset(y_tile.data(), 0, layout.chunk_rows * width * sizeof(float));
    for (size_t block = 0; block < layout.blocks; ++block) {
      kernels_.multiply_cell(tile_vectors, structure_.unit_rows, layout.cell(chunk, block),
                             packed.data() + token * columns + block * layout.block_columns * width, y_tile.data());
    }
    kernels_.store_tile(y_tile.data(), tile_vectors, std::min(tokens, last * lanes) - token,
                        std::min(layout.chunk_rows, rows - row), bias ? bias + row : nullptr, y + token * rows + row, rows);
  });
  mark_suspects(x, tokens, suspects.data(), y);
}

void SparseLinear::run_cells_by_token(const float* x, size_t tokens, const float* bias, float* y,
                                      const Parallel& parallel) const {
  const CellLayout& layout = cells();
  const size_t rows = static_cast<size_t>(weight_.rows), columns = static_cast<size_t>(weight_.columns);
  const size_t lanes = static_cast<size_t>(kernels_.token_lanes),
               width = layout.blocks * static_cast<size_t>(layout.block_columns);
  const Scratch padded(tokens * width);
  for (size_t token = 0; token < tokens; ++token) {
    std::copy(x + token * columns, x + (token + 1) * columns, padded.data() + token * width);
    std::fill(padded.data() + token * width + columns, padded.data() + (token + 1) * width, 0.0f);
  }
  run_tasks(parallel, layout.chunks, [&](size_t chunk) {
    const size_t row = chunk * layout.chunk_rows, end = std::min(rows, row + layout.chunk_rows);
    const Scratch sums(layout.chunk_rows * lanes);
    for (size_t token = 0; token < tokens; ++token) {
      std::memset(sums.data(), 0, layout.chunk_rows * lanes * sizeof(float));
      for (size_t block = 0; block < layout.blocks; ++block) {
        kernels_.multiply_cell_by_token(layout.cell(chunk, block),
                                        padded.data() + token * width + block * static_cast<size_t>(layout.block_columns),
                                        sums.data());
      }
      for (size_t r = row; r < end; ++r) {
        float sum = bias ? bias[r] : 0.0f;
        for (size_t lane = 0; lane < lanes; ++lane) sum += sums.data()[(r - row) * lanes + lane];
        y[token * rows + r] = sum;
      }
    }
  });
  float suspects[kFewTokens];
  find_suspects(x, tokens, columns, suspects);
  mark_suspects(x, tokens, suspects, y);
}

void SparseLinear::run_masks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  const MaskLayout& layout = masks();
  const size_t rows = static_cast<size_t>(weight_.rows), columns = static_cast<size_t>(weight_.columns);
  const size_t strips_of_task = std::max<size_t>(1, kTaskWeights / (columns * kStripRows));
  run_tasks(parallel, divide_up(layout.strips, strips_of_task), [&](size_t task) {
    const size_t end = std::min(layout.strips, (task + 1) * strips_of_task);
    for (size_t strip = task * strips_of_task; strip < end; ++strip) {
      alignas(64) float y16[kFewTokens * kStripRows];
      const size_t row = strip * kStripRows;
      kernels_.mask_strip(layout.masks.data() + strip * columns, layout.values.data() + layout.first_value[strip], columns, x,
                          columns, static_cast<int>(tokens), y16);
      store_strip(y16, tokens, std::min<size_t>(kStripRows, rows - row), bias ? bias + row : nullptr, y + row, rows);
    }
  });
  float suspects[kFewTokens];
  find_suspects(x, tokens, columns, suspects);
  mark_suspects(x, tokens, suspects, y);
}

void SparseLinear::run_blocks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  const BlockLayout& layout = blocks();
  const size_t rows = static_cast<size_t>(weight_.rows), columns = static_cast<size_t>(weight_.columns);
  size_t width = 1;  // tokens of a tile
  while (width < tokens && width < kBlockTokens) width *= 2;
  const size_t tiles = divide_up(tokens, width);
  const Scratch packed(tiles * width * columns), suspects(tiles * width);
  if (width == kBlockTokens) {
    run_tasks(parallel, tiles, [&](size_t tile) {
      const size_t token = tile * width;
      kernels_.pack_tile(x + token * columns, columns, std::min(width, tokens - token), kBlockTokens / kernels_.lanes,
                         packed.data() + token * columns, suspects.data() + token);
    });
  } else {
    find_suspects(x, tokens, columns, suspects.data());
    for (size_t column = 0; column < columns && width > 1; ++column) {
      for (size_t lane = 0; lane < width; ++lane)
        packed.data()[column * width + lane] = lane < tokens ? x[lane * columns + column] : 0;
    }
  }
  const size_t strips_of_task = std::max<size_t>(1, kTaskWeights / (columns * kStripRows));
  const size_t strip_tasks = divide_up(layout.strips, strips_of_task);
  run_tasks(parallel, tiles * strip_tasks, [&](size_t task) {
    const size_t tile = task / strip_tasks, token = tile * width, filled = std::min(width, tokens - token);
    const float* tile_x = width == 1 ? x : packed.data() + token * columns;
    const size_t end = std::min(layout.strips, (task % strip_tasks + 1) * strips_of_task);
    for (size_t strip = task % strip_tasks * strips_of_task; strip < end; ++strip) {
      alignas(64) float y16[kBlockTokens * kStripRows];
      const size_t row = strip * kStripRows, first = layout.first_block[strip];
      kernels_.block_strip(layout.columns.data() + first, layout.values.data() + first * kStripRows,
                           layout.first_block[strip + 1] - first, tile_x, static_cast<int>(width), y16);
      store_strip(y16, filled, std::min<size_t>(kStripRows, rows - row), bias ? bias + row : nullptr, y + token * rows + row,
                  rows);
    }
  });
  mark_suspects(x, tokens, suspects.data(), y);
}

void SparseLinear::mark_suspects(const float* x, size_t tokens, const float* suspects, float* y) const {
  for (size_t token = 0; token < tokens; ++token) {
    if (suspects[token] != 0.0f) mark_token(x + token * weight_.columns, y + token * weight_.rows);  // only NaN differs from 0
  }
}

// A dense product multiplies pruned weights, too: 0 * NaN and 0 * inf are NaN.
void SparseLinear::mark_token(const float* x, float* y) const {
  const size_t rows = static_cast<size_t>(weight_.rows), columns = static_cast<size_t>(weight_.columns);
  if (std::any_of(x, x + columns, [](float value) { return std::isnan(value); })) {
    std::fill(y, y + rows, kNan);
    return;
  }
  const auto infinities = static_cast<size_t>(std::count_if(x, x + columns, [](float value) { return std::isinf(value); }));
  std::vector<size_t> met(rows, 0);
  check_again();
  for_each_entry(weight_, [&](int64_t row, int64_t column, float) { met[static_cast<size_t>(row)] += std::isinf(x[column]); });
  for (size_t row = 0; row < rows; ++row) {
    if (met[row] != infinities) y[row] = kNan;
  }
}

}  // namespace mfcompile
