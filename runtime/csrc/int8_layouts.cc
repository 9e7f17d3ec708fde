#include "int8_layouts.h"

#include <algorithm>

namespace mfcompile {

namespace {

constexpr size_t kChunkRows = 256;  // most rows of a chunk: its tile of sums stays in the L2 cache

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

// Rows by how much they keep, most first, in their own order among equals; without those that keep nothing unless `all`.
void sort_rows(const uint8_t* counts, size_t row_count, bool all, std::vector<uint16_t>& order) {
  order.clear();
  for (size_t row = 0; row < row_count; ++row) {
    if (counts[row] || all) order.push_back(static_cast<uint16_t>(row));
  }
  std::stable_sort(order.begin(), order.end(), [&](uint16_t one, uint16_t other) { return counts[one] > counts[other]; });
}

}  // namespace

Int8CellLayout::Int8CellLayout(const PackedInt8& weight) {
  const size_t row_count = static_cast<size_t>(weight.rows);
  chunks = divide_up(row_count, kChunkRows);
  chunk_rows = divide_up(divide_up(row_count, chunks), kStripRows) * kStripRows;
  chunks = divide_up(row_count, chunk_rows);
  blocks = divide_up(group_count(weight), kBlockGroups);
  const auto place_of = [&](int64_t row, int64_t group) {  // (chunk, block, row inside the chunk)
    const size_t chunk = static_cast<size_t>(row) / chunk_rows, block = static_cast<size_t>(group) / kBlockGroups;
    return (chunk * blocks + block) * chunk_rows + static_cast<size_t>(row) % chunk_rows;
  };

  std::vector<uint8_t> counts(chunks * blocks * chunk_rows, 0);
  for_each_group(weight, [&](int64_t row, int64_t group, uint32_t) { ++counts[place_of(row, group)]; });

  std::vector<size_t> cell_runs, cell_rows, cell_entries, next(counts.size(), 0);  // next: where a row's next entry goes
  std::vector<Run> all_runs;
  std::vector<uint16_t> all_rows, order;
  size_t entries = 0;
  for (size_t cell = 0; cell < chunks * blocks; ++cell) {
    cell_runs.push_back(all_runs.size());
    cell_rows.push_back(all_rows.size());
    cell_entries.push_back(entries);
    const uint8_t* count = &counts[cell * chunk_rows];
    sort_rows(count, chunk_rows, cell % blocks == 0, order);
    for (const uint16_t row : order) {
      if (all_runs.size() == cell_runs.back() || all_runs.back().count != count[row]) all_runs.push_back({count[row], 0});
      ++all_runs.back().units;
      next[cell * chunk_rows + row] = entries;
      entries += count[row];
    }
    all_rows.insert(all_rows.end(), order.begin(), order.end());
  }
  cell_runs.push_back(all_runs.size());
  cell_rows.push_back(all_rows.size());
  cell_entries.push_back(entries);

  std::vector<uint8_t> entry_groups(entries);
  std::vector<int32_t> entry_words(entries);
  for_each_group(weight, [&](int64_t row, int64_t group, uint32_t word) {
    const size_t entry = next[place_of(row, group)]++;
    entry_groups[entry] = static_cast<uint8_t>(static_cast<size_t>(group) % kBlockGroups);
    entry_words[entry] = static_cast<int32_t>(word);
  });
  first_run = WeightArray<size_t>(cell_runs), first_row = WeightArray<size_t>(cell_rows);
  first_entry = WeightArray<size_t>(cell_entries), runs = WeightArray<Run>(all_runs), rows = WeightArray<uint16_t>(all_rows);
  groups = WeightArray<uint8_t>(entry_groups), words = WeightArray<int32_t>(entry_words);
}

Int8Cell Int8CellLayout::cell(size_t chunk, size_t block) const {
  const size_t index = chunk * blocks + block;
  return {runs.data() + first_run[index], first_run[index + 1] - first_run[index], rows.data() + first_row[index],
          groups.data() + first_entry[index], words.data() + first_entry[index]};
}

size_t Int8CellLayout::bytes() const {
  return first_run.bytes() + first_row.bytes() + first_entry.bytes() + runs.bytes() + rows.bytes() + groups.bytes() +
         words.bytes();
}

Int8MaskLayout::Int8MaskLayout(const PackedInt8& weight) {
  const size_t width = group_count(weight);
  strips = divide_up(static_cast<size_t>(weight.rows), kStripRows);
  std::vector<uint16_t> all_masks(strips * width, 0);
  for_each_group(weight, [&](int64_t row, int64_t group, uint32_t) {
    all_masks[static_cast<size_t>(row) / kStripRows * width + static_cast<size_t>(group)] |=
        static_cast<uint16_t>(1u << row % kStripRows);
  });
  // Words of a strip go by group, then by row: where the words of each group begin.
  std::vector<size_t> starts(strips), begins(all_masks.size());
  size_t count = 0;
  for (size_t index = 0; index < all_masks.size(); ++index) {
    if (index % width == 0) starts[index / width] = count;
    begins[index] = count;
    count += static_cast<size_t>(__builtin_popcount(all_masks[index]));
  }
  std::vector<int32_t> packed(count + kStripRows, 0);  // kernels read behind the last word
  for_each_group(weight, [&](int64_t row, int64_t group, uint32_t word) {
    packed[begins[static_cast<size_t>(row) / kStripRows * width + static_cast<size_t>(group)]++] = static_cast<int32_t>(word);
  });
  masks = WeightArray<uint16_t>(all_masks), first_word = WeightArray<size_t>(starts), words = WeightArray<int32_t>(packed);
}

}  // namespace mfcompile
