#include "sparse_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

namespace {

const Kernels& choose_narrow(const Kernels& kernels) {
  const Kernels* narrow = kernels.lanes > 8 ? avx512_narrow_kernels() : nullptr;
  return narrow ? *narrow : kernels;
}

}  // namespace

SparseLinear::SparseLinear(const PackedWeight& weight, const Kernels& kernels, Activation activation)
    : rows_(0), columns_(0), kernels_(kernels), narrow_kernels_(choose_narrow(kernels)), activation_(activation) {
  // Sizes are checked by decode.
  const bool keeps_few =
      5.0 * static_cast<double>(weight.entries) < static_cast<double>(weight.rows) * static_cast<double>(weight.columns);
  const Entries entries = decode(weight, keeps_few ? kWideColumns : kBlockColumns);
  rows_ = static_cast<size_t>(weight.rows), columns_ = static_cast<size_t>(weight.columns);
  unit_rows_ = find_unit_rows(entries, weight);
  if (unit_rows_ == 1) {
    cells_ = std::make_unique<const CellLayout>(entries, weight.values, weight.value_type, 1, rows_);
    return;
  }
  const Strips strips = make_strips(entries, weight, unit_rows_);
  if (unit_rows_ == kStripRows) {
    blocks_ = std::make_unique<const BlockLayout>(strips.entries, strips.values.data(), weight.value_type);
  } else {
    cells_ = std::make_unique<const CellLayout>(strips.entries, strips.values.data(), weight.value_type, unit_rows_, rows_);
  }
}

size_t SparseLinear::resident_bytes() const { return cells_ ? cells_->bytes() : blocks_->bytes(); }

void SparseLinear::run(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  if (tokens == 0) return;
  if (blocks_) return run_blocks(x, tokens, bias, y, parallel);
  switch (choose_way(tokens)) {
    case Way::kCellsByToken:
      return run_cells_by_token(x, tokens, bias, y, parallel);
    case Way::kNarrowCells:
      return run_cells(narrow_kernels_, x, tokens, bias, y, parallel);
    case Way::kCells:
      return run_cells(kernels_, x, tokens, bias, y, parallel);
  }
}

// Looking up the activations of one token costs by the token, a vector of tokens costs as much whether it is full or not.
SparseLinear::Way SparseLinear::choose_way(size_t tokens) const {
  if (tokens <= static_cast<size_t>(kernels_.tokens_by_lookup)) return Way::kCellsByToken;
  const size_t narrow_vectors = unit_rows_ == 1 ? 2 : 1;  // up to here, two short vectors are faster than one long one
  return tokens <= narrow_vectors * static_cast<size_t>(narrow_kernels_.lanes) ? Way::kNarrowCells : Way::kCells;
}

void SparseLinear::run_cells(const Kernels& kernels, const float* x, size_t tokens, const float* bias, float* y,
                             const Parallel& parallel) const {
  const CellLayout& layout = *cells_;
  const size_t lanes = static_cast<size_t>(kernels.lanes);
  const size_t most = static_cast<size_t>(unit_rows_ == 1 ? kernels.tile_vectors : kernels.tile_vectors_of_4);
  const size_t vectors = divide_up(tokens, lanes), tiles = divide_up(vectors, most);
  // Tiles differ by one vector at most: 13 vectors are cut into 5, 4 and 4.
  const auto first_vector = [&](size_t tile) { return tile * (vectors / tiles) + std::min(tile, vectors % tiles); };
  const Scratch packed(vectors * lanes * columns_), suspects(vectors * lanes);

  run_tasks(parallel, tiles, [&](size_t tile) {
    const size_t first = first_vector(tile), last = first_vector(tile + 1);
    const size_t token = first * lanes;
    kernels.pack_tile(x + token * columns_, columns_, std::min(tokens, last * lanes) - token, static_cast<int>(last - first),
                      packed.data() + token * columns_, suspects.data() + token);
  });
  run_tasks(parallel, tiles * layout.chunks, [&](size_t task) {
    const size_t tile = task / layout.chunks, chunk = task % layout.chunks;
    const size_t first = first_vector(tile), last = first_vector(tile + 1), token = first * lanes;
    const int tile_vectors = static_cast<int>(last - first);
    const size_t width = (last - first) * lanes, row = chunk * layout.chunk_rows;
    const Scratch y_tile(layout.chunk_rows * width);
    std::memset(y_tile.data(), 0, layout.chunk_rows * width * sizeof(float));
    for (size_t block = 0; block < layout.blocks; ++block) {
      kernels.multiply_cell(tile_vectors, unit_rows_, layout.cell(chunk, block),
                            packed.data() + token * columns_ + block * layout.block_columns * width, y_tile.data());
    }
    const size_t filled = std::min(tokens, last * lanes) - token, tall = std::min(layout.chunk_rows, rows_ - row);
    float* to = y + token * rows_ + row;
    kernels.store_tile(y_tile.data(), tile_vectors, filled, tall, bias ? bias + row : nullptr, to, rows_);
    activate(to, filled, tall);
  });
  mark_suspects(x, tokens, suspects.data(), y);
}

