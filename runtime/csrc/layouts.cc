#include "layouts.h"

#include <algorithm>

namespace mfcompile {

namespace {

constexpr size_t kChunkRows = 512;  // most rows of a chunk: its tile of outputs stays in the L2 cache

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

// Calls visit(chunk * blocks + block, unit inside the chunk, column inside the block, values of the unit's rows), in order of
// the units, and inside a unit of the columns.
template <class Visit>
void for_each_cell_entry(const PackedWeight& weight, const CellLayout& layout, Visit visit) {
  const auto chunk_units = static_cast<int64_t>(layout.chunk_rows) / layout.unit_rows;
  const auto block_columns = static_cast<uint32_t>(layout.block_columns);
  int64_t chunk = 0, last_unit = -1, unit_in_chunk = 0;
  const auto visit_entry = [&](int64_t unit, uint32_t column, const float* values) {
    if (unit != last_unit) {
      chunk = unit / chunk_units, unit_in_chunk = unit % chunk_units;
      last_unit = unit;
    }
    const uint32_t block = column / block_columns;
    visit(static_cast<size_t>(chunk) * layout.blocks + block, static_cast<size_t>(unit_in_chunk),
          column - block * block_columns, values);
  };
  if (layout.unit_rows == 1) {
    for_each_entry(weight,
                   [&](int64_t row, int64_t column, float value) { visit_entry(row, static_cast<uint32_t>(column), &value); });
    return;
  }
  for_each_strip<4>(weight, [&](int64_t strip, const float* values, const uint16_t* kept) {
    for (uint32_t column = 0; column < static_cast<uint32_t>(weight.columns); ++column) {
      if (kept[column]) visit_entry(strip, column, values + 4 * static_cast<size_t>(column));
    }
  });
}

// Units that keep anything, by how much they keep, most first; in their own order among equals.
void sort_units(const uint8_t* counts, size_t unit_count, std::vector<uint16_t>& order) {
  size_t starts[257] = {};
  for (size_t unit = 0; unit < unit_count; ++unit) ++starts[255 - counts[unit] + 1];
  for (size_t place = 1; place < 257; ++place) starts[place] += starts[place - 1];
  order.resize(starts[255]);  // those that keep nothing come last and are left out
  for (size_t unit = 0; unit < unit_count; ++unit) {
    if (counts[unit]) order[starts[255 - counts[unit]]++] = static_cast<uint16_t>(unit);
  }
}

}  // namespace

CellLayout::CellLayout(const PackedWeight& weight, int unit_rows, int block_columns)
    : unit_rows(unit_rows), block_columns(block_columns) {
  const size_t rows = static_cast<size_t>(weight.rows);
  chunks = divide_up(rows, kChunkRows);
  chunk_rows = divide_up(divide_up(rows, chunks), kStripRows) * kStripRows;
  chunks = divide_up(rows, chunk_rows);
  blocks = divide_up(static_cast<size_t>(weight.columns), static_cast<size_t>(block_columns));
  const size_t cells = chunks * blocks, chunk_units = chunk_rows / static_cast<size_t>(unit_rows);

  std::vector<uint8_t> counts(cells * chunk_units, 0);  // a unit keeps at most block_columns < 256 columns of a cell
  for_each_cell_entry(weight, *this,
                      [&](size_t cell, size_t unit, size_t, const float*) { ++counts[cell * chunk_units + unit]; });

  std::vector<size_t> cell_runs, cell_units, cell_entries,
      next(cells * chunk_units, 0);  // next: where a unit's next entry goes
  std::vector<Run> all_runs;
  std::vector<uint16_t> all_units, order;
  size_t entries = 0;
  for (size_t cell = 0; cell < cells; ++cell) {
    cell_runs.push_back(all_runs.size());
    cell_units.push_back(all_units.size());
    cell_entries.push_back(entries);
    const uint8_t* count = &counts[cell * chunk_units];
    sort_units(count, chunk_units, order);
    for (const uint16_t unit : order) {
      if (all_runs.size() == cell_runs.back() || all_runs.back().count != count[unit]) all_runs.push_back({count[unit], 0});
      ++all_runs.back().units;
      next[cell * chunk_units + unit] = entries;
      entries += count[unit];
    }
    all_units.insert(all_units.end(), order.begin(), order.end());
  }
  cell_runs.push_back(all_runs.size());
  cell_units.push_back(all_units.size());
  cell_entries.push_back(entries);

  const size_t height = static_cast<size_t>(unit_rows);
  std::vector<uint8_t> entry_columns(entries);
  std::vector<float> entry_values(entries * height);
  for_each_cell_entry(weight, *this, [&](size_t cell, size_t unit, size_t column, const float* value) {
    const size_t entry = next[cell * chunk_units + unit]++;
    entry_columns[entry] = static_cast<uint8_t>(column);
    std::copy(value, value + height, entry_values.data() + entry * height);
  });
  first_run = WeightArray<size_t>(cell_runs), first_unit = WeightArray<size_t>(cell_units);
  first_entry = WeightArray<size_t>(cell_entries), runs = WeightArray<Run>(all_runs), units = WeightArray<uint16_t>(all_units);
  entry_columns.resize(entries + kStripRows, 0);  // what multiply_cell_by_token reads behind the last entry
  columns = WeightArray<uint8_t>(entry_columns), values = WeightArray<float>(entry_values);
}

Cell CellLayout::cell(size_t chunk, size_t block) const {
  const size_t index = chunk * blocks + block;
  return {runs.data() + first_run[index], first_run[index + 1] - first_run[index], units.data() + first_unit[index],
          columns.data() + first_entry[index], values.data() + first_entry[index] * static_cast<size_t>(unit_rows)};
}

size_t CellLayout::bytes() const {
  return first_run.bytes() + first_unit.bytes() + first_entry.bytes() + runs.bytes() + units.bytes() + columns.bytes() +
         values.bytes();
}

MaskLayout::MaskLayout(const PackedWeight& weight) {
  const size_t width = static_cast<size_t>(weight.columns);
  strips = divide_up(static_cast<size_t>(weight.rows), kStripRows);
  std::vector<uint16_t> all_masks(strips * width, 0);
  std::vector<size_t> starts;
  std::vector<float> packed;
  packed.reserve(weight.entries + kStripRows);
  for_each_strip<kStripRows>(weight, [&](int64_t strip, const float* strip_values, const uint16_t* kept) {
    while (starts.size() <= static_cast<size_t>(strip)) starts.push_back(packed.size());
    std::copy(kept, kept + width, all_masks.data() + static_cast<size_t>(strip) * width);
    for (size_t column = 0; column < width; ++column) {
      for (unsigned mask = kept[column]; mask; mask &= mask - 1) {
        packed.push_back(strip_values[column * kStripRows + static_cast<size_t>(__builtin_ctz(mask))]);
      }
    }
  });
  starts.resize(strips, packed.size());
  packed.resize(packed.size() + kStripRows, 0.0f);  // what kernels read behind the last value
  masks = WeightArray<uint16_t>(all_masks), first_value = WeightArray<size_t>(starts), values = WeightArray<float>(packed);
}

BlockLayout::BlockLayout(const PackedWeight& weight) {
  strips = divide_up(static_cast<size_t>(weight.rows), kStripRows);
  std::vector<size_t> starts;
  std::vector<uint32_t> all_columns;
  std::vector<float> all_values;
  for_each_strip<kStripRows>(weight, [&](int64_t strip, const float* strip_values, const uint16_t* kept) {
    while (starts.size() <= static_cast<size_t>(strip)) starts.push_back(all_columns.size());
    for (size_t column = 0; column < static_cast<size_t>(weight.columns); ++column) {
      if (!kept[column]) continue;
      all_columns.push_back(static_cast<uint32_t>(column));
      all_values.insert(all_values.end(), strip_values + column * kStripRows, strip_values + (column + 1) * kStripRows);
    }
  });
  starts.resize(strips + 1, all_columns.size());
  first_block = WeightArray<size_t>(starts), columns = WeightArray<uint32_t>(all_columns),
  values = WeightArray<float>(all_values);
}

Structure find_structure(const PackedWeight& weight) {
  size_t kept_count = 0, blocks_of_4 = 0, blocks_of_16 = 0;
  std::vector<int64_t> last_strip_of_4(static_cast<size_t>(weight.columns), -1), last_strip_of_16 = last_strip_of_4;
  for_each_entry(weight, [&](int64_t row, int64_t column, float) {
    int64_t& last_of_4 = last_strip_of_4[static_cast<size_t>(column)];
    int64_t& last_of_16 = last_strip_of_16[static_cast<size_t>(column)];
    ++kept_count;
    blocks_of_4 += last_of_4 != row / 4;
    blocks_of_16 += last_of_16 != row / 16;
    last_of_4 = row / 4;
    last_of_16 = row / 16;
  });
  if (kept_count * 20 >= blocks_of_16 * 16 * 19) return {16, kept_count};
  if (kept_count * 20 >= blocks_of_4 * 4 * 19) return {4, kept_count};
  return {1, kept_count};
}

}  // namespace mfcompile
