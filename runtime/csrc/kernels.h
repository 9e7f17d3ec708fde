// What a kernel reads, and the table of kernels of one instruction set. No standard library templates here: this header
// is compiled with several instruction sets, and the linker keeps one copy of every inline function.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mfcompile {

constexpr int kStripRows = 16;      // rows of a block of the pattern 16x1
constexpr int kGroupRows = 8;       // single rows whose entries lie side by side
constexpr int kBlockColumns = 64;   // columns of a block of Cells: the activations of a token fit four vectors of AVX-512,
constexpr int kWideColumns = 96;    // and six where few are kept: sums go to y once for each block
constexpr int kBlockTokens = 16;    // tokens of one tile of block_strip
constexpr size_t kReadBehind = 16;  // values behind the last one that kernels may read
constexpr size_t kColumnsBehind = 64;  // bytes of columns behind the last one that they may read

// What follows a linear layer: nothing, max(x, 0), x (1 + erf(x / sqrt 2)) / 2, the same with tanh, x sigmoid(1.702 x), and
// x sigmoid(x).
enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kQuickGelu, kSilu };

// `units` rows that keep `count` groups each (int8_kernels.h).
struct Run {
  uint16_t count;
  uint16_t units;
};

// The kept weights of one chunk of rows inside one block of columns, cut into groups of `group_units` units. All units of a
// group have as many entries, which lie side by side: entry e of unit u of a group at e * group_units + u.
struct Cell {
  size_t group_count;
  const uint8_t* counts;   // of each group: entries of every unit
  const uint8_t* units;    // (groups, group units) unit inside the chunk
  const uint8_t* columns;  // column inside the block
  const void* values;      // (entries, rows of a unit), floats or halves
  bool has_halves;
  bool has_six_bits;  // of columns: those of eight entries in six bytes
  int block_columns;
};

// Tiles of activations are token-minor: x_tile (columns, vectors * lanes), y_tile (rows, vectors * lanes).
struct Kernels {
  const char* name;
  int lanes;              // floats of one vector
  int tile_vectors;       // most vectors of tokens in a tile, single rows
  int tile_vectors_of_4;  // the same for units of 4 rows
  int tokens_by_lookup;   // up to so many tokens, multiply_cell_by_token is the fastest

  // x (tokens, columns) -> x_tile, zero in lanes past `tokens`; suspect[lane] becomes NaN where a token holds NaN or Inf,
  // otherwise 0.
  void (*pack_tile)(const float* x, size_t columns, size_t tokens, int vectors, float* x_tile, float* suspect);
  // y_tile += W x_tile for one cell; a unit is one row in groups of kGroupRows, or 4 rows in groups of one unit.
  void (*multiply_cell)(int vectors, int unit_rows, const Cell& cell, const float* x_block, float* y_tile);
  // y (tokens, rows) += W x for one cell, x (tokens, block columns), for few tokens; strides of a token are in floats.
  void (*multiply_cell_by_token)(int unit_rows, const Cell& cell, const float* x, size_t x_stride, size_t tokens, float* y,
                                 size_t y_stride);
  // y (tokens, stride) = y_tile transposed + bias (rows,) or null.
  void (*store_tile)(const float* y_tile, int vectors, size_t tokens, size_t rows, const float* bias, float* y, size_t stride);
  // y16 (tokens, 16) of 16 rows: `count` columns with 16 values each; x (all columns, width), width 1, 2, 4, 8 or 16.
  void (*block_strip)(const uint32_t* columns, const void* values, bool has_halves, size_t count, const float* x, int width,
                      float* y16);
  void (*activate)(Activation activation, float* y, size_t count);  // y (count,) in place
};

// Kernels of an instruction set, or null where this build or this machine has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_narrow_kernels();  // the same with vectors of eight, for few tokens

}  // namespace mfcompile
