// What an int8 kernel reads, and the table of kernels of one instruction set. No standard library templates here, for the
// reason that kernels.h gives.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

namespace mfcompile {

// uint8 = clamp(round(float / scale), -zero, 255 - zero) + zero, as DynamicQuantizeLinear of ONNX defines it.
struct Quantization {
  float scale;
  int32_t zero;
};

// The kept groups of one chunk of rows inside one block of groups, rows sorted by how many they keep.
struct Int8Cell {
  const Run* runs;
  size_t run_count;
  const uint16_t* rows;   // row inside the chunk, in the order of the runs
  const uint8_t* groups;  // group inside the block: `count` of each row in turn
  const int32_t* words;   // four weights of each
};

// sums (tokens, 16) of 16 rows: masks (groups,) of the rows that keep a group, words packed in order of groups, x (groups,
// stride) words of four activations; 64 bytes behind the words are read.
using Int8MaskStrip = void(const uint16_t* masks, const int32_t* words, size_t groups, const uint32_t* x, int32_t* sums);

// Activations are uint8, four of a token in a word. Tiles are token-minor: x_tile (groups, vectors * lanes) words, sums
// (rows, vectors * lanes). Sums are exact, modulo 2^32.
struct Int8Kernels {
  const char* name;
  int lanes;         // tokens of one vector
  int tile_vectors;  // most vectors of tokens in a tile of Cells
  int word_cost;     // what a kept group takes for each vector of tokens, in tenths of a cycle
  int mask_tokens;   // most tokens of mask_strip; 0 where there is none

  // low and high: the range of `count` values and zero. True when all of them are finite.
  bool (*find_range)(const float* x, size_t count, float* low, float* high);
  void (*quantize)(const float* x, size_t count, Quantization by, uint8_t* to);
  // x (tokens, groups) words, rows `stride` words apart -> x_tile, zero in lanes past `tokens`.
  void (*pack_tile)(const uint32_t* x, size_t stride, size_t groups, size_t tokens, int vectors, uint32_t* x_tile);
  // sums += products of one cell; sums = them for the first, which names every row, those that keep nothing last.
  void (*multiply_cell)(int vectors, bool is_first, const Int8Cell& cell, const uint32_t* x_block, int32_t* sums);
  // y (tokens, stride) = float(sums (rows, vectors * lanes) transposed - offsets (rows,)) * scales (rows,) + bias (rows,) or 0.
  void (*store_tile)(const int32_t* sums, int vectors, size_t tokens, size_t rows, const int32_t* offsets, const float* scales,
                     const float* bias, float* y, size_t stride);
  // The same for sums (tokens, 16) of at most 16 rows.
  void (*store_strip)(const int32_t* sums, size_t tokens, size_t rows, const int32_t* offsets, const float* scales,
                      const float* bias, float* y, size_t stride);
  Int8MaskStrip* (*mask_strip)(int tokens, int* stride);  // for so many tokens, and the stride of x that it reads
};

// Kernels of an instruction set, or null where this build or this machine has none.
const Int8Kernels* int8_portable_kernels();
const Int8Kernels* int8_avx2_kernels();
const Int8Kernels* int8_avxvnni_kernels();
const Int8Kernels* int8_avx512_kernels();

}  // namespace mfcompile
