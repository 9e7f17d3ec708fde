#include "layouts.h"

#include <algorithm>
#include <cstring>

namespace mfcompile {

namespace {

constexpr size_t kChunkRows = 256;  // most rows of a chunk: a unit is named by a byte

size_t divide_up(size_t number, size_t by) { return (number + by - 1) / by; }

// Calls visit(entry of the rows, row inside the strip, column inside the block) for every entry of one block of a strip that is
// not zero: an encoding stores zeros between distant values.
template <class Visit>
void for_each_of_strip(const Entries& rows, const PackedWeight& weight, size_t strip, size_t height, size_t block,
                       Visit visit) {
  const size_t end = std::min(rows.units, (strip + 1) * height);
  for (size_t row = strip * height; row < end; ++row) {
    const size_t cell = row * rows.blocks + block;
    for (size_t entry = rows.starts[cell]; entry < rows.starts[cell + 1]; ++entry) {
      if (!is_zero(weight.values, weight.value_type, entry)) visit(entry, row - strip * height, rows.columns[entry]);
    }
  }
}

// Whether strips of `height` rows share their columns, judged by every `step`-th strip.
bool shares_columns(const Entries& rows, const PackedWeight& weight, size_t height, size_t step) {
  size_t entries = 0, places = 0;
  for (size_t strip = 0; strip < divide_up(rows.units, height); strip += step) {
    const size_t tall = std::min(height, rows.units - strip * height);
    for (size_t block = 0; block < rows.blocks; ++block) {
      bool is_kept[256] = {};
      for_each_of_strip(rows, weight, strip, height, block, [&](size_t, size_t, size_t column) {
        ++entries;
        places += is_kept[column] ? 0 : tall;
        is_kept[column] = true;
      });
    }
  }
  return entries * 20 >= places * 19;
}

// The units of one cell that keep anything, by how much they keep, most first; in their own order among equals. Further units,
// which keep nothing, fill the last group.
class UnitOrder {
 public:
  UnitOrder(size_t chunk_units, size_t group_units) : counts_(chunk_units), order_(chunk_units), group_units_(group_units) {}

  void sort(const Entries& entries, size_t first_unit, size_t block) {
    size_t starts[258] = {};
    for (size_t unit = 0; unit < counts_.size(); ++unit) {
      size_t count = 0;
      if (first_unit + unit < entries.units) {
        const size_t cell = (first_unit + unit) * entries.blocks + block;
        count = entries.starts[cell + 1] - entries.starts[cell];
      }
      counts_[unit] = static_cast<uint16_t>(count);
      ++starts[256 - count + 1];
    }
    for (size_t place = 1; place < 258; ++place) starts[place] += starts[place - 1];
    groups_ = divide_up(starts[256], group_units_);
    for (size_t unit = 0; unit < counts_.size(); ++unit) order_[starts[256 - counts_[unit]]++] = static_cast<uint8_t>(unit);
  }

  size_t groups() const { return groups_; }
  const uint8_t* units_of(size_t group) const { return order_.data() + group * group_units_; }
  size_t count_of(uint8_t unit) const { return counts_[unit]; }
  size_t length_of(size_t group) const { return counts_[*units_of(group)]; }

