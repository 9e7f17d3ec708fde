// What a kernel reads, and the table of kernels of one instruction set. No standard library templates here: this header
// is compiled with several instruction sets, and the linker keeps one copy of every inline function.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mfcompile {

constexpr int kStripRows = 16;    // rows that share a mask or a block of the pattern 16x1
constexpr int kFewTokens = 8;     // most tokens of one call of mask_strip
constexpr int kBlockTokens = 16;  // tokens of one tile of block_strip

// `units` units (rows, or strips of 4 rows) that keep `count` columns each inside one block of columns.
struct Run {
  uint16_t count;
  uint16_t units;
};

// The kept weights of one chunk of rows inside one block of columns, units sorted by how much they keep.
struct Cell {
  const Run* runs;
  size_t run_count;
  const uint16_t* units;   // unit inside the chunk, in the order of the runs
  const uint8_t* columns;  // column inside the block: `count` of each unit in turn
  const float* values;     // (entries, rows per unit)
};

// y16 (tokens <= 8, 16) of 16 rows: masks (columns,), values packed in order of columns; 64 bytes behind them are read.
using MaskStrip = void(const uint16_t* masks, const float* values, size_t columns, const float* x, size_t x_stride, int tokens,
                       float* y16);

// Tiles of activations are token-minor: x_tile (columns, vectors * lanes), y_tile (rows, vectors * lanes).
struct Kernels {
  const char* name;
  int lanes;              // floats of one vector
  int block_columns;      // columns of a block of Cells, at most 256
  int tile_vectors;       // most vectors of tokens in a tile, single rows
  int tile_vectors_of_4;  // the same for units of 4 rows
  int token_lanes;        // partial sums of a row in multiply_cell_by_token
  int token_cost;         // what multiply_cell_by_token takes for a kept weight, in tenths of a cycle

  // x (tokens, columns) -> x_tile, zero in lanes past `tokens`; suspect[lane] becomes NaN where a token holds NaN or Inf,
  // otherwise 0.
  void (*pack_tile)(const float* x, size_t columns, size_t tokens, int vectors, float* x_tile, float* suspect);
  // y_tile += W x_tile for one cell; `unit_rows` is 1 or 4.
  void (*multiply_cell)(int vectors, int unit_rows, const Cell& cell, const float* x_block, float* y_tile);
  // sums (rows, token_lanes) += products of one cell of single rows and one token, x (block_columns,), zero behind the last
  // column; the output of a row is the sum over its lanes. 16 columns behind the last entry are read.
  void (*multiply_cell_by_token)(const Cell& cell, const float* x, float* sums);
  // y (tokens, stride) = y_tile transposed + bias (rows,) or null.
  void (*store_tile)(const float* y_tile, int vectors, size_t tokens, size_t rows, const float* bias, float* y, size_t stride);
  MaskStrip* mask_strip;  // null where there is none
  // y16 (tokens, 16) of 16 rows: `count` columns with 16 values each; x (all columns, width), width 1, 2, 4, 8 or 16.
  void (*block_strip)(const uint32_t* columns, const float* values, size_t count, const float* x, int width, float* y16);
};

// Kernels of an instruction set, or null where this build or this machine has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
MaskStrip* avx512_counting_mask_strip();  // a faster one, for processors that have VPOPCNTDQ

}  // namespace mfcompile
