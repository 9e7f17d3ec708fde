#include "layouts.h"

#include <algorithm>

namespace mfcompile {

namespace {

constexpr size_t kChunkRows = 512;  // most rows of a chunk: its tile of outputs stays in the L2 cache

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

// Calls visit(chunk * blocks + block, unit inside the chunk, column inside the block, values of the unit's rows).
template <class Visit>
void for_each_cell_entry(const PackedWeight& weight, const CellLayout& layout, Visit visit) {
  const size_t chunk_units = layout.chunk_rows / layout.unit_rows;
  for_each_strip(weight, layout.unit_rows, [&](int64_t strip, const float* values, const uint16_t* kept) {
    const size_t chunk = static_cast<size_t>(strip) / chunk_units, unit = static_cast<size_t>(strip) % chunk_units;
    for (size_t column = 0; column < static_cast<size_t>(weight.columns); ++column) {
      if (!kept[column]) continue;
      const size_t block = column / layout.block_columns;
      visit(chunk * layout.blocks + block, unit, column % layout.block_columns, values + column * layout.unit_rows);
    }
  });
}

}  // namespace

CellLayout::CellLayout(const PackedWeight& weight, int unit_rows, int block_columns)
    : unit_rows(unit_rows), block_columns(block_columns) {
  const size_t rows = static_cast<size_t>(weight.rows);
  chunks = divide_up(rows, kChunkRows);
  chunk_rows = divide_up(divide_up(rows, chunks), kStripRows) * kStripRows;
  chunks = divide_up(rows, chunk_rows);
  blocks = divide_up(static_cast<size_t>(weight.columns), block_columns);
  const size_t cells = chunks * blocks, chunk_units = chunk_rows / unit_rows;

  std::vector<uint16_t> counts(cells * chunk_units, 0);
  for_each_cell_entry(weight, *this,
                      [&](size_t cell, size_t unit, size_t, const float*) { ++counts[cell * chunk_units + unit]; });

  std::vector<size_t> next(cells * chunk_units, 0);  // where the next entry of a unit goes
  std::vector<uint16_t> order;
  size_t entries = 0;
  for (size_t cell = 0; cell < cells; ++cell) {
    first_run.push_back(runs.size());
    first_unit.push_back(units.size());
    first_entry.push_back(entries);
    const uint16_t* count = &counts[cell * chunk_units];
    order.clear();
    for (size_t unit = 0; unit < chunk_units; ++unit) {
      if (count[unit]) order.push_back(static_cast<uint16_t>(unit));
    }
    std::stable_sort(order.begin(), order.end(), [&](uint16_t a, uint16_t b) { return count[a] > count[b]; });
    for (const uint16_t unit : order) {
      if (runs.size() == first_run.back() || runs.back().count != count[unit]) runs.push_back({count[unit], 0});
      ++runs.back().units;
      next[cell * chunk_units + unit] = entries;
      entries += count[unit];
    }
    units.insert(units.end(), order.begin(), order.end());
  }
  first_run.push_back(runs.size());
  first_unit.push_back(units.size());
  first_entry.push_back(entries);

  columns.resize(entries);
  values.resize(entries * unit_rows);
  for_each_cell_entry(weight, *this, [&](size_t cell, size_t unit, size_t column, const float* value) {
    const size_t entry = next[cell * chunk_units + unit]++;
    columns[entry] = static_cast<uint8_t>(column);
    std::copy(value, value + unit_rows, values.begin() + entry * unit_rows);
  });
  runs.shrink_to_fit();
  units.shrink_to_fit();
}

Cell CellLayout::cell(size_t chunk, size_t block) const {
  const size_t index = chunk * blocks + block;
  return {runs.data() + first_run[index], first_run[index + 1] - first_run[index], units.data() + first_unit[index],
          columns.data() + first_entry[index], values.data() + first_entry[index] * unit_rows};
}

MaskLayout::MaskLayout(const PackedWeight& weight) {
  const size_t width = static_cast<size_t>(weight.columns);
  strips = divide_up(static_cast<size_t>(weight.rows), kStripRows);
  masks.assign(strips * width, 0);
  first_value.assign(strips, 0);
  size_t kept_count = 0;
  for_each_entry(weight, [&](int64_t, int64_t, float) { ++kept_count; });
  values.reserve(kept_count + kStripRows);
  size_t begun = 0;  // strips whose first value is known
  for_each_strip(weight, kStripRows, [&](int64_t strip, const float* strip_values, const uint16_t* kept) {
    while (begun <= static_cast<size_t>(strip)) first_value[begun++] = values.size();
    std::copy(kept, kept + width, masks.begin() + static_cast<size_t>(strip) * width);
    for (size_t column = 0; column < width; ++column) {
      for (unsigned mask = kept[column]; mask; mask &= mask - 1) {
        values.push_back(strip_values[column * kStripRows + __builtin_ctz(mask)]);
      }
    }
  });
  while (begun < strips) first_value[begun++] = values.size();
  values.resize(kept_count + kStripRows, 0.0f);
}

BlockLayout::BlockLayout(const PackedWeight& weight) {
  strips = divide_up(static_cast<size_t>(weight.rows), kStripRows);
  for_each_strip(weight, kStripRows, [&](int64_t strip, const float* strip_values, const uint16_t* kept) {
    while (first_block.size() <= static_cast<size_t>(strip)) first_block.push_back(columns.size());
    for (size_t column = 0; column < static_cast<size_t>(weight.columns); ++column) {
      if (!kept[column]) continue;
      columns.push_back(static_cast<uint32_t>(column));
      values.insert(values.end(), strip_values + column * kStripRows, strip_values + (column + 1) * kStripRows);
    }
  });
  while (first_block.size() <= strips) first_block.push_back(columns.size());
  columns.shrink_to_fit();
  values.shrink_to_fit();
}

Structure find_structure(const PackedWeight& weight) {
  size_t kept_count = 0, blocks_of_4 = 0, blocks_of_16 = 0;
  for_each_strip(weight, kStripRows, [&](int64_t, const float*, const uint16_t* kept) {
    for (size_t column = 0; column < static_cast<size_t>(weight.columns); ++column) {
      const unsigned mask = kept[column];
      if (!mask) continue;
      kept_count += static_cast<size_t>(__builtin_popcount(mask));
      blocks_of_16 += 1;
      blocks_of_4 += ((mask & 0xf) != 0) + ((mask & 0xf0) != 0) + ((mask & 0xf00) != 0) + ((mask & 0xf000) != 0);
    }
  });
  if (kept_count * 20 >= blocks_of_16 * 16 * 19) return {16, kept_count};
  if (kept_count * 20 >= blocks_of_4 * 4 * 19) return {4, kept_count};
  return {1, kept_count};
}

}  // namespace mfcompile