 private:
  std::vector<uint16_t> counts_;
  std::vector<uint8_t> order_;
  size_t group_units_, groups_ = 0;
};

// A column that is none of these, which are sorted; there is one, because the unit keeps less than another of its block.
uint8_t find_pruned_column(const uint8_t* columns, size_t count) {
  size_t column = 0;
  while (column < count && columns[column] == column) ++column;
  return static_cast<uint8_t>(column);
}

// The entries of one unit in one block.
struct Lane {
  const uint8_t* columns;
  const char* values;
  size_t count;
};

Lane find_lane(const Entries& entries, const void* values, size_t width, size_t unit, size_t block) {
  if (unit >= entries.units) return {entries.columns.data(), static_cast<const char*>(values), 0};
  const size_t cell = unit * entries.blocks + block, begin = entries.starts[cell];
  return {entries.columns.data() + begin, static_cast<const char*>(values) + begin * width, entries.starts[cell + 1] - begin};
}

// Eight columns below 64 in six bytes.
void squeeze(const uint8_t* columns, uint8_t* to) {
  uint64_t bits = 0;
  for (size_t row = kGroupRows; row-- > 0;) bits = bits << 6 | columns[row];
  for (size_t byte = 0; byte < 6; ++byte) to[byte] = static_cast<uint8_t>(bits >> 8 * byte);
}

void copy_lane(const Lane& lane, size_t length, size_t width, uint8_t* columns, char* values) {
  std::memcpy(columns, lane.columns, length);
  std::memcpy(values, lane.values, length * width);
}

// The entries of kGroupRows lanes side by side, brought to `length` each by zeros at a pruned place; a column for each byte.
template <size_t kWidth>
void interleave(const Lane* lanes, size_t length, uint8_t* columns, char* values) {
  constexpr size_t kRows = kGroupRows;
  size_t shortest = length;
  for (size_t row = 0; row < kRows; ++row) shortest = std::min(shortest, lanes[row].count);
  // Eight entries are gathered before they are stored: what is stored as bytes may be anything, also a pointer of a lane.
  const Lane own[kRows] = {lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5], lanes[6], lanes[7]};
  for (size_t entry = 0; entry < shortest; ++entry) {
    uint8_t slot_columns[kRows];
    char slot_values[kRows * kWidth];
    for (size_t row = 0; row < kRows; ++row) {
      slot_columns[row] = own[row].columns[entry];
      std::memcpy(slot_values + row * kWidth, own[row].values + entry * kWidth, kWidth);
    }
    std::memcpy(columns + entry * kRows, slot_columns, sizeof slot_columns);
    std::memcpy(values + entry * kRows * kWidth, slot_values, sizeof slot_values);
  }
  for (size_t row = 0; row < kRows && shortest < length; ++row) {
    const Lane& lane = lanes[row];
    const uint8_t pruned = lane.count < length ? find_pruned_column(lane.columns, lane.count) : 0;
    for (size_t entry = shortest; entry < length; ++entry) {
      const bool exists = entry < lane.count;
      columns[entry * kRows + row] = exists ? lane.columns[entry] : pruned;
      char* to = values + (entry * kRows + row) * kWidth;
      exists ? std::memcpy(to, lane.values + entry * kWidth, kWidth) : std::memset(to, 0, kWidth);
    }
  }
}

}  // namespace

CellLayout::CellLayout(const Entries& entries, const void* from, ValueType value_type, int unit_rows, size_t rows)
    : unit_rows(unit_rows),
      group_units(unit_rows == 1 ? kGroupRows : 1),
      block_columns(entries.block_columns),
      blocks(entries.blocks),
      value_type(value_type),
      has_six_bits(unit_rows == 1 && entries.block_columns <= 64) {
  chunks = divide_up(rows, kChunkRows);
  chunk_rows = divide_up(divide_up(rows, chunks), kStripRows) * kStripRows;
  chunks = divide_up(rows, chunk_rows);
  const auto group = static_cast<size_t>(group_units);
  const size_t chunk_units = chunk_rows / static_cast<size_t>(unit_rows),
               width = bytes_of(value_type) * static_cast<size_t>(unit_rows);
  UnitOrder order(chunk_units, group);

  first_group = WeightArray<size_t>(chunks * blocks + 1), first_entry = WeightArray<size_t>(chunks * blocks + 1);
  std::vector<uint8_t> all_counts, all_units;
  size_t slots = 0;  // entries of groups, with those that fill them up
  for (size_t cell = 0; cell < chunks * blocks; ++cell) {
    first_group.write()[cell] = all_counts.size(), first_entry.write()[cell] = slots * group;
    order.sort(entries, cell / blocks * chunk_units, cell % blocks);
    for (size_t index = 0; index < order.groups(); ++index) {
      all_counts.push_back(static_cast<uint8_t>(order.length_of(index)));
      slots += order.length_of(index);
    }
    all_units.insert(all_units.end(), order.units_of(0), order.units_of(order.groups()));
  }
  first_group.write()[chunks * blocks] = all_counts.size(), first_entry.write()[chunks * blocks] = slots * group;
  counts = WeightArray<uint8_t>(all_counts.size()), units = WeightArray<uint8_t>(all_units.size());
  std::copy(all_counts.begin(), all_counts.end(), counts.write());
  std::copy(all_units.begin(), all_units.end(), units.write());

  columns = WeightArray<uint8_t>((has_six_bits ? slots * 6 : slots * group) + kColumnsBehind);
  values = WeightArray<char>(slots * group * width + kReadBehind * sizeof(float));
  uint8_t* next_column = columns.write();
  char* next_value = values.write();
  const uint8_t *unit = all_units.data(), *length = all_counts.data();
  for (size_t cell = 0; cell < chunks * blocks; ++cell) {
    const size_t first_unit = cell / blocks * chunk_units, block = cell % blocks;
    for (size_t index = first_group[cell]; index < first_group[cell + 1]; ++index, ++length, unit += group) {
      Lane lanes[kGroupRows];
      for (size_t place = 0; place < group; ++place)
        lanes[place] = find_lane(entries, from, width, first_unit + unit[place], block);
      uint8_t wide[256 * kGroupRows];
      uint8_t* lane_columns = has_six_bits ? wide : next_column;
      if (group == 1) {
        copy_lane(lanes[0], *length, width, lane_columns, next_value);
      } else if (value_type == ValueType::kFloat) {
        interleave<4>(lanes, *length, lane_columns, next_value);
      } else {
        interleave<2>(lanes, *length, lane_columns, next_value);
      }
      for (size_t slot = 0; has_six_bits && slot < *length; ++slot) squeeze(wide + slot * kGroupRows, next_column + slot * 6);
      next_column += has_six_bits ? *length * 6 : *length * group;
      next_value += *length * group * width;
    }
  }
  std::memset(next_column, 0, kColumnsBehind);
  std::memset(next_value, 0, kReadBehind * sizeof(float));
}