void SparseLinear::run_cells_by_token(const float* x, size_t tokens, const float* bias, float* y,
                                      const Parallel& parallel) const {
  const CellLayout& layout = *cells_;
  const size_t width = layout.blocks * layout.block_columns;
  const Scratch padded(tokens * width);
  for (size_t token = 0; token < tokens; ++token) {
    std::copy(x + token * columns_, x + (token + 1) * columns_, padded.data() + token * width);
    std::fill(padded.data() + token * width + columns_, padded.data() + (token + 1) * width, 0.0f);
  }
  run_tasks(parallel, layout.chunks, [&](size_t chunk) {
    const size_t row = chunk * layout.chunk_rows, end = std::min(rows_, row + layout.chunk_rows);
    const Scratch sums(tokens * layout.chunk_rows);
    std::memset(sums.data(), 0, tokens * layout.chunk_rows * sizeof(float));
    for (size_t block = 0; block < layout.blocks; ++block) {
      const Cell cell = layout.cell(chunk, block);
      kernels_.multiply_cell_by_token(unit_rows_, cell, padded.data() + block * layout.block_columns, width, tokens,
                                      sums.data(), layout.chunk_rows);
    }
    for (size_t token = 0; token < tokens; ++token) {
      const float* from = sums.data() + token * layout.chunk_rows;
      for (size_t r = row; r < end; ++r) y[token * rows_ + r] = from[r - row] + (bias ? bias[r] : 0.0f);
    }
    activate(y + row, tokens, end - row);
  });
  const Scratch suspects(tokens);
  find_suspects(x, tokens, columns_, suspects.data());
  mark_suspects(x, tokens, suspects.data(), y);
}

void SparseLinear::run_blocks(const float* x, size_t tokens, const float* bias, float* y, const Parallel& parallel) const {
  const BlockLayout& layout = *blocks_;
  const size_t rows = rows_, columns = columns_, width_of_value = bytes_of(layout.value_type);
  const bool has_halves = layout.value_type == ValueType::kHalf;
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
    const size_t begin = task % strip_tasks * strips_of_task, end = std::min(layout.strips, begin + strips_of_task);
    for (size_t strip = begin; strip < end; ++strip) {
      alignas(64) float y16[kBlockTokens * kStripRows];
      const size_t row = strip * kStripRows, first = layout.first_block[strip];
      kernels_.block_strip(layout.columns.data() + first, layout.values.data() + first * kStripRows * width_of_value,
                           has_halves, layout.first_block[strip + 1] - first, tile_x, static_cast<int>(width), y16);
      store_strip(y16, filled, std::min<size_t>(kStripRows, rows - row), bias ? bias + row : nullptr, y + token * rows + row,
                  rows);
    }
    const size_t first_row = begin * kStripRows;
    activate(y + token * rows + first_row, filled, std::min(rows, end * kStripRows) - first_row);
  });
  mark_suspects(x, tokens, suspects.data(), y);
}

// y (tokens, rows) of stride rows_, while it lies in a cache.
void SparseLinear::activate(float* y, size_t tokens, size_t rows) const {
  if (activation_ == Activation::kNone) return;
  for (size_t token = 0; token < tokens; ++token) kernels_.activate(activation_, y + token * rows_, rows);
}

void SparseLinear::mark_suspects(const float* x, size_t tokens, const float* suspects, float* y) const {
  for (size_t token = 0; token < tokens; ++token) {
    if (suspects[token] != 0.0f) mark_token(x + token * columns_, y + token * rows_);  // only NaN differs from 0
  }
}

// A dense product multiplies pruned weights, too: 0 * NaN and 0 * inf are NaN.
void SparseLinear::mark_token(const float* x, float* y) const {
  if (std::any_of(x, x + columns_, [](float value) { return std::isnan(value); })) {
    std::fill(y, y + rows_, kNan);
    return;
  }
  const auto infinities = static_cast<size_t>(std::count_if(x, x + columns_, [](float value) { return std::isinf(value); }));
  std::vector<size_t> met(rows_, 0);
  const auto visit = [&](size_t row, size_t column) { met[row] += std::isinf(x[column]); };
  cells_ ? cells_->for_each_kept(rows_, visit) : blocks_->for_each_kept(rows_, visit);
  for (size_t row = 0; row < rows_; ++row) {
    if (met[row] != infinities) y[row] = kNan;
  }
}

}  // namespace mfcompile
