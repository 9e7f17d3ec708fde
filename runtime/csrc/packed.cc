#include "packed.h"

#include <algorithm>

namespace mfcompile {

namespace {

constexpr uint64_t kMostPlaces = (uint64_t{1} << 31) - 1;  // of one weight; onnxruntime could not decode more, either

std::string text(uint64_t number) { return std::to_string(number); }

void check_sizes(const PackedWeight& weight) {
  const auto limit = static_cast<int64_t>(kMostPlaces);
  if (weight.rows < 1 || weight.columns < 1 || weight.rows > limit || weight.columns > limit) {
    throw DamagedWeight("its shape is (" + std::to_string(weight.rows) + ", " + std::to_string(weight.columns) +
                        "), and both sides must lie in 1 .. 2^31 - 1");
  }
  const uint64_t places = static_cast<uint64_t>(weight.rows) * static_cast<uint64_t>(weight.columns);
  if (places > kMostPlaces) throw DamagedWeight("it has " + text(places) + " places, and may have 2^31 - 1");
  const size_t bytes = weight.index_bytes, entries = weight.entries;
  if (weight.encoding == Encoding::kMask) {
    if (bytes == (places + 7) / 8 && entries >= 1) return;
    throw DamagedWeight("its mask has " + text(bytes) + " bytes and " + text(entries) + " values, and needs " +
                        text((places + 7) / 8) + " bytes for " + text(places) + " places, and a zero behind the kept values");
  }
  if (entries < 1) throw DamagedWeight("it stores no value at all");
  if (weight.encoding == Encoding::kGap8 && bytes != entries) {
    throw DamagedWeight("it has " + text(bytes) + " gaps and " + text(entries) + " values, and needs as many of each");
  }
  if (weight.encoding == Encoding::kGap4 && (entries % 2 || bytes != entries / 2)) {
    throw DamagedWeight("it has " + text(bytes) + " bytes of 4-bit gaps and " + text(entries) +
                        " values, and needs two values for each byte");
  }
}

// Follows the places of entries through rows and blocks. Places must not fall.
class Walker {
 public:
  Walker(const PackedWeight& weight, size_t block_columns, Entries& entries)
      : entries_(entries),
        columns_(static_cast<uint64_t>(weight.columns)),
        places_(columns_ * static_cast<uint64_t>(weight.rows)),
        row_end_(columns_) {
    entries_.units = static_cast<size_t>(weight.rows);
    entries_.block_columns = block_columns;
    entries_.blocks = (static_cast<size_t>(weight.columns) + block_columns - 1) / block_columns;
    entries_.starts.assign(entries_.units * entries_.blocks + 1, 0);
    entries_.columns.resize(weight.entries);
    cell_end_ = std::min<uint64_t>(block_columns, row_end_);
  }

  // The next entry. False when it lies behind the last place.
  bool visit(uint64_t place) {
    if (place >= cell_end_ && !advance(place)) return false;
    entries_.columns[count_++] = static_cast<uint8_t>(place - cell_begin_);
    return true;
  }

  void finish() { std::fill(entries_.starts.begin() + static_cast<std::ptrdiff_t>(cell_) + 1, entries_.starts.end(), count_); }

  uint32_t count() const { return count_; }

 private:
  bool advance(uint64_t place) {
    if (place >= places_) return false;
    do {
      if (cell_end_ == row_end_) row_end_ += columns_;
      cell_begin_ = cell_end_;
      cell_end_ = std::min<uint64_t>(cell_begin_ + entries_.block_columns, row_end_);
      entries_.starts[++cell_] = count_;
    } while (place >= cell_end_);
    return true;
  }

  Entries& entries_;
  uint64_t columns_, places_, row_end_, cell_begin_ = 0, cell_end_ = 0;
  size_t cell_ = 0;
  uint32_t count_ = 0;
};

template <bool kHalfBytes>
void decode_gaps(const PackedWeight& weight, Walker& walker) {
  uint64_t place = 0;
  for (size_t entry = 0; entry < weight.entries; ++entry) {
    const unsigned byte = weight.index[kHalfBytes ? entry / 2 : entry];
    const unsigned gap = !kHalfBytes ? byte : entry % 2 ? byte & 15u : byte >> 4u;
    if (gap == 0 && entry != 0) throw DamagedWeight("entry " + text(entry) + " has gap 0, so two entries name one place");
    place += gap;
    if (!walker.visit(place)) {
      throw DamagedWeight("entry " + text(entry) + " lies at place " + text(place) + ", behind the last of " +
                          text(static_cast<uint64_t>(weight.rows * weight.columns)));
    }
  }
}

void decode_mask(const PackedWeight& weight, Walker& walker) {
  const auto places = static_cast<uint64_t>(weight.rows * weight.columns);
  const size_t kept = weight.entries - 1;
  for (size_t byte = 0; byte < weight.index_bytes; byte += 8) {
    uint64_t word = 0;
    for (size_t i = std::min<size_t>(8, weight.index_bytes - byte); i-- > 0;) word = word << 8 | weight.index[byte + i];
    const uint64_t left = places - 8 * byte;
    if (left < 64 && word >> left) throw DamagedWeight("its mask has bits behind the last of " + text(places) + " places");
    if (walker.count() + static_cast<size_t>(__builtin_popcountll(word)) > kept) {
      throw DamagedWeight("its mask keeps more places than the " + text(kept) + " values that it stores before a zero");
    }
    for (; word; word &= word - 1) walker.visit(8 * byte + static_cast<unsigned>(__builtin_ctzll(word)));
  }
  if (walker.count() != kept) {
    throw DamagedWeight("its mask keeps " + text(walker.count()) + " places, and it stores " + text(kept) +
                        " values before a zero");
  }
  if (!is_zero(weight.values, weight.value_type, kept)) throw DamagedWeight("the value behind the kept ones is no zero");
}

}  // namespace

Entries decode(const PackedWeight& weight, size_t block_columns) {
  check_sizes(weight);
  Entries entries;
  Walker walker(weight, block_columns, entries);
  switch (weight.encoding) {
    case Encoding::kGap8:
      decode_gaps<false>(weight, walker);
      break;
    case Encoding::kGap4:
      decode_gaps<true>(weight, walker);
      break;
    case Encoding::kMask:
      decode_mask(weight, walker);
      break;
  }
  walker.finish();
  return entries;
}

std::string find_fault(const PackedWeight& weight) {
  try {
    decode(weight, 256);
    return "";
  } catch (const DamagedWeight& damage) {
    return damage.what();
  }
}

}  // namespace mfcompile