Cell CellLayout::cell(size_t chunk, size_t block) const {
  const size_t index = chunk * blocks + block, group = first_group[index];
  return {first_group[index + 1] - group,
          counts.data() + group,
          units.data() + group * static_cast<size_t>(group_units),
          columns.data() + (has_six_bits ? first_entry[index] / 4 * 3 : first_entry[index]),
          values.data() + first_entry[index] * static_cast<size_t>(unit_rows) * bytes_of(value_type),
          value_type == ValueType::kHalf,
          has_six_bits,
          static_cast<int>(block_columns)};
}

size_t CellLayout::bytes() const {
  return first_group.bytes() + first_entry.bytes() + counts.bytes() + units.bytes() + columns.bytes() + values.bytes();
}

BlockLayout::BlockLayout(const Entries& entries, const void* from, ValueType value_type)
    : strips(entries.units),
      value_type(value_type),
      first_block(strips + 1),
      columns(entries.columns.size()),
      values(entries.columns.size() * kStripRows * bytes_of(value_type) + kReadBehind * sizeof(float)) {
  for (size_t strip = 0; strip <= strips; ++strip) first_block.write()[strip] = entries.starts[strip * entries.blocks];
  for (size_t cell = 0; cell < strips * entries.blocks; ++cell) {
    const auto base = static_cast<uint32_t>(cell % entries.blocks * entries.block_columns);
    for (size_t entry = entries.starts[cell]; entry < entries.starts[cell + 1]; ++entry) {
      columns.write()[entry] = base + entries.columns[entry];
    }
  }
  std::memset(values.write(), 0, values.bytes());
  if (!entries.columns.empty()) std::memcpy(values.write(), from, entries.columns.size() * kStripRows * bytes_of(value_type));
}

int find_unit_rows(const Entries& rows, const PackedWeight& weight) {
  for (const int height : {16, 4}) {
    // A few strips tell most weights without a pattern; where they have one, all are asked.
    const size_t step = std::max<size_t>(1, divide_up(rows.units, static_cast<size_t>(height)) / 16);
    const auto shares = [&](size_t of) { return shares_columns(rows, weight, static_cast<size_t>(height), of); };
    if (shares(step) && shares(1)) return height;
  }
  return 1;
}

Strips make_strips(const Entries& rows, const PackedWeight& weight, int unit_rows) {
  const auto height = static_cast<size_t>(unit_rows);
  const size_t width = bytes_of(weight.value_type);
  Strips strips;
  Entries& entries = strips.entries;
  entries.units = divide_up(rows.units, height), entries.blocks = rows.blocks, entries.block_columns = rows.block_columns;
  entries.starts.push_back(0);
  for (size_t strip = 0; strip < entries.units; ++strip) {
    for (size_t block = 0; block < rows.blocks; ++block) {
      bool is_kept[256] = {};
      size_t place[256];
      for_each_of_strip(rows, weight, strip, height, block, [&](size_t, size_t, size_t column) { is_kept[column] = true; });
      for (size_t column = 0; column < rows.block_columns; ++column) {
        if (!is_kept[column]) continue;
        place[column] = entries.columns.size();
        entries.columns.push_back(static_cast<uint8_t>(column));
      }
      strips.values.resize(entries.columns.size() * height * width, 0);
      for_each_of_strip(rows, weight, strip, height, block, [&](size_t entry, size_t row, size_t column) {
        std::memcpy(strips.values.data() + (place[column] * height + row) * width,
                    static_cast<const char*>(weight.values) + entry * width, width);
      });
      entries.starts.push_back(static_cast<uint32_t>(entries.columns.size()));
    }
  }
  return strips;
}

}  // namespace mfcompile
